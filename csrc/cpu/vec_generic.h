// Plain C++, for processors without AVX2 and for other architectures; compilers vectorise most of it.
#pragma once

#include "line.h"

namespace sfllava::cpu {

struct Generic {
  using Register = float;
  static constexpr int kFloats = 1;

  static float fill(float x) { return x; }
  static float load_floats(const float* p) { return *p; }
  static void store_floats(float* p, float r) { *p = r; }
  static float add(float a, float b) { return a + b; }
  static float divide(float a, float b) { return a / b; }
  static float max(float x, float kept) { return x > kept || x != x ? x : kept; }

  template <class T>
  static void load(const T* p, float* r) {
    for (int i = 0; i < static_cast<int>(kLineBytes / sizeof(T)); ++i) r[i] = widen(p[i]);
  }
  template <bool kStream, bool kRound, class T>
  static void store(T* p, const float* r) {
    for (int i = 0; i < static_cast<int>(kLineBytes / sizeof(T)); ++i) narrow(r[i], p[i]);
  }

 private:
  template <class To, class From>
  static To bit_cast(From x) {
    To y;
    static_assert(sizeof x == sizeof y, "a cast of bits keeps the size");
    std::memcpy(&y, &x, sizeof y);
    return y;
  }

  static float widen(float x) { return x; }
  static float widen(BFloat16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }
  // The multiplication moves the exponent bias from 15 to 127 and makes denormals right by itself.
  static float widen(Float16 x) {
    const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16, magnitude = uint32_t{x.bits & 0x7fffu} << 13;
    const float scaled = bit_cast<float>(magnitude) * bit_cast<float>(uint32_t{0x77800000});  // 2^112
    const bool special = magnitude >= 0x7c00u << 13;
    return bit_cast<float>(sign | (special ? magnitude | 0x7f800000u : bit_cast<uint32_t>(scaled)));
  }

  static void narrow(float x, float& to) { to = x; }
  static void narrow(float x, BFloat16& to) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    to.bits = static_cast<uint16_t>(x != x ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  }
  static void narrow(float x, Float16& to) {
    const uint32_t bits = bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    uint32_t half;
    if (magnitude > 0x7f800000u) {
      half = 0x7e00u | (magnitude >> 13 & 0x3ffu);
    } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
      half = 0x7c00u;
    } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 1/2 leaves the denormal in the low bits, rounded
      half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    } else {
      half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    }
    to.bits = static_cast<uint16_t>(sign | half);
  }
};

}  // namespace sfllava::cpu
