// Bilinear interpolation: what a linear pathway multiplies the elements of a box by.
#pragma once

#include "plan.h"

namespace sfllava {

// The weights of one of `count` bins on an axis of `length` places: the bin's centre lies on its first place, or between
// its two.
class LinearBin {
 public:
  SFLLAVA_HOST_DEVICE LinearBin(Bin bin, int32_t index, int32_t count, int32_t length) {
    if (bin.size() < 2) return;
    const int64_t ends = 2 * int64_t{count}, centre = (2 * int64_t{index} + 1) * length - count;
    second_ = static_cast<float>(centre % ends) / static_cast<float>(ends);
  }

  SFLLAVA_HOST_DEVICE float weight(int32_t place) const { return place == 0 ? 1.0f - second_ : second_; }

 private:
  float second_ = 0.0f;
};

// A box of at most 2 x 2 places, counted from its first.
class LinearBox {
 public:
  SFLLAVA_HOST_DEVICE LinearBox(const Pathway& path, int32_t row_bin, int32_t col_bin)
      : row_(path.row[row_bin], row_bin, path.rows, path.height),
        col_(path.col[col_bin], col_bin, path.cols, path.width) {}

  SFLLAVA_HOST_DEVICE float weight(int32_t row, int32_t col) const { return row_.weight(row) * col_.weight(col); }

 private:
  LinearBin row_, col_;
};

}  // namespace sfllava
