// The pooling algorithm, once for every instruction set and dtype.
//
// Memory is the limit, so everything here is about how patches stream in. Bins of a pathway are taken side by
// side and patches several at a time, which keeps a handful of long sequential streams in flight; the running
// sums stay in a buffer that fits the first-level cache. Elements enter a box in (frame, row, column) order,
// which makes every result equal to the reference bit for bit.
#pragma once

#include "line.h"
#include "pool.h"

namespace sfllava::cpu {

// Streams of 64-byte lines read at once, and bytes of running sums held at once: measured, bench/README.md.
constexpr int kStreams = 6;
constexpr int64_t kSumBytes = 16 * 1024;
constexpr int kMaxBins = 4;

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
      : p_(p), in_(static_cast<const T*>(p.features)), out_(static_cast<T*>(p.out)), sums_(sums) {}

  // All tokens of one row bin of one item.
  void pool(const Band& band) const {
    const int32_t side_by_side = bins_at_once();
    for (int32_t c = 0; c < band.path.cols; c += side_by_side) {
      const int32_t bins = smaller(side_by_side, band.path.cols - c);
      if (band.path.reduce == kMax) {
        pool_bins<kMax>(band, c, bins);
      } else {
        pool_bins<kMean>(band, c, bins);
      }
    }
  }

  // The same for a mean whose boxes hold whole pairs of `fine`, and the tokens of those pairs from the same read.
  void pool_with_pairs(const Band& band, const Pathway& fine, const Item& fine_item) const {
    const int32_t side_by_side = smaller(2, bins_at_once());  // more streams of stores than two cost more than they save
    for (int32_t c = 0; c < band.path.cols; c += side_by_side) {
      const int32_t bins = smaller(side_by_side, band.path.cols - c);
      if (fine.reduce == kMax) {
        pool_pairs<kMax>(band, c, bins, fine, fine_item);
      } else {
        pool_pairs<kMean>(band, c, bins, fine, fine_item);
      }
    }
  }

 private:
  static int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }

  int64_t sum_stride() const { return (p_.channels + Line::kSize - 1) / Line::kSize * Line::kSize; }

  int32_t bins_at_once() const {
    const int64_t fit = kSumBytes / (sum_stride() * static_cast<int64_t>(sizeof(float)));
    return fit < 1 ? 1 : fit > kMaxBins ? kMaxBins : static_cast<int32_t>(fit);
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

  template <Reduce R>
  void pool_bins(const Band& band, int32_t first, int32_t bins) const {
    const Bin rows = band.path.row[band.row_bin];
    const Bin* cols = band.path.col + first;
    const int32_t step = smaller(kStreams, kStreams / bins);
    bool fresh = true;
    for (int64_t t = band.item.frame_begin; t < band.item.frame_end; ++t) {
      for (int32_t r = rows.start; r < rows.stop; ++r) {
        for (int32_t at = 0; at < widest(cols, bins); at += step) {
          add_patches<R>(band, t, r, cols, bins, at, step, fresh);
          fresh = false;
        }
      }
    }
    for (int32_t b = 0; b < bins; ++b) finish<R>(band, first + b, sums_ + b * sum_stride());
  }

  // Patches [at, at + step) of each bin, as far as the bin goes.
  template <Reduce R>
  void add_patches(const Band& band, int64_t t, int32_t r, const Bin* cols, int32_t bins, int32_t at, int32_t step,
                   bool fresh) const {
    const T* from[kMaxBins];
    int32_t count[kMaxBins];
    for (int32_t b = 0; b < bins; ++b) {
      from[b] = patch(t, band.path, r, cols[b].start + at);
      count[b] = smaller(step, cols[b].size() - at);
    }
    for_lines([&](int64_t d, auto width) {
      for (int32_t b = 0; b < bins; ++b) {
        float* sum = sums_ + b * sum_stride() + d;
        Line acc = fresh ? Line::template start<R>() : Line::load_sums(sum);
        const T* x = from[b] + d;
        for (int32_t i = 0; i < count[b]; ++i, x += p_.patch_stride) acc.template take<R>(Line::load(x, width));
        acc.store_sums(sum);
      }
    });
  }

  template <Reduce R>
  void pool_pairs(const Band& band, int32_t first, int32_t bins, const Pathway& fine, const Item& fine_item) const {
    const Bin rows = band.path.row[band.row_bin];
    const Bin* cols = band.path.col + first;
    const int64_t t = band.item.frame_begin;
    for (int32_t r = rows.start; r < rows.stop; ++r) {
      for (int32_t at = 0; at < cols[0].size(); at += 2) {
        const T* from[kMaxBins];
        T* to[kMaxBins];
        for (int32_t b = 0; b < bins; ++b) {
          from[b] = patch(t, band.path, r, cols[b].start + at);
          to[b] = token(fine_item, fine, r, (cols[b].start + at) / 2);
        }
        const bool fresh = r == rows.start && at == 0;
        for_lines([&](int64_t d, auto width) {
          for (int32_t b = 0; b < bins; ++b) {
            const Line left = Line::load(from[b] + d, width);
            const Line right = Line::load(from[b] + p_.patch_stride + d, width);
            float* sum = sums_ + b * sum_stride() + d;
            Line acc = fresh ? Line::template start<kMean>() : Line::load_sums(sum);
            acc.template take<kMean>(left);
            acc.template take<kMean>(right);
            acc.store_sums(sum);
            Line pair = Line::template start<R>();
            pair.template take<R>(left);
            pair.template take<R>(right);
            if (R == kMean) pair.divide(2.0f);
            pair.store(to[b] + d, width, p_.stream);
          }
        });
      }
    }
    for (int32_t b = 0; b < bins; ++b) finish<kMean>(band, first + b, sums_ + b * sum_stride());
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
      acc.store(to + d, width, p_.stream);
    });
  }

  const Pooling& p_;
  const T* in_;
  T* out_;
  float* sums_;
};

}  // namespace sfllava::cpu
