// What the C++ tests share: a check, random numbers, plan tables, and the values of 16-bit floats by
// arithmetic.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "pool.h"

#define CHECK(what)                                                   \
  do {                                                                \
    if (!(what)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #what); \
      std::exit(1);                                                   \
    }                                                                 \
  } while (0)

namespace sfllava::test {

class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}
  int32_t in(int32_t low, int32_t high) { return std::uniform_int_distribution<int32_t>(low, high)(engine_); }
  uint32_t bits() { return static_cast<uint32_t>(engine_()); }

 private:
  std::mt19937 engine_;
};

struct PathwaySpec {
  int32_t width, reduce;
  std::vector<Bin> frames, rows, cols;
};

struct Layout {
  int32_t frames, patches, tokens = 0;
  std::vector<PathwaySpec> pathways;
};

// Which of the rising bins hold each of `length` places.
inline std::vector<Bin> make_covers(const std::vector<Bin>& bins, int32_t length) {
  std::vector<Bin> covers;
  for (int32_t place = 0; place < length; ++place) {
    Bin cover{0, 0};
    for (int32_t i = 0; i < static_cast<int32_t>(bins.size()); ++i) {
      if (bins[i].start > place || bins[i].stop <= place) continue;
      if (cover.size() == 0) cover.start = i;
      cover.stop = i + 1;
    }
    covers.push_back(cover);
  }
  return covers;
}

inline std::vector<int32_t> make_table(const Layout& layout) {
  std::vector<Item> items;
  std::vector<int32_t> pathways, bins;
  const auto add_bins = [&](const std::vector<Bin>& more) {
    const int32_t first = static_cast<int32_t>(bins.size() / 2);
    for (const Bin& b : more) bins.insert(bins.end(), {b.start, b.stop});
    return first;
  };
  int32_t token = 0;
  for (const PathwaySpec& path : layout.pathways) {
    const int32_t rows = static_cast<int32_t>(path.rows.size()), cols = static_cast<int32_t>(path.cols.size());
    const int32_t first_row = add_bins(path.rows), first_col = add_bins(path.cols);
    const int32_t row_cover = add_bins(make_covers(path.rows, layout.patches / path.width));
    const int32_t col_cover = add_bins(make_covers(path.cols, path.width));
    pathways.insert(pathways.end(),
                    {path.width, path.reduce, rows, first_row, cols, first_col, row_cover, col_cover});
    for (const Bin& f : path.frames) {
      items.push_back({static_cast<int32_t>(&path - layout.pathways.data()), f.start, f.stop, token});
      token += rows * cols;
    }
  }
  const auto frames_of = [](const Item& i) {
    return std::pair<int32_t, int32_t>(i.frame_begin, i.frame_end);
  };
  std::stable_sort(items.begin(), items.end(),
                   [&](const Item& a, const Item& b) { return frames_of(a) < frames_of(b); });
  std::vector<int32_t> groups, numbers, by_token, firsts, readers;
  for (size_t i = 0; i < items.size(); ++i) {
    if (i == 0 || frames_of(items[i]) != frames_of(items[i - 1])) groups.push_back(static_cast<int32_t>(i));
    numbers.insert(numbers.end(),
                   {items[i].pathway, items[i].frame_begin, items[i].frame_end, items[i].first_token});
    by_token.push_back(static_cast<int32_t>(i));
  }
  std::sort(by_token.begin(), by_token.end(),
            [&](int32_t a, int32_t b) { return items[a].first_token < items[b].first_token; });
  for (int32_t frame = 0; frame < layout.frames; ++frame) {
    firsts.push_back(static_cast<int32_t>(readers.size()));
    for (const int32_t i : by_token) {
      if (items[i].frame_begin <= frame && frame < items[i].frame_end) readers.push_back(i);
    }
  }
  firsts.push_back(static_cast<int32_t>(readers.size()));
  std::vector<int32_t> table = {kPlanVersion,
                                layout.patches,
                                layout.frames,
                                token,
                                static_cast<int32_t>(layout.pathways.size()),
                                static_cast<int32_t>(groups.size()),
                                static_cast<int32_t>(items.size()),
                                static_cast<int32_t>(readers.size())};
  groups.push_back(static_cast<int32_t>(items.size()));
  for (const auto* part : {&pathways, &groups, &numbers, &firsts, &readers, &bins})
    table.insert(table.end(), part->begin(), part->end());
  return table;
}

inline std::vector<Bin> every(int32_t n) {
  std::vector<Bin> bins;
  for (int32_t i = 0; i < n; ++i) bins.push_back({i, i + 1});
  return bins;
}

// Adaptive bins, fixed windows, or any boxes of [0, n) whose starts and stops rise.
inline std::vector<Bin> random_bins(Random& random, int32_t n) {
  const int32_t kind = random.in(0, 3), size = random.in(1, 5);
  std::vector<Bin> bins;
  if (kind == 0) return every(n);
  if (kind == 1) {
    for (int32_t i = 0; i < size; ++i) bins.push_back({i * n / size, ((i + 1) * n + size - 1) / size});
  }
  for (int32_t i = 0; kind == 2 && (i + 1) * size <= n; ++i) bins.push_back({i * size, (i + 1) * size});
  if (bins.empty()) {
    std::vector<int32_t> starts(size), stops(size);
    for (int32_t i = 0; i < size; ++i) {
      starts[i] = random.in(0, n - 1);
      stops[i] = random.in(starts[i] + 1, n);
    }
    std::sort(starts.begin(), starts.end());
    std::sort(stops.begin(), stops.end());
    for (int32_t i = 0; i < size; ++i) bins.push_back({starts[i], stops[i]});
  }
  return bins;
}

inline Layout random_layout(Random& random) {
  const int32_t height = random.in(1, 8), width = random.in(1, 8);
  Layout layout{random.in(1, 4), height * width, 0, {}};
  for (int32_t i = random.in(1, 3); i > 0; --i) {
    const bool flat = random.in(0, 3) == 0;
    layout.pathways.push_back({flat ? layout.patches : width, random.in(kMax, kMean),
                               random_bins(random, layout.frames), random_bins(random, flat ? 1 : height),
                               random_bins(random, flat ? layout.patches : width)});
    const PathwaySpec& path = layout.pathways.back();
    layout.tokens += static_cast<int32_t>(path.frames.size() * path.rows.size() * path.cols.size());
  }
  return layout;
}

// What a number of `exponent` exponent bits (8: bfloat16, 5: float16) is worth, by arithmetic.
inline double value_of(uint16_t bits, int exponent) {
  const int mantissa = 15 - exponent, bias = (1 << (exponent - 1)) - 1;
  const int power = bits >> mantissa & ((1 << exponent) - 1), fraction = bits & ((1 << mantissa) - 1);
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  if (power == (1 << exponent) - 1) return fraction ? NAN : sign * INFINITY;
  if (power == 0) return sign * std::ldexp(fraction, 1 - bias - mantissa);
  return sign * std::ldexp((1 << mantissa) + fraction, power - bias - mantissa);
}

inline int exponent_bits(Dtype dtype) { return dtype == Dtype::kBFloat16 ? 8 : 5; }
inline int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

inline double value_at(const void* from, int64_t i, Dtype dtype) {
  if (dtype == Dtype::kFloat32) return static_cast<const float*>(from)[i];
  return value_of(static_cast<const uint16_t*>(from)[i], exponent_bits(dtype));
}

// Writes a small integer, which every dtype holds exactly.
inline void put(void* to, int64_t i, int32_t value, Dtype dtype) {
  const float x = static_cast<float>(value);
  if (dtype == Dtype::kFloat32) {
    static_cast<float*>(to)[i] = x;
    return;
  }
  for (uint32_t bits = 0; bits <= 0xffff; bits += dtype == Dtype::kBFloat16 ? 8 : 64) {
    if (value_of(static_cast<uint16_t>(bits), exponent_bits(dtype)) == value) {
      static_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(bits);
      return;
    }
  }
  CHECK(!"a small integer");
}

// Bytes for `size` numbers at a multiple of 64, with guards on both sides, all of one pattern.
class Guarded {
 public:
  explicit Guarded(int64_t bytes) : memory_(bytes + 3 * kLine, kPattern), bytes_(bytes) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(memory_.data()) + kLine;
    begin_ =
        static_cast<int64_t>((at + kLine - 1) / kLine * kLine - reinterpret_cast<uintptr_t>(memory_.data()));
  }
  void* data() { return memory_.data() + begin_; }
  const void* data() const { return memory_.data() + begin_; }
  bool guards_untouched() const {
    const auto fine = [](uint8_t byte) { return byte == kPattern; };
    return std::all_of(memory_.begin(), memory_.begin() + begin_, fine) &&
           std::all_of(memory_.begin() + begin_ + bytes_, memory_.end(), fine);
  }

 private:
  static constexpr int64_t kLine = 64;
  static constexpr uint8_t kPattern = 0xa5;
  std::vector<uint8_t> memory_;
  int64_t bytes_, begin_ = 0;
};

constexpr Dtype kDtypes[] = {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16};

// Calls body(name) with each instruction set that this processor has.
template <class Body>
void for_isas(const Body& body) {
  for (const char* name : {"generic", "avx2", "avx512"}) {
    if (!cpu::force_isa(name)) continue;
    CHECK(std::strcmp(cpu::isa_name(), name) == 0);
    std::printf("%s\n", name);
    body(name);
  }
  CHECK(cpu::force_isa(nullptr));
}

}  // namespace sfllava::test
