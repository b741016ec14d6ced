// The table a layout becomes, as kernels read it: one int32 array, written by sfllava_fast/table.py.
//
//   header    version, patches, frames, tokens, pathways, groups, items        (kHeader numbers)
//   pathways  width, reduce, rows, first row bin, cols, first column bin       (kPathway numbers each)
//   groups    first item of each group, and the number of items                (groups + 1)
//   items     pathway, first frame, past the last frame, first token           (kItem numbers each)
//   bins      start, stop                                                      (2 numbers each)
//
// An item is one frame bin of one pathway: it yields rows * cols tokens. A group is a run of items that read
// the same frames, so that a kernel can serve them from one read.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SFLLAVA_HOST_DEVICE __host__ __device__
#else
#define SFLLAVA_HOST_DEVICE
#endif

namespace sfllava {

constexpr int32_t kPlanVersion = 1;
constexpr int kHeader = 7, kPathway = 6, kItem = 4;

enum Reduce : int32_t { kMax = 0, kMean = 1 };

struct Bin {
  int32_t start, stop;
  SFLLAVA_HOST_DEVICE int32_t size() const { return stop - start; }
};

struct Item {
  int32_t pathway, frame_begin, frame_end, first_token;
};

// A pathway on a grid `width` patches wide; the bins are views into the table.
struct Pathway {
  int32_t width, reduce, rows, cols;
  const Bin* row;
  const Bin* col;
};

struct Plan {
  const int32_t* table;

  SFLLAVA_HOST_DEVICE int32_t patches() const { return table[1]; }
  SFLLAVA_HOST_DEVICE int32_t frames() const { return table[2]; }
  SFLLAVA_HOST_DEVICE int32_t tokens() const { return table[3]; }
  SFLLAVA_HOST_DEVICE int32_t pathways() const { return table[4]; }
  SFLLAVA_HOST_DEVICE int32_t groups() const { return table[5]; }
  SFLLAVA_HOST_DEVICE int32_t items() const { return table[6]; }

  SFLLAVA_HOST_DEVICE Pathway pathway(int32_t i) const {
    const int32_t* p = table + kHeader + i * kPathway;
    return {p[0], p[1], p[2], p[4], bins() + p[3], bins() + p[5]};
  }
  SFLLAVA_HOST_DEVICE int32_t group_begin(int32_t g) const { return table[groups_at() + g]; }
  SFLLAVA_HOST_DEVICE Item item(int32_t i) const {
    const int32_t* p = table + items_at() + i * kItem;
    return {p[0], p[1], p[2], p[3]};
  }

  SFLLAVA_HOST_DEVICE int64_t groups_at() const { return kHeader + int64_t{kPathway} * pathways(); }
  SFLLAVA_HOST_DEVICE int64_t items_at() const { return groups_at() + groups() + 1; }
  SFLLAVA_HOST_DEVICE int64_t bins_at() const { return items_at() + int64_t{kItem} * items(); }
  SFLLAVA_HOST_DEVICE const Bin* bins() const { return reinterpret_cast<const Bin*>(table + bins_at()); }
};

// The token box (row bin r, column bin c) of an item, and how many elements a mean divides by.
SFLLAVA_HOST_DEVICE inline int64_t token_row(const Item& item, const Pathway& path, int32_t r, int32_t c) {
  return int64_t{item.first_token} + int64_t{r} * path.cols + c;
}

// Null if every index in the table stays inside itself, the features and the output; else what is wrong.
const char* check_plan(const int32_t* table, int64_t size, int64_t frames, int64_t patches, int64_t tokens);

}  // namespace sfllava
