// The AVX-512 kernel on any processor: the same source on emulated intrinsics (SIMDe), against plain C++.
#include "support.h"
#include "tasks.h"
#include "vec_generic.h"

#define Avx512 EmulatedAvx512  // a name of its own, apart from the real one in the library
#include "vec_avx512.h"
#undef Avx512

using namespace sfllava;
using namespace sfllava::test;
using cpu::EmulatedAvx512;
using cpu::Generic;

namespace {

constexpr int64_t kLine = 64;

// Normal numbers, ties, zeros of both signs, denormals, infinities and NaN.
template <class T>
void fill(Random& random, void* line) {
  uint8_t* to = static_cast<uint8_t*>(line);
  for (int64_t i = 0; i < kLine; i += sizeof(T)) {
    uint32_t bits = random.bits();
    const bool wide = sizeof(T) == 4;
    switch (random.in(0, 4)) {
      case 0:
        bits = wide ? 0x80000000u * random.in(0, 1) : 0x8000u * random.in(0, 1);
        break;
      case 1:
        bits &= wide ? 0x807fffffu : 0x807fu;
        break;
      case 2:
        bits |= wide ? 0x7f800000u : 0x7c00u;
        break;
      case 3:
        bits = wide ? 0x3f800000u + random.in(-1, 1) : 0x3c00u + random.in(-1, 1);
        break;
      default:
        break;
    }
    std::memcpy(to + i, &bits, sizeof(T));
  }
}

bool is_nan(const uint8_t* line, int64_t i, float) {
  float x;
  std::memcpy(&x, line + i, sizeof x);
  return x != x;
}
bool is_nan(const uint8_t* line, int64_t i, uint16_t, int exponent) {
  uint16_t bits;
  std::memcpy(&bits, line + i, sizeof bits);
  return std::isnan(value_of(bits, exponent));
}
bool is_nan(const uint8_t* line, int64_t i, BFloat16) { return is_nan(line, i, uint16_t{}, 8); }
bool is_nan(const uint8_t* line, int64_t i, Float16) { return is_nan(line, i, uint16_t{}, 5); }

// Equal bits; a NaN for a NaN.
template <class T>
bool same(const uint8_t* a, const uint8_t* b, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += sizeof(T)) {
    if (is_nan(a, i, T{}) && is_nan(b, i, T{})) continue;
    if (std::memcmp(a + i, b + i, sizeof(T)) != 0) return false;
  }
  return true;
}

template <class V, class T, Reduce R, class Width>
void pool_lines(const uint8_t* first, const uint8_t* second, Width width, bool stream, uint8_t* out) {
  using Line = cpu::Line<V, T>;
  alignas(kLine) float sums[Line::kSize];
  Line acc = Line::template start<R>();
  acc.template take<R>(Line::load(reinterpret_cast<const T*>(first), width));
  acc.store_sums(sums);
  acc = Line::load_sums(sums);
  const Line more = Line::load(reinterpret_cast<const T*>(second), width);
  if (R == kLinear) {
    acc.take_weighted(more, 0.7f);
  } else {
    acc.template take<R>(more);
  }
  if (R == kMean) acc.divide(3.0f);
  acc.template store<R>(reinterpret_cast<T*>(out), width, stream);
}

template <class T, Reduce R>
void test_lines() {
  Random random(4);
  using Line = cpu::Line<Generic, T>;
  for (int i = 0; i < 20000; ++i) {
    alignas(kLine) uint8_t first[kLine], second[kLine], want[kLine], got[kLine];
    fill<T>(random, first);
    fill<T>(random, second);
    std::memset(want, 0xa5, kLine);
    std::memset(got, 0xa5, kLine);
    const bool stream = i % 2;
    if (i % 4) {
      pool_lines<Generic, T, R>(first, second, Line::whole(), stream, want);
      pool_lines<EmulatedAvx512, T, R>(first, second, Line::whole(), stream, got);
      CHECK((same<T>(got, want, kLine)));
    } else {
      const cpu::PartLine part = Line::part(random.in(1, Line::kSize - 1));
      pool_lines<Generic, T, R>(first, second, part, stream, want);
      pool_lines<EmulatedAvx512, T, R>(first, second, part, stream, got);
      CHECK((same<T>(got, want, part.count * static_cast<int64_t>(sizeof(T)))));
      CHECK(std::memcmp(got + part.count * sizeof(T), want + part.count * sizeof(T), kLine - part.count * sizeof(T)) ==
            0);
    }
  }
}

// Whole layouts, as run_tasks_avx512 runs them.
template <class T>
void test_layouts(Dtype dtype) {
  Random random(5);
  for (int i = 0; i < 60; ++i) {
    const Layout layout = random_layout(random);
    const std::vector<int32_t> table = make_table(layout);
    const int64_t channels = random.in(1, 3) * kLine / static_cast<int64_t>(sizeof(T)) + random.in(0, 3);
    const int64_t bytes = layout.tokens * channels * static_cast<int64_t>(sizeof(T));
    std::vector<uint8_t> features((layout.frames * layout.patches * channels * sizeof(T) + kLine - 1) / kLine * kLine);
    for (size_t at = 0; at < features.size(); at += kLine) fill<T>(random, &features[at]);
    Guarded want(bytes), got(bytes);
    cpu::Pooling pooling{Plan(table.data()), features.data(), layout.patches * channels,
                         channels,           want.data(),     channels,
                         channels,           dtype,           false};
    const int64_t tasks = cpu::count_tasks(pooling.plan);
    cpu::run_tasks_with<Generic>(pooling, 0, tasks);
    pooling.out = got.data();
    CHECK(cpu::force_tuning(i % 2 ? "streams" : "next step"));
    cpu::run_tasks_with<EmulatedAvx512>(pooling, 0, tasks);
    CHECK((same<T>(static_cast<uint8_t*>(got.data()), static_cast<uint8_t*>(want.data()), bytes)));
    CHECK(got.guards_untouched() && want.guards_untouched());
  }
}

template <class T>
void test_dtype(Dtype dtype) {
  test_lines<T, kMax>();
  test_lines<T, kMean>();
  test_lines<T, kLinear>();
  test_layouts<T>(dtype);
}

}  // namespace

int main() {
  test_dtype<float>(Dtype::kFloat32);
  test_dtype<BFloat16>(Dtype::kBFloat16);
  test_dtype<Float16>(Dtype::kFloat16);
}
