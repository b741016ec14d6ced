// The pooling algorithm, once for every instruction set and dtype.
//
// Memory is the limit, so everything here is about how patches stream in. Bins of a pathway are taken side by
// side and patches several at a time, which keeps a handful of long sequential streams in flight; the running
// sums stay in a buffer that fits the first-level cache. Elements enter a box in (frame, row, column) order,
// which makes every result equal to the reference bit for bit.
#pragma once

#include <type_traits>

#include "line.h"
#include "pool.h"

namespace sfllava::cpu {

// Streams of 64-byte lines read at once, and bytes of running sums held at once: measured, bench/README.md.
constexpr int kStreams = 6;
constexpr int64_t kSumBytes = 16 * 1024;
constexpr int kMaxBins = 4;

// Floats from one bin's running sums to the next: whole lines, and two more, or rows of a power of two of channels
// would all meet in one set of the cache.
inline int64_t sum_stride(int64_t channels) { return (channels + 31) / 32 * 32 + 32; }

struct Band {
  const Pathway& path;
  const Item& item;
  int32_t row_bin;
};

// `Line` holds 64 bytes of T as floats: load, store, add, and so on (line_*.h).
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

  // All tokens of one row bin of one item.
  void pool(const Band& band) const {
    if (band.path.reduce == kMax) {
      side_by_side<4>(band, [&](auto bins, int32_t c) { pool_bins<kMax, bins()>(band, c); });
    } else {
      side_by_side<4>(band, [&](auto bins, int32_t c) { pool_bins<kMean, bins()>(band, c); });
    }
  }

  // The same for a mean whose boxes hold whole pairs of `fine`, and the tokens of those pairs from the same read.
  // Two bins at most: with more streams of stores than that, they cost more than they save.
  void pool_with_pairs(const Band& band, const Pathway& fine, const Item& fine_item) const {
    if (fine.reduce == kMax) {
      side_by_side<2>(band, [&](auto bins, int32_t c) { pool_pairs<kMax, bins()>(band, c, fine, fine_item); });
    } else {
      side_by_side<2>(band, [&](auto bins, int32_t c) { pool_pairs<kMean, bins()>(band, c, fine, fine_item); });
    }
  }

 private:
  static int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }

  // Calls body(number of bins, first bin) over the columns of a band, as many bins at once as their sums allow.
  template <int kMost, class Body>
  void side_by_side(const Band& band, const Body& body) const {
    const int64_t fit = kSumBytes / (p_.channels * static_cast<int64_t>(sizeof(float)));
    int32_t c = 0;
    for (; kMost >= 4 && fit >= 4 && c + 4 <= band.path.cols; c += 4) body(std::integral_constant<int, 4>(), c);
    for (; fit >= 2 && c + 2 <= band.path.cols; c += 2) body(std::integral_constant<int, 2>(), c);
    for (; c < band.path.cols; ++c) body(std::integral_constant<int, 1>(), c);
  }

  const T* patch(int64_t frame, const Pathway& path, int32_t row, int32_t col) const {
    return in_ + frame * p_.frame_stride + (int64_t{row} * path.width + col) * p_.patch_stride;
  }

  T* token(const Item& item, const Pathway& path, int32_t row_bin, int32_t col_bin) const {
    return out_ + token_row(item, path, row_bin, col_bin) * p_.token_stride;
  }

  // Calls body(first channel, channels in this line): whole lines, then what is left.
  template <class Body>
  void for_lines(const Body& body) const {
    int64_t d = 0;
    for (; d + Line::kSize <= p_.channels; d += Line::kSize) body(d, Line::whole());
    if (d < p_.channels) body(d, Line::part(static_cast<int>(p_.channels - d)));
  }

  template <Reduce R, int kBins>
  void pool_bins(const Band& band, int32_t first) const {
    constexpr int32_t kStep = kStreams / kBins;
    const Bin rows = band.path.row[band.row_bin];
    const Bin* cols = band.path.col + first;
    const int32_t width = widest(cols, kBins);
    bool fresh = true;
    for (int64_t t = band.item.frame_begin; t < band.item.frame_end; ++t) {
      for (int32_t r = rows.start; r < rows.stop; ++r) {
        for (int32_t at = 0; at < width; at += kStep) {
          const T* from[kBins];
          int32_t count[kBins];
          for (int b = 0; b < kBins; ++b) {
            from[b] = patch(t, band.path, r, cols[b].start + at);
            count[b] = smaller(kStep, cols[b].size() - at);
          }
          bool full = true;
          for (int b = 0; b < kBins; ++b) full = full && count[b] == kStep;
          if (full) {
            add_patches<R, kBins, kStep>(from, count, fresh);
          } else {
            add_patches<R, kBins, 0>(from, count, fresh);
          }
          fresh = false;
        }
      }
    }
    for (int b = 0; b < kBins; ++b) finish<R>(band, first + b, sums_ + b * sum_stride_);
  }

  // The first patches from from[b] join the sums of bin b: kCount of them, or count[b] where kCount is 0.
  template <Reduce R, int kBins, int kCount>
  void add_patches(const T* const (&from)[kBins], const int32_t (&count)[kBins], bool fresh) const {
    const int64_t stride = p_.patch_stride;
    for_lines([=, sums = sums_, sum_stride = sum_stride_](int64_t d, auto width) {
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

  template <Reduce R, int kBins>
  void pool_pairs(const Band& band, int32_t first, const Pathway& fine, const Item& fine_item) const {
    const Bin rows = band.path.row[band.row_bin];
    const Bin* cols = band.path.col + first;
    for (int32_t r = rows.start; r < rows.stop; ++r) {
      for (int32_t at = 0; at < cols[0].size(); at += 2) {
        const T* from[kBins];
        T* to[kBins];
        for (int b = 0; b < kBins; ++b) {
          from[b] = patch(band.item.frame_begin, band.path, r, cols[b].start + at);
          to[b] = token(fine_item, fine, r, (cols[b].start + at) / 2);
        }
        add_pairs<R, kBins>(from, to, r == rows.start && at == 0);
      }
    }
    for (int b = 0; b < kBins; ++b) finish<kMean>(band, first + b, sums_ + b * sum_stride_);
  }

  // The two patches from from[b] join the sums of bin b, and their own pooling goes to to[b].
  template <Reduce R, int kBins>
  void add_pairs(const T* const (&from)[kBins], T* const (&to)[kBins], bool fresh) const {
    const int64_t stride = p_.patch_stride;
    for_lines([=, sums = sums_, sum_stride = sum_stride_, stream = p_.stream](int64_t d, auto width) {
#pragma GCC unroll 2
      for (int b = 0; b < kBins; ++b) {
        const Line left = Line::load(from[b] + d, width);
        const Line right = Line::load(from[b] + stride + d, width);
        float* sum = sums + b * sum_stride + d;
        Line acc = fresh ? Line::template start<kMean>() : Line::load_sums(sum);
        acc.template take<kMean>(left);
        acc.template take<kMean>(right);
        acc.store_sums(sum);
        Line pair = Line::template start<R>();
        pair.template take<R>(left);
        pair.template take<R>(right);
        if (R == kMean) pair.divide(2.0f);
        pair.template store<R>(to[b] + d, width, stream);
      }
    });
  }

  static int32_t widest(const Bin* cols, int32_t bins) {
    int32_t width = 0;
    for (int32_t b = 0; b < bins; ++b) width = cols[b].size() > width ? cols[b].size() : width;
    return width;
  }

  template <Reduce R>
  void finish(const Band& band, int32_t col_bin, const float* sums) const {
    T* to = token(band.item, band.path, band.row_bin, col_bin);
    const float frames = static_cast<float>(band.item.frame_end - band.item.frame_begin);
    const float rows = static_cast<float>(band.path.row[band.row_bin].size());
    const float cols = static_cast<float>(band.path.col[col_bin].size());
    for_lines([&](int64_t d, auto width) {
      Line acc = Line::load_sums(sums + d);
      if (R == kMean) {
        if (frames != 1.0f) acc.divide(frames);
        acc.divide(rows);
        acc.divide(cols);
      }
      acc.template store<R>(to + d, width, p_.stream);
    });
  }

  const Pooling& p_;
  const T* in_;
  T* out_;
  float* sums_;
  int64_t sum_stride_;
};

}  // namespace sfllava::cpu
