// Plain C++, for processors without AVX2 and for other architectures; compilers vectorise most of it.
#pragma once

#include "line.h"
#include "sfllava/convert.h"

namespace sfllava::cpu {

struct Generic {
  using Register = float;
  static constexpr int kFloats = 1;

  static float fill(float x) { return x; }
  static float load_floats(const float* p) { return *p; }
  static void store_floats(float* p, float r) { *p = r; }
  static float add(float a, float b) { return a + b; }
  static float subtract(float a, float b) { return a - b; }
  static float multiply(float a, float b) { return a * b; }
  static float multiply_add(float a, float b, float c) { return a * b + c; }
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
};

}  // namespace sfllava::cpu
