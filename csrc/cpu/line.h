// 64 bytes of patch features, widened to float32 in registers.
#pragma once

#include <cstdint>
#include <cstring>

#include "sfllava/dtype.h"
#include "sfllava/plan.h"

namespace sfllava::cpu {

constexpr int kLineBytes = 64;

struct WholeLine {};
struct PartLine {
  int count;
};

// V is an instruction set (vec_*.h): registers of kFloats floats, and how a line of T enters and leaves them.
// The order of floats within a line is V's own affair; sums keep it, and store undoes it.
template <class V, class Element>
class Line {
 public:
  using T = Element;
  static constexpr int kSize = kLineBytes / sizeof(T);

  static WholeLine whole() { return {}; }
  static PartLine part(int count) { return {count}; }

  template <Reduce R>
  static Line start() {
    Line line;
    for (auto& r : line.reg_) r = V::fill(R == kMax ? -__builtin_inff() : 0.0f);
    return line;
  }

  static Line load(const T* from, WholeLine) {
    Line line;
    V::load(from, line.reg_);
    return line;
  }
  static Line load(const T* from, PartLine part) {
    alignas(kLineBytes) T buffer[kSize] = {};
    std::memcpy(buffer, from, part.count * sizeof(T));
    return load(buffer, whole());
  }

  // Results of reduction R: a maximum is one of its elements, so it needs no rounding.
  template <Reduce R>
  void store(T* to, WholeLine, bool stream) const {
    if (stream) {
      V::template store<true, R != kMax>(to, reg_);
    } else {
      V::template store<false, R != kMax>(to, reg_);
    }
  }
  template <Reduce R>
  void store(T* to, PartLine part, bool) const {
    alignas(kLineBytes) T buffer[kSize];
    V::template store<false, R != kMax>(buffer, reg_);
    std::memcpy(to, buffer, part.count * sizeof(T));
  }

  static Line load_sums(const float* from) {
    Line line;
    for (int i = 0; i < kRegs; ++i) line.reg_[i] = V::load_floats(from + i * V::kFloats);
    return line;
  }
  void store_sums(float* to) const {
    for (int i = 0; i < kRegs; ++i) V::store_floats(to + i * V::kFloats, reg_[i]);
  }

  // Adds x, or keeps the larger: NaN passes on, and of equals (0 and -0) the first stays.
  template <Reduce R>
  void take(const Line& x) {
    for (int i = 0; i < kRegs; ++i) reg_[i] = R == kMax ? V::max(x.reg_[i], reg_[i]) : V::add(reg_[i], x.reg_[i]);
  }

  void take_weighted(const Line& x, float weight) {
    for (int i = 0; i < kRegs; ++i) reg_[i] = V::add(reg_[i], V::multiply(x.reg_[i], V::fill(weight)));
  }

  // this + weight * (to - this)
  void move_towards(const Line& to, float weight) {
    for (int i = 0; i < kRegs; ++i) {
      reg_[i] = V::add(reg_[i], V::multiply(V::fill(weight), V::subtract(to.reg_[i], reg_[i])));
    }
  }

  // Part sums of products.
  class Dot {
   public:
    float sum() const {
      alignas(kLineBytes) float parts[V::kFloats];
      V::store_floats(parts, sums_);
      for (int half = V::kFloats / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
      }
      return parts[0];
    }

   private:
    friend Line;
    typename V::Register sums_ = V::fill(0);
  };
  // Of this and of floats that `store_sums` wrote; products and sums may be fused.
  void add_products(const float* with, Dot& dot) const {
    for (int i = 0; i < kRegs; ++i) {
      dot.sums_ = V::multiply_add(reg_[i], V::load_floats(with + i * V::kFloats), dot.sums_);
    }
  }

  void divide(float by) {
    for (auto& r : reg_) r = V::divide(r, V::fill(by));
  }

 private:
  static constexpr int kRegs = kSize / V::kFloats;
  typename V::Register reg_[kRegs];
};

}  // namespace sfllava::cpu
