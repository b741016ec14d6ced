// The table a layout becomes, as kernels read it: one int32 array, written by sfllava_fast/table.py.
//
//   header    version, patches, frames, tokens, pathways, groups, items, readers    (kHeader numbers)
//   pathways  first patch, height, width, reduce, rows, first row bin, cols, first column bin, first row cover,
//             first column cover, pitch                                            (kPathway numbers each)
//   groups    first item of each group, and the number of items                    (groups + 1)
//   items     pathway, first frame, past the last frame, first token               (kItem numbers each)
//   frames    first reader of each frame, and the number of readers                (frames + 1)
//   readers   the items that read a frame, in the order of their tokens, frame after frame
//   bins      start, stop                                                          (2 numbers each)
//
// A pathway's grid is height x width patches of a frame, from its first patch on: patch 1 behind a class token, which is
// a grid of one patch itself. Patches on no grid, and frames that nothing reads, may exist.
// An item is one frame bin of one pathway: it yields rows x cols tokens, each row `pitch` tokens behind the last. Items
// lie anywhere among the tokens; kernels leave what lies between them, and behind a row, as it is.
// A group is a run of items that read the same frames, so that a kernel can serve them from one read.
// Frames, readers and covers say what a patch has become, for a backward: a cover, kept among the bins, is the range of a
// pathway's bins that hold a row or a column of its grid.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SFLLAVA_HOST_DEVICE __host__ __device__
#else
#define SFLLAVA_HOST_DEVICE
#endif

namespace sfllava {

constexpr int32_t kPlanVersion = 3;
constexpr int kHeader = 8, kPathway = 11, kItem = 4;

enum Reduce : int32_t { kMax = 0, kMean = 1, kLinear = 2 };

struct Bin {
  int32_t start, stop;
  SFLLAVA_HOST_DEVICE int32_t size() const { return stop - start; }
};

struct Item {
  int32_t pathway, frame_begin, frame_end, first_token;
};

// Bins and covers are views into the table.
struct Pathway {
  int32_t first_patch, height, width, reduce, rows, cols, pitch;
  const Bin *row, *col;
  const Bin *row_cover, *col_cover;

  // The patch of a frame at a place of the grid.
  SFLLAVA_HOST_DEVICE int64_t patch(int32_t r, int32_t c) const { return first_patch + int64_t{r} * width + c; }
};

// A view of a table.
class Plan {
 public:
  explicit Plan(const int32_t* table) : Plan(table, table) {}

  // The same parts in a copy of the table that this code cannot read: on a GPU.
  Plan in(const int32_t* copy) const { return {table_, copy}; }

  const int32_t* table() const { return table_; }
  SFLLAVA_HOST_DEVICE int32_t patches() const { return patches_; }
  SFLLAVA_HOST_DEVICE int32_t frames() const { return frames_; }
  SFLLAVA_HOST_DEVICE int32_t tokens() const { return tokens_; }
  SFLLAVA_HOST_DEVICE int32_t pathways() const { return pathways_; }
  SFLLAVA_HOST_DEVICE int32_t groups() const { return groups_; }
  SFLLAVA_HOST_DEVICE int32_t items() const { return items_; }
  SFLLAVA_HOST_DEVICE int32_t readers() const { return readers_; }

  SFLLAVA_HOST_DEVICE Pathway pathway(int32_t i) const {
    const int32_t* p = pathway_ + i * kPathway;
    return {p[0], p[1], p[2], p[3], p[4], p[6], p[10], bin_ + p[5], bin_ + p[7], bin_ + p[8], bin_ + p[9]};
  }
  SFLLAVA_HOST_DEVICE int32_t group_begin(int32_t g) const { return group_[g]; }
  SFLLAVA_HOST_DEVICE Item item(int32_t i) const {
    const int32_t* p = item_ + int64_t{i} * kItem;
    return {p[0], p[1], p[2], p[3]};
  }
  SFLLAVA_HOST_DEVICE int32_t first_token(int32_t i) const { return item_[int64_t{i} * kItem + 3]; }
  SFLLAVA_HOST_DEVICE int32_t reader_begin(int32_t frame) const { return frame_[frame]; }
  SFLLAVA_HOST_DEVICE int32_t reader(int32_t i) const { return reader_[i]; }

  // Where the bins begin in a table with this header.
  static int64_t bins_at(const int32_t* t) {
    return kHeader + int64_t{kPathway} * t[4] + int64_t{t[5]} + 1 + int64_t{kItem} * t[6] + int64_t{t[2]} + 1 + t[7];
  }

 private:
  Plan(const int32_t* header, const int32_t* parts)
      : table_(header),
        patches_(header[1]),
        frames_(header[2]),
        tokens_(header[3]),
        pathways_(header[4]),
        groups_(header[5]),
        items_(header[6]),
        readers_(header[7]),
        pathway_(parts + kHeader),
        group_(pathway_ + int64_t{kPathway} * pathways_),
        item_(group_ + groups_ + 1),
        frame_(item_ + int64_t{kItem} * items_),
        reader_(frame_ + frames_ + 1),
        bin_(reinterpret_cast<const Bin*>(reader_ + readers_)) {}

  const int32_t* table_;
  int32_t patches_, frames_, tokens_, pathways_, groups_, items_, readers_;
  const int32_t *pathway_, *group_, *item_, *frame_, *reader_;
  const Bin* bin_;
};

// The token of an item's box (row bin r, column bin c).
SFLLAVA_HOST_DEVICE inline int64_t token_row(const Item& item, const Pathway& path, int32_t r, int32_t c) {
  return int64_t{item.first_token} + int64_t{r} * path.pitch + c;
}

// Null if every index in the table stays inside itself, the features and the output; else what is wrong.
const char* check_plan(const int32_t* table, int64_t size, int64_t frames, int64_t patches, int64_t tokens);

}  // namespace sfllava
