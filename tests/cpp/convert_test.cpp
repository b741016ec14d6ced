// Every 16-bit number into float32 and back, and every rounding between neighbours, with every instruction
// set.
#include "support.h"
#include "vec_generic.h"

using namespace sfllava;
using namespace sfllava::test;

namespace {

constexpr int kNumbers = 1 << 16;

float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

template <class T>
std::vector<float> widened(const std::vector<uint16_t>& numbers) {
  using Line = cpu::Line<cpu::Generic, T>;
  std::vector<float> floats(numbers.size());
  for (size_t i = 0; i < numbers.size(); i += Line::kSize) {
    T line[Line::kSize];
    std::memcpy(line, &numbers[i], sizeof line);
    Line::load(line, Line::whole()).store_sums(&floats[i]);
  }
  return floats;
}

template <class T>
uint16_t narrowed(float x) {
  using Line = cpu::Line<cpu::Generic, T>;
  alignas(64) float floats[Line::kSize] = {x};
  T line[Line::kSize];
  Line::load_sums(floats).template store<kMean>(line, Line::whole(), false);
  return line[0].bits;
}

std::vector<uint16_t> all_numbers() {
  std::vector<uint16_t> numbers(kNumbers);
  for (int i = 0; i < kNumbers; ++i) numbers[i] = static_cast<uint16_t>(i);
  return numbers;
}

template <class T>
void test_widening(int exponent) {
  const std::vector<float> floats = widened<T>(all_numbers());
  for (int i = 0; i < kNumbers; ++i) {
    const double want = value_of(static_cast<uint16_t>(i), exponent);
    CHECK(std::isnan(want) ? std::isnan(floats[i]) : floats[i] == want && std::signbit(floats[i]) == (i >= 0x8000));
    CHECK(std::isnan(want) ? std::isnan(value_of(narrowed<T>(floats[i]), exponent)) : narrowed<T>(floats[i]) == i);
  }
}

// Between neighbours: below the middle down, above it up, in the middle to the even one.
template <class T>
void test_rounding(int exponent) {
  const uint16_t infinity = static_cast<uint16_t>(((1 << exponent) - 1) << (15 - exponent));
  for (const uint16_t sign : {0, 0x8000}) {
    for (uint16_t low = 0; low < infinity; ++low) {
      const uint16_t high = low + 1;
      // Infinity has the bits of the next power of two.
      const double above =
          high == infinity ? 2 * value_of(low, exponent) - value_of(low - 1, exponent) : value_of(high, exponent);
      const double middle = (value_of(low, exponent) + above) / 2 * (sign ? -1 : 1);
      const float exact = static_cast<float>(middle);
      CHECK(exact == middle);
      CHECK(narrowed<T>(exact) == (sign | (low % 2 ? high : low)));
      CHECK(narrowed<T>(std::nextafter(exact, 0.0f)) == (sign | low));
      CHECK(narrowed<T>(std::nextafter(exact, sign ? -INFINITY : INFINITY)) == (sign | high));
    }
    CHECK(narrowed<T>(as_float(uint32_t{sign} << 16 | 0x7f7fffff)) == (sign | infinity));
    CHECK(narrowed<T>(sign ? -INFINITY : INFINITY) == (sign | infinity));
    for (const uint32_t nan : {0x7f800001u, 0x7fc00000u, 0x7fffffffu}) {
      CHECK(std::isnan(value_of(narrowed<T>(as_float(uint32_t{sign} << 16 | nan)), exponent)));
    }
  }
}

// One frame of 1 x 4 patches to one token: patch p holds from[p].
std::vector<uint16_t> pooled(const std::vector<uint16_t> (&from)[4], Dtype dtype, Reduce reduce) {
  const int64_t channels = static_cast<int64_t>(from[0].size());
  std::vector<uint16_t> features, out(channels);
  for (const auto& patch : from) features.insert(features.end(), patch.begin(), patch.end());
  const std::vector<int32_t> table = make_table({1, 4, 1, {{4, reduce, every(1), every(1), {{0, 4}}}}});
  const cpu::Pooling pooling{Plan(table.data()), features.data(), 4 * channels, channels, out.data(),
                             channels,           channels,        dtype,        false};
  cpu::run_tasks(pooling, 0, cpu::count_tasks(pooling.plan));
  return out;
}

void test_every_number_through_the_kernel(Dtype dtype) {
  const std::vector<uint16_t> numbers = all_numbers();
  const int exponent = exponent_bits(dtype);
  for (const Reduce reduce : {kMax, kMean}) {
    const std::vector<uint16_t> out = pooled({numbers, numbers, numbers, numbers}, dtype, reduce);
    for (int i = 0; i < kNumbers; ++i) {
      const double x = value_of(static_cast<uint16_t>(i), exponent);
      const bool overflows = reduce == kMean && std::fabs(x) >= std::ldexp(1, 126);
      if (std::isnan(x)) {
        CHECK(std::isnan(value_of(out[i], exponent)));
      } else if (!overflows) {
        // A sum that starts at 0 forgets the sign of -0.
        CHECK(out[i] == (reduce == kMean && i == 0x8000 ? 0 : i));
      }
    }
  }
}

// Quarters of the way between neighbours, as means of four patches.
void test_every_rounding_through_the_kernel(Dtype dtype) {
  const int exponent = exponent_bits(dtype);
  std::vector<uint16_t> low, high;
  for (int i = 0; i < kNumbers - 1; ++i) {
    const double next = value_of(static_cast<uint16_t>(i + 1), exponent);
    if (i + 1 == 0x8000 || !(std::fabs(next) < std::ldexp(1, 126))) continue;
    low.push_back(static_cast<uint16_t>(i));
    high.push_back(static_cast<uint16_t>(i + 1));
  }
  const auto near_low = pooled({low, low, low, high}, dtype, kMean),
             near_high = pooled({low, high, high, high}, dtype, kMean);
  const auto tie = pooled({low, high, low, high}, dtype, kMean);
  for (size_t i = 0; i < low.size(); ++i) {
    if (low[i] != 0x8000) CHECK(near_low[i] == low[i]);
    CHECK(near_high[i] == high[i]);
    CHECK(tie[i] == (low[i] % 2 ? high[i] : low[i]));
  }
}

}  // namespace

int main() {
  test_widening<BFloat16>(8);
  test_widening<Float16>(5);
  test_rounding<BFloat16>(8);
  test_rounding<Float16>(5);
  for_isas([](const char*) {
    for (const Dtype dtype : {Dtype::kBFloat16, Dtype::kFloat16}) {
      test_every_number_through_the_kernel(dtype);
      test_every_rounding_through_the_kernel(dtype);
    }
  });
}
