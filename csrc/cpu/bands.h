// The pooling algorithm, once for every instruction set and dtype.
//
// Memory is the limit, so everything here is about how patches stream in: a few long sequential streams at once
// keep more reads in flight than one, or than many short ones. So bins that lie below each other are pooled side
// by side, each walking its rows from left to right, several patches at a time; their running sums stay in the
// cache. Elements enter a box in (frame, row, column) order, which makes every result equal to the reference bit
// for bit.
#pragma once

#include <type_traits>

#include "line.h"
#include "pool.h"
#include "sfllava/linear.h"

namespace sfllava::cpu {

constexpr int kStreams = 6;                 // patches read at once
constexpr int kBandRows = 4;                // row bins side by side, at most
constexpr int64_t kHotBytes = 32 * 1024;    // sums written at once: a first-level cache
constexpr int64_t kWarmBytes = 256 * 1024;  // all sums in progress: half of a second-level cache

// Floats from one bin's running sums to the next: whole lines, and two more, or rows of a power of two of channels
// would all meet in one set of the cache.
inline int64_t sum_stride(int64_t channels) { return (channels + 31) / 32 * 32 + 32; }

// Floats that a thread needs for the sums in progress.
inline int64_t count_sums(int64_t channels) {
  const int64_t warm = kWarmBytes / static_cast<int64_t>(sizeof(float)), least = kBandRows * sum_stride(channels);
  return warm > least ? warm : least;
}

// Row bins [begin, end) of one item.
struct Band {
  const Pathway& path;
  const Item& item;
  int32_t begin, end;
};

// `Line` holds 64 bytes of T as floats: load, store, take, and so on (line.h).
template <class Line>
class Bands {
  using T = typename Line::T;

 public:
  Bands(const Pooling& p, float* sums)
      : p_(p),
        in_(static_cast<const T*>(p.features)),
        out_(static_cast<T*>(p.out)),
        sums_(sums),
        sum_stride_(sum_stride(p.channels)) {}

  // All tokens of a band.
  void pool(const Band& band) const {
    if (band.path.reduce == kMax) {
      side_by_side<4>(band, [&](auto bins, int32_t r) { pool_bins<kMax, bins()>(band, r); });
    } else if (band.path.reduce == kLinear) {
      pool_linear(band);
    } else {
      side_by_side<4>(band, [&](auto bins, int32_t r) { pool_bins<kMean, bins()>(band, r); });
    }
  }

  // The same for a mean whose boxes hold whole pairs of `fine`, and the tokens of those pairs from the same read.
  // Two bins at once: with more streams of stores than that, they cost more than they save.
  void pool_with_pairs(const Band& band, const Pathway& fine, const Item& fine_item) const {
    if (fine.reduce == kMax) {
      side_by_side<2>(band, [&](auto bins, int32_t r) { pool_pairs<kMax, bins()>(band, r, fine, fine_item); });
    } else {
      side_by_side<2>(band, [&](auto bins, int32_t r) { pool_pairs<kMean, bins()>(band, r, fine, fine_item); });
    }
  }

 private:
  static int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }

  // Calls body(number of bins, first row bin) over a band, as many bins at once as their sums allow.
  template <int kMost, class Body>
  void side_by_side(const Band& band, const Body& body) const {
    const int64_t fit = kHotBytes / (p_.channels * static_cast<int64_t>(sizeof(float)));
    int32_t r = band.begin;
    for (; kMost >= 4 && fit >= 4 && r + 4 <= band.end; r += 4) body(std::integral_constant<int, 4>(), r);
    for (; (fit >= 2 || kMost == 2) && r + 2 <= band.end; r += 2) body(std::integral_constant<int, 2>(), r);
    for (; r < band.end; ++r) body(std::integral_constant<int, 1>(), r);
  }

  // Columns of bins whose sums are in progress at once.
  int32_t columns_at_once(int bins) const {
    const int64_t fit = kWarmBytes / (bins * sum_stride_ * static_cast<int64_t>(sizeof(float)));
    return fit > 1 ? static_cast<int32_t>(fit < (1 << 20) ? fit : (1 << 20)) : 1;
  }

  const T* patch(int64_t frame, const Pathway& path, int32_t row, int32_t col) const {
    return in_ + frame * p_.frame_stride + path.patch(row, col) * p_.patch_stride;
  }

  T* token(const Item& item, const Pathway& path, int32_t row_bin, int32_t col_bin) const {
    return out_ + token_row(item, path, row_bin, col_bin) * p_.token_stride;
  }

  float* sums(int32_t bin) const { return sums_ + bin * sum_stride_; }

  // Calls body(first channel, channels in this line): whole lines, then what is left.
  template <class Body>
  void for_lines(const Body& body) const {
    int64_t d = 0;
    for (; d + Line::kSize <= p_.channels; d += Line::kSize) body(d, Line::whole());
    if (d < p_.channels) body(d, Line::part(static_cast<int>(p_.channels - d)));
  }

  template <Reduce R, int kBins>
  void pool_bins(const Band& band, int32_t first) const {
    const int32_t columns = columns_at_once(kBins);
    for (int32_t begin = 0; begin < band.path.cols; begin += columns) {
      const int32_t end = smaller(begin + columns, band.path.cols);
      for (int32_t t = band.item.frame_begin; t < band.item.frame_end; ++t) {
        for (int32_t r = 0; r < tallest(band.path.row + first, kBins); ++r) {
          for (int32_t c = begin; c < end; ++c) pool_row<R, kBins>(band, first, t, r, c, sums((c - begin) * kBins));
        }
      }
      finish<R, kBins>(band, first, begin, end);
    }
  }

  // Row r of each bin in column c.
  template <Reduce R, int kBins>
  void pool_row(const Band& band, int32_t first, int32_t t, int32_t r, int32_t c, float* sums) const {
    constexpr int32_t kStep = kStreams / kBins;
    const Bin* rows = band.path.row + first;
    const Bin col = band.path.col[c];
    for (int32_t at = 0; at < col.size(); at += kStep) {
      const T* from[kBins];
      int32_t count[kBins];
      bool full = true;
      for (int b = 0; b < kBins; ++b) {
        from[b] = patch(t, band.path, rows[b].start + r, col.start + at);
        count[b] = r < rows[b].size() ? smaller(kStep, col.size() - at) : 0;
        full = full && count[b] == kStep;
      }
      const bool fresh = t == band.item.frame_begin && r == 0 && at == 0;
      if (full) {
        add_patches<R, kBins, kStep>(from, count, sums, fresh);
      } else {
        add_patches<R, kBins, 0>(from, count, sums, fresh);
      }
    }
  }

  // The first patches from from[b] join the sums of bin b: kCount of them, or count[b] where kCount is 0.
  template <Reduce R, int kBins, int kCount>
  void add_patches(const T* const (&from)[kBins], const int32_t (&count)[kBins], float* sums, bool fresh) const {
    for_lines([=, stride = p_.patch_stride, sum_stride = sum_stride_](int64_t d, auto width) {
#pragma GCC unroll 4
      for (int b = 0; b < kBins; ++b) {
        float* sum = sums + b * sum_stride + d;
        Line acc = fresh ? Line::template start<R>() : Line::load_sums(sum);
        const T* x = from[b] + d;
        const int32_t patches = kCount ? kCount : count[b];
#pragma GCC unroll 6
        for (int32_t i = 0; i < patches; ++i) acc.template take<R>(Line::load(x + i * stride, width));
        acc.store_sums(sum);
      }
    });
  }

  // A box's four patches of a frame, at most, are streams enough, and their sum stays in registers.
  void pool_linear(const Band& band) const {
    for (int32_t r = band.begin; r < band.end; ++r) {
      for (int32_t c = 0; c < band.path.cols; ++c) pool_linear_box(band, r, c);
    }
  }

  void pool_linear_box(const Band& band, int32_t row_bin, int32_t col_bin) const {
    const Bin rows = band.path.row[row_bin], cols = band.path.col[col_bin];
    const LinearBox box(band.path, row_bin, col_bin);
    const T* from[4];
    float weight[4];
    int count = 0;
    for (int32_t r = rows.start; r < rows.stop; ++r) {
      for (int32_t c = cols.start; c < cols.stop; ++c, ++count) {
        from[count] = patch(band.item.frame_begin, band.path, r, c);
        weight[count] = box.weight(r, c);
      }
    }
    const int32_t frames = band.item.frame_end - band.item.frame_begin;
    T* to = token(band.item, band.path, row_bin, col_bin);
    for_lines([&](int64_t d, auto width) {
      Line acc = Line::template start<kLinear>();
      for (int32_t t = 0; t < frames; ++t) {
        for (int i = 0; i < count; ++i) {
          acc.take_weighted(Line::load(from[i] + t * p_.frame_stride + d, width), weight[i]);
        }
      }
      if (frames != 1) acc.divide(static_cast<float>(frames));
      acc.template store<kLinear>(to + d, width, p_.stream);
    });
  }

  template <Reduce R, int kBins>
  void pool_pairs(const Band& band, int32_t first, const Pathway& fine, const Item& fine_item) const {
    const int32_t columns = columns_at_once(kBins);
    const Bin* rows = band.path.row + first;
    for (int32_t begin = 0; begin < band.path.cols; begin += columns) {
      const int32_t end = smaller(begin + columns, band.path.cols);
      for (int32_t r = 0; r < rows[0].size(); ++r) {
        for (int32_t c = begin; c < end; ++c) {
          const Bin col = band.path.col[c];
          for (int32_t at = col.start; at < col.stop; at += 2) {
            const T* from[kBins];
            T* to[kBins];
            for (int b = 0; b < kBins; ++b) {
              from[b] = patch(band.item.frame_begin, band.path, rows[b].start + r, at);
              to[b] = token(fine_item, fine, rows[b].start + r, at / 2);
            }
            add_pairs<R, kBins>(from, to, sums((c - begin) * kBins), r == 0 && at == col.start);
          }
        }
      }
      finish<kMean, kBins>(band, first, begin, end);
    }
  }

  // The two patches from from[b] join the sums of bin b, and their own pooling goes to to[b].
  template <Reduce R, int kBins>
  void add_pairs(const T* const (&from)[kBins], T* const (&to)[kBins], float* sums, bool fresh) const {
    for_lines([=, stride = p_.patch_stride, sum_stride = sum_stride_, stream = p_.stream](int64_t d, auto width) {
#pragma GCC unroll 2
      for (int b = 0; b < kBins; ++b) {
        const Line left = Line::load(from[b] + d, width);
        const Line right = Line::load(from[b] + stride + d, width);
        float* sum = sums + b * sum_stride + d;
        Line acc = fresh ? Line::template start<kMean>() : Line::load_sums(sum);
        acc.template take<kMean>(left);
        acc.template take<kMean>(right);
        acc.store_sums(sum);
        // A maximum starts from its first element; a mean from zero, which turns -0 into 0.
        Line pair = left;
        if (R == kMean) {
          pair = Line::template start<R>();
          pair.template take<R>(left);
        }
        pair.template take<R>(right);
        if (R == kMean) pair.divide(2.0f);
        pair.template store<R>(to[b] + d, width, stream);
      }
    });
  }

  static int32_t tallest(const Bin* rows, int32_t bins) {
    int32_t height = 0;
    for (int32_t b = 0; b < bins; ++b) height = rows[b].size() > height ? rows[b].size() : height;
    return height;
  }

  // Sums become tokens: kBins row bins from `first`, column bins [begin, end).
  template <Reduce R, int kBins>
  void finish(const Band& band, int32_t first, int32_t begin, int32_t end) const {
    const float frames = static_cast<float>(band.item.frame_end - band.item.frame_begin);
    for (int b = 0; b < kBins; ++b) {
      const float rows = static_cast<float>(band.path.row[first + b].size());
      for (int32_t c = begin; c < end; ++c) {
        const float cols = static_cast<float>(band.path.col[c].size());
        const float* from = sums((c - begin) * kBins + b);
        T* to = token(band.item, band.path, first + b, c);
        for_lines([&](int64_t d, auto width) {
          Line acc = Line::load_sums(from + d);
          if (R == kMean) {
            if (frames != 1.0f) acc.divide(frames);
            acc.divide(rows);
            acc.divide(cols);
          }
          acc.template store<R>(to + d, width, p_.stream);
        });
      }
    }
  }

  const Pooling& p_;
  const T* in_;
  T* out_;
  float* sums_;
  int64_t sum_stride_;
};

}  // namespace sfllava::cpu
