// Attention that keys receive, for one instruction set.
//
// Keys are the memory that counts, so all queries that share them (the rows of a group of heads) meet each block of keys
// while it is in the cache. Two passes over a block of rows: their logits, then their softmax, which needs the maximum.
#pragma once

#include <algorithm>

#include "attention.h"
#include "line.h"
#include "scratch.h"
#include "sfllava/convert.h"

namespace sfllava::cpu {

constexpr int64_t kRows = 16;    // queries whose logits are held at once
constexpr int64_t kKeys = 32;    // of a block
constexpr int64_t kShares = 64;  // tasks, about

inline int64_t rows_of_group(const Attention& a) { return a.heads / a.groups * a.count; }
inline int64_t count_blocks(const Attention& a) { return (rows_of_group(a) + kRows - 1) / kRows; }
inline int64_t count_shares(const Attention& a) {
  const int64_t wanted = (kShares + a.batch * a.groups - 1) / (a.batch * a.groups);
  return std::min(count_blocks(a), wanted);
}

// e^x for x <= 0, within 2 units in the last place and never below e^-86.
inline float exp_of(float x) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, left in the low bits
  x = x < -86.0f ? -86.0f : x;
  const float shifted = x * 1.44269504f + kShift, whole = shifted - kShift;
  const float rest = (x - whole * 0.693359375f) - whole * -2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * rest + 1.3981999507e-3f;
  y = y * rest + 8.3334519073e-3f;
  y = y * rest + 4.1665795894e-2f;
  y = y * rest + 1.6666665459e-1f;
  y = y * rest + 5.0000001201e-1f;
  y = y * rest * rest + rest + 1.0f;
  return bit_cast<float>(bit_cast<uint32_t>(y) + (bit_cast<uint32_t>(shifted) << 23));
}

template <class V, class Element>
class Attend {
  using T = Element;
  using Keys = Line<V, T>;

 public:
  explicit Attend(const Attention& a)
      : a_(a),
        lines_((a.channels + Keys::kSize - 1) / Keys::kSize),
        width_(lines_ * Keys::kSize),
        pitch_((a.tokens + 15) / 16 * 16),
        queries_(thread_floats(kRows * (width_ + pitch_))),
        logits_(queries_ + kRows * width_) {}

  // One part: the share's rows, block by block.
  void run(int64_t task) const {
    const int64_t shares = count_shares(a_), share = task % shares, group = task / shares % a_.groups;
    const int64_t batch = task / shares / a_.groups, blocks = count_blocks(a_);
    float* part = a_.parts + task * a_.tokens;
    std::fill(part, part + a_.tokens, 0.0f);
    const T* keys = static_cast<const T*>(a_.keys) + batch * a_.key_strides[0] + group * a_.key_strides[1];
    for (int64_t block = share * blocks / shares; block < (share + 1) * blocks / shares; ++block) {
      const int64_t first = block * kRows, rows = std::min(kRows, rows_of_group(a_) - first);
      for (int64_t row = 0; row < rows; ++row) load_query(batch, group, first + row, queries_ + row * width_);
      for (int64_t key = 0; key < a_.tokens; key += kKeys) {
        multiply(keys, key, std::min(key + kKeys, a_.tokens), rows);
      }
      for (int64_t row = 0; row < rows; ++row) receive(logits_ + row * pitch_, visible(first + row), part);
    }
  }

 private:
  // How many tokens a row of the group sees.
  int64_t visible(int64_t row) const { return a_.tokens - a_.count + row % a_.count + 1; }

  void load_query(int64_t batch, int64_t group, int64_t row, float* to) const {
    const int64_t head = group * (a_.heads / a_.groups) + row / a_.count;
    const int64_t* strides = a_.query_strides;
    const T* from = static_cast<const T*>(a_.queries) + batch * strides[0] + head * strides[1] + row % a_.count * strides[2];
    for (int64_t line = 0; line < lines_; ++line) load(from, line).store_sums(to + line * Keys::kSize);
  }

  Keys load(const T* from, int64_t line) const {
    const int64_t at = line * Keys::kSize, left = a_.channels - at;
    if (left >= Keys::kSize) return Keys::load(from + at, Keys::whole());
    return Keys::load(from + at, Keys::part(static_cast<int>(left)));
  }

  void multiply(const T* keys, int64_t begin, int64_t end, int64_t rows) const {
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4) multiply_rows<4, 2>(keys, begin, end, row);
    for (; row < rows; ++row) multiply_rows<1, 4>(keys, begin, end, row);
  }

  template <int kTall, int kWide>
  void multiply_rows(const T* keys, int64_t begin, int64_t end, int64_t row) const {
    int64_t key = begin;
    for (; key + kWide <= end; key += kWide) multiply_tile<kTall, kWide>(keys, key, row);
    for (; key < end; ++key) multiply_tile<kTall, 1>(keys, key, row);
  }

  template <int kTall, int kWide>
  void multiply_tile(const T* keys, int64_t key, int64_t row) const {
    typename Keys::Dot dots[kTall][kWide];
    for (int64_t line = 0; line < lines_; ++line) {
      Keys key_lines[kWide];
      for (int j = 0; j < kWide; ++j) key_lines[j] = load(keys + (key + j) * a_.key_strides[2], line);
      for (int i = 0; i < kTall; ++i) {
        const float* query = queries_ + (row + i) * width_ + line * Keys::kSize;
        for (int j = 0; j < kWide; ++j) key_lines[j].add_products(query, dots[i][j]);
      }
    }
    for (int i = 0; i < kTall; ++i) {
      for (int j = 0; j < kWide; ++j) logits_[(row + i) * pitch_ + key + j] = dots[i][j].sum() * a_.scale;
    }
  }

  // Adds a row's softmax over the tokens that it sees to the part.
  static void receive(float* logits, int64_t visible, float* part) {
    constexpr int kLanes = 16;  // sums side by side, which compilers turn into vectors
    float most[kLanes], sums[kLanes] = {};
    std::fill(most, most + kLanes, -__builtin_inff());
    const int64_t whole = visible / kLanes * kLanes;
    for (int64_t at = 0; at < whole; at += kLanes) {
      for (int i = 0; i < kLanes; ++i) most[i] = logits[at + i] > most[i] ? logits[at + i] : most[i];
    }
    float maximum = *std::max_element(most, most + kLanes), sum = 0;
    for (int64_t at = whole; at < visible; ++at) maximum = std::max(maximum, logits[at]);
    for (int64_t at = 0; at < whole; at += kLanes) {
      for (int i = 0; i < kLanes; ++i) sums[i] += logits[at + i] = exp_of(logits[at + i] - maximum);
    }
    for (const float lane : sums) sum += lane;
    for (int64_t at = whole; at < visible; ++at) sum += logits[at] = exp_of(logits[at] - maximum);
    const float share = 1 / sum;
    for (int64_t at = 0; at < visible; ++at) part[at] += logits[at] * share;
  }

  const Attention& a_;
  int64_t lines_, width_, pitch_;
  float *queries_, *logits_;
};

template <class V, class T>
void attend_of(const Attention& a, int64_t begin, int64_t end) {
  const Attend<V, T> attend(a);
  for (int64_t task = begin; task < end; ++task) attend.run(task);
}

template <class V>
void attend_with(const Attention& a, int64_t begin, int64_t end) {
  if (a.dtype == Dtype::kFloat32) return attend_of<V, float>(a, begin, end);
  if (a.dtype == Dtype::kBFloat16) return attend_of<V, BFloat16>(a, begin, end);
  attend_of<V, Float16>(a, begin, end);
}

}  // namespace sfllava::cpu
