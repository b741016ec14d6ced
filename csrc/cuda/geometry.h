// Which GPU thread reads and writes what. Host and device code: the C++ tests walk every thread on the CPU.
//
// A launch is cut into units, and every unit into lanes along the channels. On the tile path a unit is one tile of
// one frame: a box of the coarse pathway, and all boxes of the fine one that nest in it. On the box path it is a
// share of the boxes of one group of items; in a backward, one patch of one frame.
#pragma once

#include "sfllava/plan.h"

namespace sfllava::gpu {

constexpr int32_t kWarp = 32;
constexpr int32_t kBlockWarps = 4;  // unless tuned otherwise
constexpr int32_t kPackBytes = 16;  // the widest load

// Blocks of `across` lanes (along the channels) x `down` units.
struct Grid {
  int64_t blocks;
  int32_t across, down;
  int32_t chunks;  // blocks along the channels

  bool launchable() const { return blocks <= INT32_MAX && blocks * down <= INT32_MAX; }
};

struct Lane {
  int32_t unit;
  int64_t vector;  // along the channels
};

inline Grid make_grid(int64_t units, int64_t vectors, int32_t block_warps = kBlockWarps) {
  const int64_t warps = (vectors + kWarp - 1) / kWarp, chunks = (warps + block_warps - 1) / block_warps;
  const int32_t wide = static_cast<int32_t>((warps + chunks - 1) / chunks), down = block_warps / wide;
  return {(units + down - 1) / down * chunks, wide * kWarp, down, static_cast<int32_t>(chunks)};
}

// Blocks of one unit lie next to each other. A lane may lie past the last unit or the last vector.
SFLLAVA_HOST_DEVICE inline Lane find_lane(const Grid& grid, uint32_t block, uint32_t x, uint32_t y) {
  const uint32_t chunks = static_cast<uint32_t>(grid.chunks), row = block / chunks;
  return {static_cast<int32_t>(row * static_cast<uint32_t>(grid.down) + y),
          int64_t{block - row * chunks} * grid.across + x};
}

// A layout of two pathways on single frames: a mean over equal boxes, the tiles, and another whose small
// equal boxes nest in them, both on one grid from patch 0 on. Each group holds one frame's items in the order of their
// tokens, the coarse one at one end.
struct Nest {
  int32_t coarse, fine;  // pathways
  int32_t fine_reduce;
  int32_t grid_width;                // patches of a frame's row
  int32_t coarse_pitch, fine_pitch;  // tokens from one row to the next
  int32_t rows, cols;                // tiles of a frame
  int32_t height, width;             // patches of a tile
  int32_t box_height, box_width;     // patches of a fine box
  uint32_t first_frames, frames;     // those that come first are i * frames / first_frames; 0: none does

  SFLLAVA_HOST_DEVICE int32_t tiles() const { return rows * cols; }
  // Whether the tiles leave no patch of a frame out.
  bool covers(int32_t patches) const {
    return cols * width == grid_width && int64_t{rows} * height * grid_width == patches;
  }
};

struct Tile {
  int32_t frame, row, col;
};

// The n-th frame in the order of the work: after the first frames come those between them, whose numbers are a sequence
// of the same kind (Beatty's, and its complement).
SFLLAVA_HOST_DEVICE inline int32_t nth_frame(const Nest& nest, int32_t n) {
  const uint32_t first = nest.first_frames, frames = nest.frames, others = frames - first, i = static_cast<uint32_t>(n);
  if (first == 0) return n;
  return static_cast<int32_t>(i < first ? i * frames / first : ((i - first + 1) * frames + others - 1) / others - 1);
}

SFLLAVA_HOST_DEVICE inline Tile find_tile(const Nest& nest, int32_t unit) {
  const uint32_t cols = static_cast<uint32_t>(nest.cols), row = static_cast<uint32_t>(unit) / cols;
  const uint32_t rows = static_cast<uint32_t>(nest.rows), frame = row / rows;
  return {static_cast<int32_t>(frame), static_cast<int32_t>(row - frame * rows),
          static_cast<int32_t>(static_cast<uint32_t>(unit) - row * cols)};
}

// The tile's first patch in its frame.
SFLLAVA_HOST_DEVICE inline int64_t first_patch(const Nest& nest, const Tile& tile) {
  return int64_t{tile.row} * nest.height * nest.grid_width + int64_t{tile.col} * nest.width;
}

// The tile's token in the coarse item.
SFLLAVA_HOST_DEVICE inline int64_t coarse_token(const Nest& nest, const Tile& tile) {
  return int64_t{tile.row} * nest.coarse_pitch + tile.col;
}

// The token, in a fine item, of the tile's box (row, 0); a tile holds `high` x `wide` boxes.
SFLLAVA_HOST_DEVICE inline int64_t fine_token(const Nest& nest, const Tile& tile, int32_t high, int32_t wide,
                                              int32_t row) {
  return (int64_t{tile.row} * high + row) * nest.fine_pitch + int64_t{tile.col} * wide;
}

// The items of a frame.
struct FrameItems {
  int32_t coarse, fine_begin, fine_end;
};

SFLLAVA_HOST_DEVICE inline FrameItems find_items(const Plan& plan, const Nest& nest, int32_t frame) {
  const int32_t begin = plan.group_begin(frame), end = plan.group_begin(frame + 1);
  if (nest.coarse < nest.fine) return {begin, begin + 1, end};
  return {end - 1, begin, end - 1};
}

// Whether a checked plan nests, and how.
bool find_nest(const Plan& plan, Nest* nest);

// The units of one group on the box path: enough that the second pathway to read a frame finds it in the cache (few
// frames in flight at once) and that few groups fill a device, but no more than there are boxes.
constexpr int64_t kLeastShares = 32, kLeastBlocks = 4096;

inline int32_t count_shares(const Plan& plan, int64_t vectors) {
  int64_t boxes = 0;
  for (int32_t i = 0; i < plan.pathways(); ++i) boxes += int64_t{plan.pathway(i).rows} * plan.pathway(i).cols;
  const int64_t per_share = make_grid(plan.groups(), vectors).blocks;
  const int64_t filling = (kLeastBlocks + per_share - 1) / per_share;
  const int64_t wanted = filling > kLeastShares ? filling : kLeastShares;
  return static_cast<int32_t>(wanted < boxes ? wanted : boxes);
}

// Calls body(item, row bin, column bin) for every box of the unit's share, in the order of the items.
template <class Body>
SFLLAVA_HOST_DEVICE void for_boxes(const Plan& plan, int32_t shares, int32_t unit, const Body& body) {
  const int32_t group = unit / shares, end = plan.group_begin(group + 1);
  uint32_t box = static_cast<uint32_t>(unit - group * shares);  // fewer than 2^31: a box is a token
  for (int32_t i = plan.group_begin(group); i < end; ++i) {
    const Item item = plan.item(i);
    const Pathway path = plan.pathway(item.pathway);
    const uint32_t cols = static_cast<uint32_t>(path.cols), boxes = static_cast<uint32_t>(path.rows) * cols;
    for (; box < boxes; box += static_cast<uint32_t>(shares)) {
      const uint32_t row = box / cols;
      body(item, static_cast<int32_t>(row), static_cast<int32_t>(box - row * cols));
    }
    box -= boxes;
  }
}

// The patches of a box, one by one, in (frame, row, column) order.
struct BoxWalk {
  int32_t frame, patch;
  int32_t row_end;  // past the row's last patch
  int32_t width, cols, first_end, last_end;

  SFLLAVA_HOST_DEVICE BoxWalk(const Item& item, const Pathway& path, Bin row_bin, Bin col_bin)
      : frame(item.frame_begin),
        patch(static_cast<int32_t>(path.patch(row_bin.start, col_bin.start))),
        row_end(patch + col_bin.size()),
        width(path.width),
        cols(col_bin.size()),
        first_end(row_end),
        last_end(row_end + (row_bin.size() - 1) * path.width) {}

  SFLLAVA_HOST_DEVICE void next() {
    if (++patch < row_end) return;
    if (row_end < last_end) {
      row_end += width;
    } else {
      row_end = first_end;
      ++frame;
    }
    patch = row_end - cols;
  }
};

}  // namespace sfllava::gpu
