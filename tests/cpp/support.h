// What the C++ tests share: a check, random numbers, plan tables, and the values of 16-bit floats by arithmetic.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "isa.h"
#include "sfllava/check_plan.h"

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

// Bins on a grid of patches: `height` rows of them, 0 for all after the first patch.
struct PathwaySpec {
  int32_t width, reduce;
  std::vector<Bin> frames, rows, cols;
  int32_t first_patch = 0, height = 0;
  int32_t room = 0;  // tokens after each row that are not the pathway's
};

enum Order : uint32_t { kByPathway = 0, kByFrame = 1 };  // or shuffled, by any other number

struct Layout {
  int32_t frames, patches, tokens = 0;
  std::vector<PathwaySpec> pathways;
  uint32_t order = kByPathway;
  int32_t room = 0;  // tokens after each item that are not its own

  int32_t height(const PathwaySpec& path) const {
    return path.height ? path.height : (patches - path.first_patch) / path.width;
  }
};

inline int32_t size_of(const std::vector<Bin>& bins) { return static_cast<int32_t>(bins.size()); }

inline std::pair<int32_t, int32_t> frames_of(const Item& item) { return {item.frame_begin, item.frame_end}; }

// The items in the order of their tokens.
inline std::vector<Item> place_items(const Layout& layout) {
  std::vector<Item> items;
  for (int32_t i = 0; i < static_cast<int32_t>(layout.pathways.size()); ++i) {
    for (const Bin& f : layout.pathways[i].frames) items.push_back({i, f.start, f.stop, 0});
  }
  if (layout.order == kByFrame) {
    std::stable_sort(items.begin(), items.end(),
                     [](const Item& a, const Item& b) { return frames_of(a) < frames_of(b); });
  } else if (layout.order != kByPathway) {
    std::shuffle(items.begin(), items.end(), std::mt19937(layout.order));
  }
  int32_t token = 0;
  for (Item& item : items) {
    item.first_token = token;
    const PathwaySpec& path = layout.pathways[item.pathway];
    token += size_of(path.rows) * (size_of(path.cols) + path.room) + layout.room;
  }
  return items;
}

inline void count_tokens(Layout& layout) {
  layout.tokens = 0;
  for (const PathwaySpec& path : layout.pathways) {
    const int32_t rows = size_of(path.rows), cols = size_of(path.cols);
    layout.tokens += size_of(path.frames) * (rows * (cols + path.room) + layout.room);
  }
}

struct Box {
  int64_t token;
  const PathwaySpec& path;
  Bin frames, rows, cols;
  int32_t row, col;  // which bins
};

// Calls body(box) for every token in turn.
template <class Body>
void for_tokens(const Layout& layout, const Body& body) {
  for (const Item& item : place_items(layout)) {
    const PathwaySpec& path = layout.pathways[item.pathway];
    int64_t token = item.first_token;
    for (int32_t r = 0; r < size_of(path.rows); ++r, token += path.room) {
      for (int32_t c = 0; c < size_of(path.cols); ++c, ++token) {
        body(Box{token, path, {item.frame_begin, item.frame_end}, path.rows[r], path.cols[c], r, c});
      }
    }
  }
}

// Calls body(frame, row, column) for every element of a box in order.
template <class Body>
void for_elements(const Box& box, const Body& body) {
  for (int32_t t = box.frames.start; t < box.frames.stop; ++t) {
    for (int32_t r = box.rows.start; r < box.rows.stop; ++r) {
      for (int32_t c = box.cols.start; c < box.cols.stop; ++c) body(t, r, c);
    }
  }
}

inline int64_t patch_at(const PathwaySpec& path, int64_t row, int64_t col) {
  return path.first_patch + row * path.width + col;
}

// The middle of one of `count` equal segments of an axis, in places: what bilinear interpolation looks up.
inline double middle(int32_t index, int32_t count, int32_t length) { return (index + 0.5) * length / count - 0.5; }

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
  std::vector<Item> items = place_items(layout);
  std::vector<int32_t> pathways, bins;
  const auto add_bins = [&](const std::vector<Bin>& more) {
    const int32_t first = static_cast<int32_t>(bins.size() / 2);
    for (const Bin& b : more) bins.insert(bins.end(), {b.start, b.stop});
    return first;
  };
  for (const PathwaySpec& path : layout.pathways) {
    const int32_t rows = size_of(path.rows), cols = size_of(path.cols), height = layout.height(path);
    const int32_t first_row = add_bins(path.rows), first_col = add_bins(path.cols);
    const int32_t row_cover = add_bins(make_covers(path.rows, height));
    const int32_t col_cover = add_bins(make_covers(path.cols, path.width));
    pathways.insert(pathways.end(), {path.first_patch, height, path.width, path.reduce, rows, first_row, cols,
                                     first_col, row_cover, col_cover, cols + path.room});
  }
  std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) {
    return std::pair(frames_of(a), a.pathway) < std::pair(frames_of(b), b.pathway);
  });
  std::vector<int32_t> groups, numbers, by_token, firsts, readers;
  for (size_t i = 0; i < items.size(); ++i) {
    if (i == 0 || frames_of(items[i]) != frames_of(items[i - 1])) groups.push_back(static_cast<int32_t>(i));
    numbers.insert(numbers.end(), {items[i].pathway, items[i].frame_begin, items[i].frame_end, items[i].first_token});
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
                                layout.tokens,
                                static_cast<int32_t>(layout.pathways.size()),
                                static_cast<int32_t>(groups.size()),
                                static_cast<int32_t>(items.size()),
                                static_cast<int32_t>(readers.size())};
  groups.push_back(static_cast<int32_t>(items.size()));
  for (const auto* part : {&pathways, &groups, &numbers, &firsts, &readers, &bins})
    table.insert(table.end(), part->begin(), part->end());
  return table;
}

inline std::string wrong_with(const std::vector<int32_t>& table, const Layout& layout) {
  return check_plan(table.data(), static_cast<int64_t>(table.size()), layout.frames, layout.patches, layout.tokens);
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

// The bins of a bilinear resize from `length` places to `count`.
inline std::vector<Bin> linear_bins(int32_t count, int32_t length) {
  std::vector<Bin> bins;
  for (int32_t i = 0; i < count; ++i) {
    const double at = std::max(middle(i, count, length), 0.0);
    const int32_t start = static_cast<int32_t>(at + 1e-9);
    const bool between = at - start > 1e-9 && start + 1 < length;
    bins.push_back({start, start + 1 + between});
  }
  return bins;
}

// Grids after class tokens and before patches that nothing reads; tokens in any order, with room between them.
inline Layout random_layout(Random& random) {
  const int32_t height = random.in(1, 8), width = random.in(1, 8), first = random.in(0, 1);
  const int32_t unread = std::max(0, random.in(-3, 3));
  Layout layout{random.in(1, 4),   first + height * width + unread, 0, {},
                random.bits() % 4, std::max(0, random.in(-2, 2))};
  for (int32_t i = random.in(1, 3); i > 0; --i) {
    const bool class_token = first && random.in(0, 3) == 0, flat = random.in(0, 3) == 0;
    PathwaySpec path{width, random.in(kMax, kLinear), random_bins(random, layout.frames), {}, {}, first, height};
    if (class_token || flat) path.height = 1, path.width = class_token ? 1 : height * width;
    if (class_token) path.first_patch = 0;
    const bool linear = path.reduce == kLinear;
    path.rows = linear ? linear_bins(random.in(1, 9), path.height) : random_bins(random, path.height);
    path.cols = linear ? linear_bins(random.in(1, 9), path.width) : random_bins(random, path.width);
    path.room = std::max(0, random.in(-2, 2));
    layout.pathways.push_back(path);
  }
  count_tokens(layout);
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
    begin_ = static_cast<int64_t>((at + kLine - 1) / kLine * kLine - reinterpret_cast<uintptr_t>(memory_.data()));
  }
  void* data() { return memory_.data() + begin_; }
  const void* data() const { return memory_.data() + begin_; }
  // Takes back what was written, so that `untouched` finds what else was.
  void restore(int64_t at, int64_t bytes) { std::memset(static_cast<uint8_t*>(data()) + at, kPattern, bytes); }
  bool untouched() const {
    return std::all_of(memory_.begin(), memory_.end(), [](uint8_t byte) { return byte == kPattern; });
  }
  bool guards_untouched() {
    restore(0, bytes_);
    return untouched();
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
    CHECK(std::strcmp(cpu::isa().name, name) == 0);
    std::printf("%s\n", name);
    body(name);
  }
  CHECK(cpu::force_isa(nullptr));
}

}  // namespace sfllava::test
