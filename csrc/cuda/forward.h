// The forward kernels' bodies: what one lane does. The C++ tests run the same code on the CPU, lane by lane.
//
// A lane adds its patches in (frame, row, column) order, which makes every result equal to the reference bit for bit.
#pragma once

#include "column.h"
#include "shapes.h"

namespace sfllava::gpu {

// One row of fine boxes across the tile: the patches that are in flight at once.
template <class Shape, class Column>
class Strip {
  using T = typename Column::T;
  static constexpr int N = Column::N;

 public:
  static constexpr int kBoxes = Shape::kWidth / Shape::kBoxWidth;

  SFLLAVA_HOST_DEVICE Strip(const Column& column, const T* from, int32_t grid_width) {
    SFLLAVA_UNROLL
    for (int r = 0; r < Shape::kBoxHeight; ++r) {
      const T* row = from + int64_t{r} * grid_width * column.patch_stride();
      SFLLAVA_UNROLL
      for (int c = 0; c < Shape::kWidth; ++c) patch_[r][c] = column.read(row + c * column.patch_stride());
    }
  }

  SFLLAVA_HOST_DEVICE void add_to(Sums<kMean, N>& coarse) const {
    SFLLAVA_UNROLL
    for (int r = 0; r < Shape::kBoxHeight; ++r) {
      SFLLAVA_UNROLL
      for (int c = 0; c < Shape::kWidth; ++c) coarse.take(patch_[r][c]);
    }
  }

  // Every fine item of the frame gets the same rows: fewer frames than slow frames repeat themselves.
  SFLLAVA_HOST_DEVICE void write_boxes(const Column& column, const Plan& plan, const FrameItems& items,
                                       int64_t first_box) const {
    Pack<T, N> pooled[kBoxes];
    SFLLAVA_UNROLL
    for (int b = 0; b < kBoxes; ++b) pooled[b] = pool_box(b);
    SFLLAVA_KEEP_LOOP
    for (int32_t i = items.fine_begin; i < items.fine_end; ++i) {
      const int64_t token = plan.first_token(i) + first_box;
      SFLLAVA_UNROLL
      for (int b = 0; b < kBoxes; ++b) column.write(token + b, pooled[b]);
    }
  }

 private:
  SFLLAVA_HOST_DEVICE Pack<T, N> pool_box(int b) const {
    const int first = b * Shape::kBoxWidth;
    Sums<Shape::kReduce, N> sums(patch_[0][first]);
    SFLLAVA_UNROLL
    for (int r = 0; r < Shape::kBoxHeight; ++r) {
      SFLLAVA_UNROLL
      for (int c = r == 0; c < Shape::kBoxWidth; ++c) sums.take(patch_[r][first + c]);
    }
    sums.template finish<Shape::kBoxHeight, Shape::kBoxWidth>();
    return sums.template rounded<T>();
  }

  Pack<T, N> patch_[Shape::kBoxHeight][Shape::kWidth];
};

// A tile: every patch is read once, for both pathways.
template <class Shape, class Column>
SFLLAVA_HOST_DEVICE void pool_tile(const Launch& launch, const Tile& tile, const Column& column) {
  using Strip = Strip<Shape, Column>;
  const Nest& nest = launch.nest;
  const int64_t step = int64_t{nest.grid_width} * Shape::kBoxHeight * column.patch_stride();
  const auto* from = column.patch(tile.frame, first_patch(nest, tile));
  const int32_t strips = nest.height / Shape::kBoxHeight;
  const FrameItems items = find_items(launch.plan, nest, tile.frame);
  Sums<kMean, Column::N> coarse;
  SFLLAVA_KEEP_LOOP
  for (int32_t row = 0; row < strips; ++row, from += step) {
    const Strip strip(column, from, nest.grid_width);
    strip.add_to(coarse);
    if (items.fine_begin < items.fine_end) {
      strip.write_boxes(column, launch.plan, items, fine_token(nest, tile, strips, Strip::kBoxes, row));
    }
  }
  coarse.finish(1, nest.height, nest.width);
  const int64_t token = launch.plan.first_token(items.coarse) + coarse_token(nest, tile);
  column.write(token, coarse.template rounded<typename Column::T>());
}

// The next kCount patches of a box, read side by side.
template <int kCount, Reduce R, class Column>
SFLLAVA_HOST_DEVICE void take_patches(const Column& column, BoxWalk& walk, Sums<R, Column::N>& sums) {
  Pack<typename Column::T, Column::N> patch[kCount];
  SFLLAVA_UNROLL
  for (int i = 0; i < kCount; ++i) {
    patch[i] = column.read(column.patch(walk.frame, walk.patch));
    walk.next();
  }
  SFLLAVA_UNROLL
  for (int i = 0; i < kCount; ++i) sums.take(patch[i]);
}

template <Reduce R, class Column>
SFLLAVA_HOST_DEVICE void pool_box(const Column& column, const Item& item, const Pathway& path, int32_t row_bin,
                                  int32_t col_bin) {
  const Bin rows = path.row[row_bin], cols = path.col[col_bin];
  const int32_t frames = item.frame_end - item.frame_begin;
  BoxWalk walk(item, path, rows, cols);
  Sums<R, Column::N> sums;
  int64_t left = int64_t{frames} * rows.size() * cols.size();
  for (; left >= 4; left -= 4) take_patches<4>(column, walk, sums);
  if (left & 2) take_patches<2>(column, walk, sums);
  if (left & 1) take_patches<1>(column, walk, sums);
  sums.finish(frames, rows.size(), cols.size());
  column.write(token_row(item, path, row_bin, col_bin), sums.template rounded<typename Column::T>());
}

// A box of at most 2 x 2 patches of a frame, read side by side; what a smaller one lacks is read again, and not taken.
template <class Column>
SFLLAVA_HOST_DEVICE void interpolate_box(const Column& column, const Item& item, const Pathway& path, int32_t row_bin,
                                         int32_t col_bin) {
  const Bin rows = path.row[row_bin], cols = path.col[col_bin];
  const LinearBox box(path, row_bin, col_bin);
  const int64_t down = rows.size() > 1 ? path.width * column.patch_stride() : 0;
  const int64_t right = cols.size() > 1 ? column.patch_stride() : 0;
  Sums<kMean, Column::N> sums;
  SFLLAVA_KEEP_LOOP
  for (int32_t frame = item.frame_begin; frame < item.frame_end; ++frame) {
    const auto* from = column.patch(frame, path.patch(rows.start, cols.start));
    Pack<typename Column::T, Column::N> patch[4];
    SFLLAVA_UNROLL
    for (int i = 0; i < 4; ++i) patch[i] = column.read(from + i / 2 * down + i % 2 * right);
    SFLLAVA_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (i / 2 < rows.size() && i % 2 < cols.size()) sums.take(patch[i], box.weight(i / 2, i % 2));
    }
  }
  sums.finish(item.frame_end - item.frame_begin, 1, 1);
  column.write(token_row(item, path, row_bin, col_bin), sums.template rounded<typename Column::T>());
}

// A unit's share of the boxes of a group.
template <class Column>
SFLLAVA_HOST_DEVICE void pool_share(const Launch& launch, int32_t unit, const Column& column) {
  const auto body = [&](const Item& item, int32_t row_bin, int32_t col_bin) {
    const Pathway path = launch.plan.pathway(item.pathway);  // read again for every box: kept, it would spill
    if (path.reduce == kMax) {
      pool_box<kMax>(column, item, path, row_bin, col_bin);
    } else if (path.reduce == kMean) {
      pool_box<kMean>(column, item, path, row_bin, col_bin);
    } else {
      interpolate_box(column, item, path, row_bin, col_bin);
    }
  };
  for_boxes(launch.plan, launch.shares, unit, body);
}

}  // namespace sfllava::gpu
