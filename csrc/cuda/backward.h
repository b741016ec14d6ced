// The backward kernels' bodies: every patch's gradient is written once. A patch adds the shares of its tokens in the
// order of the tokens, in float32 from zero, and rounds once: equal to the reference bit for bit.
#pragma once

#include "column.h"
#include "shapes.h"

namespace sfllava::gpu {

// Which element of a box its maximum came from, by channel: the first of equals, or the last NaN.
template <int N>
class Winner {
 public:
  template <class T>
  SFLLAVA_HOST_DEVICE explicit Winner(const Pack<T, N>& first) {
    SFLLAVA_UNROLL
    for (int i = 0; i < N; ++i) best_[i] = to_float(first.get(i)), which_[i] = 0;
  }

  template <class T>
  SFLLAVA_HOST_DEVICE void take(const Pack<T, N>& pack, int32_t element) {
    SFLLAVA_UNROLL
    for (int i = 0; i < N; ++i) {
      const float x = to_float(pack.get(i));
      if (x > best_[i] || x != x) best_[i] = x, which_[i] = element;
    }
  }
  SFLLAVA_HOST_DEVICE bool is(int i, int32_t element) const { return which_[i] == element; }

 private:
  float best_[N];
  int32_t which_[N];
};

// A patch's gradient in progress.
template <int N>
class Gradient {
 public:
  SFLLAVA_HOST_DEVICE Gradient() {
    SFLLAVA_UNROLL
    for (int i = 0; i < N; ++i) x_[i] = 0.0f;
  }

  template <class T>
  SFLLAVA_HOST_DEVICE void add(const Pack<T, N>& grad) {
    SFLLAVA_UNROLL
    for (int i = 0; i < N; ++i) x_[i] = gpu::add(x_[i], to_float(grad.get(i)));
  }
  SFLLAVA_HOST_DEVICE void add(const Sums<kMean, N>& mean) {
    SFLLAVA_UNROLL
    for (int i = 0; i < N; ++i) x_[i] = gpu::add(x_[i], mean.get(i));
  }
  SFLLAVA_HOST_DEVICE void add(const Sums<kMean, N>& mean, float weight) {
    SFLLAVA_UNROLL
    for (int i = 0; i < N; ++i) x_[i] = gpu::add(x_[i], multiply(mean.get(i), weight));
  }
  template <class T>
  SFLLAVA_HOST_DEVICE void add_where(const Winner<N>& winner, int32_t element, const Pack<T, N>& grad) {
    SFLLAVA_UNROLL
    for (int i = 0; i < N; ++i) {
      if (winner.is(i, element)) x_[i] = gpu::add(x_[i], to_float(grad.get(i)));
    }
  }

  template <class T>
  SFLLAVA_HOST_DEVICE Pack<T, N> rounded() const {
    return round_pack<T>(x_);
  }

 private:
  float x_[N];
};

// The share of each element of a mean's box.
template <class Column>
SFLLAVA_HOST_DEVICE Sums<kMean, Column::N> share(const Column& column, int64_t token, int32_t frames, int32_t rows,
                                                 int32_t cols) {
  Sums<kMean, Column::N> sums(column.grad(token));
  sums.finish(frames, rows, cols);
  return sums;
}

// A row of fine boxes across a tile: their elements' gradients from those of their tokens and of the tile's. All
// loads are issued before the first number is used.
template <class Shape, class Column>
class SpreadStrip {
  using T = typename Column::T;
  static constexpr int N = Column::N;
  static constexpr int kElements = Shape::kBoxHeight * Shape::kBoxWidth;
  static constexpr bool kChooses = Shape::kReduce == kMax && kElements > 1;
  using Gradients = Gradient<N>[kElements];

 public:
  static constexpr int kBoxes = Shape::kWidth / Shape::kBoxWidth;

  // `from`: the strip's first patch; `token`: its first box's, in the first of the frame's fine items.
  SFLLAVA_HOST_DEVICE SpreadStrip(const Column& column, int32_t grid_width, const T* from, bool has_fine, int64_t token)
      : grid_width_(grid_width) {
    if (!has_fine) return;
    SFLLAVA_UNROLL
    for (int b = 0; b < kBoxes; ++b) {
      SFLLAVA_UNROLL
      for (int e = 0; kChooses && e < kElements; ++e) {
        patch_[b][e] = column.read(from + place(b, e) * column.patch_stride());
      }
    }
    SFLLAVA_UNROLL
    for (int b = 0; b < kBoxes; ++b) grad_[b] = column.grad(token + b);
  }

  // `box`: the strip's first in an item; `to`: its first patch, counted through all frames.
  SFLLAVA_HOST_DEVICE void write(const Column& column, const Plan& plan, const FrameItems& items, int64_t box,
                                 const Sums<kMean, N>& coarse, bool coarse_first, int64_t to) const {
    SFLLAVA_UNROLL
    for (int b = 0; b < kBoxes; ++b) {
      Gradients gradient;
      if (coarse_first) add_to_all(gradient, coarse);
      if (items.fine_begin < items.fine_end) add_fine(gradient, b, grad_[b]);
      SFLLAVA_KEEP_LOOP
      for (int32_t i = items.fine_begin + 1; i < items.fine_end; ++i) {  // of a frame that is taken several times
        add_fine(gradient, b, column.grad(plan.first_token(i) + box + b));
      }
      if (!coarse_first) add_to_all(gradient, coarse);
      SFLLAVA_UNROLL
      for (int e = 0; e < kElements; ++e) column.spread(to + place(b, e), gradient[e].template rounded<T>());
    }
  }

 private:
  // An element of a box, counted from the strip's first patch.
  SFLLAVA_HOST_DEVICE int64_t place(int b, int e) const {
    return int64_t{e / Shape::kBoxWidth} * grid_width_ + b * Shape::kBoxWidth + e % Shape::kBoxWidth;
  }

  SFLLAVA_HOST_DEVICE static void add_to_all(Gradients& gradient, const Sums<kMean, N>& mean) {
    SFLLAVA_UNROLL
    for (int e = 0; e < kElements; ++e) gradient[e].add(mean);
  }

  SFLLAVA_HOST_DEVICE void add_fine(Gradients& gradient, int b, const Pack<T, N>& grad) const {
    if constexpr (kChooses) {
      Winner<N> winner(patch_[b][0]);
      SFLLAVA_UNROLL
      for (int e = 1; e < kElements; ++e) winner.take(patch_[b][e], e);
      SFLLAVA_UNROLL
      for (int e = 0; e < kElements; ++e) gradient[e].add_where(winner, e, grad);
    } else {
      Sums<kMean, N> mean(grad);
      mean.template finish<Shape::kBoxHeight, Shape::kBoxWidth>();
      add_to_all(gradient, mean);
    }
  }

  int32_t grid_width_;
  Pack<T, N> patch_[kBoxes][kElements], grad_[kBoxes];
};

// Strips [row, end) of a tile of one frame, for both pathways.
template <class Shape, class Column>
SFLLAVA_HOST_DEVICE void spread_strips(const Launch& launch, const Tile& tile, const Column& column, int32_t row,
                                       int32_t end) {
  using Strip = SpreadStrip<Shape, Column>;
  const Nest& nest = launch.nest;
  const Plan& plan = launch.plan;
  const FrameItems items = find_items(plan, nest, tile.frame);
  const int64_t coarse_box = plan.first_token(items.coarse) + coarse_token(nest, tile);
  const bool has_fine = items.fine_begin < items.fine_end;
  const int64_t fine = has_fine ? plan.first_token(items.fine_begin) : 0;
  const int64_t step = int64_t{nest.grid_width} * Shape::kBoxHeight, patch = first_patch(nest, tile) + row * step;
  const auto* from = column.patch(tile.frame, patch);
  int64_t to = int64_t{tile.frame} * plan.patches() + patch;
  const Sums<kMean, Column::N> coarse = share(column, coarse_box, 1, nest.height, nest.width);
  SFLLAVA_KEEP_LOOP
  for (; row < end; ++row, from += step * column.patch_stride(), to += step) {
    const int64_t box = fine_token(nest, tile, nest.height / Shape::kBoxHeight, Strip::kBoxes, row);
    const Strip strip(column, nest.grid_width, from, has_fine, fine + box);
    strip.write(column, plan, items, box, coarse, nest.coarse < nest.fine, to);
  }
}

// Which patch of the item's box (row bin, column bin), counted from its first, the maximum came from.
template <class Column>
SFLLAVA_HOST_DEVICE Winner<Column::N> find_winner(const Column& column, const Item& item, const Pathway& path,
                                                  int32_t row_bin, int32_t col_bin) {
  const Bin rows = path.row[row_bin], cols = path.col[col_bin];
  const int32_t size = (item.frame_end - item.frame_begin) * rows.size() * cols.size();
  BoxWalk walk(item, path, rows, cols);
  const auto next = [&] {
    const auto patch = load<Column::N>(column.patch(walk.frame, walk.patch));
    walk.next();
    return patch;
  };
  Winner<Column::N> winner(next());
  for (int32_t e = 1; e < size; ++e) winner.take(next(), e);
  return winner;
}

// A patch on the grid of a pathway.
struct Place {
  int32_t frame, row, col;
};

// Adds the share that the element at `place` has in the token of an item's box (row bin, column bin).
template <class Column>
SFLLAVA_HOST_DEVICE void add_share(const Column& column, const Plan& plan, const Item& item, const Place& place,
                                   int32_t row_bin, int32_t col_bin, Gradient<Column::N>& gradient) {
  const Pathway path = plan.pathway(item.pathway);  // read again for every token: kept, it costs too many registers
  const Bin rows = path.row[row_bin], cols = path.col[col_bin];
  const int64_t token = token_row(item, path, row_bin, col_bin);
  const int32_t frame = place.frame - item.frame_begin, row = place.row - rows.start, col = place.col - cols.start;
  if (path.reduce == kMax) {
    const int32_t element = (frame * rows.size() + row) * cols.size() + col;
    gradient.add_where(find_winner(column, item, path, row_bin, col_bin), element, column.grad(token));
    return;
  }
  const bool linear = path.reduce == kLinear;
  const float weight = linear ? LinearBox(path, row_bin, col_bin).weight(row, col) : 1.0f;
  const int32_t frames = item.frame_end - item.frame_begin;
  gradient.add(share(column, token, frames, linear ? 1 : rows.size(), linear ? 1 : cols.size()), weight);
}

// One patch, given by its number through all frames, from every token whose box holds it.
template <class Column>
SFLLAVA_HOST_DEVICE void spread_patch(const Launch& launch, int32_t unit, const Column& column) {
  const Plan& plan = launch.plan;
  const int32_t frame = unit / plan.patches(), patch = unit - frame * plan.patches();
  Gradient<Column::N> gradient;
  for (int32_t i = plan.reader_begin(frame); i < plan.reader_begin(frame + 1); ++i) {
    const Item item = plan.item(plan.reader(i));
    const Pathway path = plan.pathway(item.pathway);
    const int32_t on_grid = patch - path.first_patch;
    if (on_grid < 0 || on_grid >= path.height * path.width) continue;
    const int32_t row = on_grid / path.width, col = on_grid - row * path.width;
    const Bin row_bins = path.row_cover[row], col_bins = path.col_cover[col];
    for (int32_t r = row_bins.start; r < row_bins.stop; ++r) {
      for (int32_t c = col_bins.start; c < col_bins.stop; ++c) {
        add_share(column, plan, item, {frame, row, col}, r, c, gradient);
      }
    }
  }
  column.spread(unit, gradient.template rounded<typename Column::T>());
}

}  // namespace sfllava::gpu
