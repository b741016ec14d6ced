// The backward kernels' bodies: every patch's gradient is written once. A patch adds what its tokens hand it in the order
// of the tokens, in float32 from zero, and rounds once: equal to the reference bit for bit.
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

// What a mean over a box hands to each of its elements.
template <class Column>
SFLLAVA_HOST_DEVICE Sums<kMean, Column::N> share(const Column& column, int64_t token, int32_t frames, int32_t rows,
                                                 int32_t cols) {
  Sums<kMean, Column::N> sums(column.grad(token));
  sums.finish(frames, rows, cols);
  return sums;
}

// One fine box of a tile: its elements' gradients from those of its tokens, one per fine item, and of the tile's.
template <class Shape, class Column>
class SpreadBox {
  using T = typename Column::T;
  static constexpr int N = Column::N;
  static constexpr int kElements = Shape::kBoxHeight * Shape::kBoxWidth;
  static constexpr bool kChooses = Shape::kReduce == kMax && kElements > 1;

 public:
  // `from`: the box's first patch among the features; `to`: among the gradients.
  SFLLAVA_HOST_DEVICE SpreadBox(const Column& column, const Nest& nest, const T* from, int64_t to)
      : column_(column), grid_width_(nest.grid_width), from_(from), to_(to) {}

  SFLLAVA_HOST_DEVICE void run(const Plan& plan, const FrameItems& items, int64_t box,
                               const Sums<kMean, N>& coarse, bool coarse_first) const {
    Gradient<N> gradient[kElements];
    if (coarse_first) add_to_all(gradient, coarse);
    if constexpr (kChooses) {
      if (items.fine_begin < items.fine_end) add_to_winners(gradient, plan, items, box, find_winner());
    } else {
      SFLLAVA_KEEP_LOOP
      for (int32_t i = items.fine_begin; i < items.fine_end; ++i) {
        add_to_all(gradient, share(column_, plan.first_token(i) + box, 1, Shape::kBoxHeight, Shape::kBoxWidth));
      }
    }
    if (!coarse_first) add_to_all(gradient, coarse);
    SFLLAVA_UNROLL
    for (int e = 0; e < kElements; ++e) column_.spread(to_ + step(e), gradient[e].template rounded<T>());
  }

 private:
  SFLLAVA_HOST_DEVICE int64_t step(int e) const {
    return int64_t{e / Shape::kBoxWidth} * grid_width_ + e % Shape::kBoxWidth;
  }

  SFLLAVA_HOST_DEVICE static void add_to_all(Gradient<N> (&gradient)[kElements], const Sums<kMean, N>& mean) {
    SFLLAVA_UNROLL
    for (int e = 0; e < kElements; ++e) gradient[e].add(mean);
  }

  SFLLAVA_HOST_DEVICE Winner<N> find_winner() const {
    Pack<T, N> patch[kElements];
    SFLLAVA_UNROLL
    for (int e = 0; e < kElements; ++e) patch[e] = load<N>(from_ + step(e) * column_.patch_stride());
    Winner<N> winner(patch[0]);
    SFLLAVA_UNROLL
    for (int e = 1; e < kElements; ++e) winner.take(patch[e], e);
    return winner;
  }

  SFLLAVA_HOST_DEVICE void add_to_winners(Gradient<N> (&gradient)[kElements], const Plan& plan,
                                          const FrameItems& items, int64_t box, const Winner<N>& winner) const {
    SFLLAVA_KEEP_LOOP
    for (int32_t i = items.fine_begin; i < items.fine_end; ++i) {
      const Pack<T, N> grad = column_.grad(plan.first_token(i) + box);
      SFLLAVA_UNROLL
      for (int e = 0; e < kElements; ++e) gradient[e].add_where(winner, e, grad);
    }
  }

  const Column& column_;
  int32_t grid_width_;
  const T* from_;
  int64_t to_;
};

// A tile of one frame, for both pathways.
template <class Shape, class Column>
SFLLAVA_HOST_DEVICE void spread_tile(const Launch& launch, const Tile& tile, const Column& column) {
  const Nest& nest = launch.nest;
  constexpr int kBoxes = Shape::kWidth / Shape::kBoxWidth;
  const FrameItems items = find_items(launch.plan, nest, tile.frame);
  const int64_t coarse_box = launch.plan.first_token(items.coarse) + coarse_token(nest, tile);
  const Sums<kMean, Column::N> coarse = share(column, coarse_box, 1, nest.height, nest.width);
  const int64_t patch = first_patch(nest, tile), step = int64_t{nest.grid_width} * Shape::kBoxHeight;
  const auto* from = column.patch(tile.frame, patch);
  int64_t to = int64_t{tile.frame} * launch.plan.patches() + patch;
  const int32_t strips = nest.height / Shape::kBoxHeight;
  SFLLAVA_KEEP_LOOP
  for (int32_t row = 0; row < strips; ++row, from += step * column.patch_stride(), to += step) {
    const int64_t first_box = fine_token(nest, tile, strips, kBoxes, row);
    SFLLAVA_UNROLL
    for (int b = 0; b < kBoxes; ++b) {
      const int col = b * Shape::kBoxWidth;
      const SpreadBox<Shape, Column> box(column, nest, from + col * column.patch_stride(), to + col);
      box.run(launch.plan, items, first_box + b, coarse, nest.coarse < nest.fine);
    }
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

// Adds what the token of an item's box (row bin, column bin) hands to the box's element at `place`.
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
