#pragma once

#include <immintrin.h>

#include "line.h"

namespace sfllava::cpu {

struct Avx2 {
  using Register = __m256;
  static constexpr int kFloats = 8;

  static Register fill(float x) { return _mm256_set1_ps(x); }
  static Register load_floats(const float* p) { return _mm256_load_ps(p); }
  static void store_floats(float* p, Register r) { _mm256_store_ps(p, r); }
  static Register add(Register a, Register b) { return _mm256_add_ps(a, b); }
  static Register subtract(Register a, Register b) { return _mm256_sub_ps(a, b); }
  static Register multiply(Register a, Register b) { return _mm256_mul_ps(a, b); }
  static Register multiply_add(Register a, Register b, Register c) { return _mm256_fmadd_ps(a, b, c); }
  static Register divide(Register a, Register b) { return _mm256_div_ps(a, b); }
  // vmaxps returns its second operand for equals and NaN, so only a NaN in x needs a hand.
  static Register max(Register x, Register kept) {
    return _mm256_blendv_ps(_mm256_max_ps(x, kept), x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  }

  static void load(const float* p, Register* r) {
    r[0] = _mm256_loadu_ps(p);
    r[1] = _mm256_loadu_ps(p + 8);
  }
  // Even and odd elements part ways: a shift and a mask widen 16 of them without a shuffle.
  static void load(const BFloat16* p, Register* r) {
    for (int i = 0; i < 2; ++i) {
      const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + i);
      r[2 * i] = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
      r[2 * i + 1] = _mm256_castsi256_ps(_mm256_and_si256(x, high_half()));
    }
  }
  static void load(const Float16* p, Register* r) {
    for (int i = 0; i < 4; ++i) r[i] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + i));
  }

  template <bool kStream, bool kRound>
  static void store(float* p, const Register* r) {
    put<kStream>(p, _mm256_castps_si256(r[0]));
    put<kStream>(p + 8, _mm256_castps_si256(r[1]));
  }
  template <bool kStream, bool kRound>
  static void store(BFloat16* p, const Register* r) {
    for (int i = 0; i < 2; ++i) {
      const __m256i even = _mm256_srli_epi32(bf16_bits<kRound>(r[2 * i]), 16);
      put<kStream>(p + 16 * i, _mm256_or_si256(even, _mm256_and_si256(bf16_bits<kRound>(r[2 * i + 1]), high_half())));
    }
  }
  template <bool kStream, bool kRound>
  static void store(Float16* p, const Register* r) {
    for (int i = 0; i < 2; ++i) {
      const __m128i low = _mm256_cvtps_ph(r[2 * i], _MM_FROUND_TO_NEAREST_INT);
      const __m128i high = _mm256_cvtps_ph(r[2 * i + 1], _MM_FROUND_TO_NEAREST_INT);
      put<kStream>(p + 16 * i, _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1));
    }
  }

 private:
  static __m256i high_half() { return _mm256_set1_epi32(static_cast<int>(0xffff0000)); }

  // The upper half of each float, rounded to nearest even; NaN becomes the quiet NaN that torch writes.
  template <bool kRound>
  static __m256i bf16_bits(Register r) {
    const __m256i bits = _mm256_castps_si256(r);
    if (!kRound) return bits;
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(r, r, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
  }

  template <bool kStream>
  static void put(void* p, __m256i x) {
    if (kStream) {
      _mm256_stream_si256(static_cast<__m256i*>(p), x);
    } else {
      _mm256_storeu_si256(static_cast<__m256i*>(p), x);
    }
  }
};

}  // namespace sfllava::cpu
