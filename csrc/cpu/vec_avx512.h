#pragma once

#include <immintrin.h>

#include "line.h"

namespace sfllava::cpu {

struct Avx512 {
  using Register = __m512;
  static constexpr int kFloats = 16;

  static Register fill(float x) { return _mm512_set1_ps(x); }
  static Register load_floats(const float* p) { return _mm512_load_ps(p); }
  static void store_floats(float* p, Register r) { _mm512_store_ps(p, r); }
  static Register add(Register a, Register b) { return _mm512_add_ps(a, b); }
  static Register subtract(Register a, Register b) { return _mm512_sub_ps(a, b); }
  static Register multiply(Register a, Register b) { return _mm512_mul_ps(a, b); }
  static Register multiply_add(Register a, Register b, Register c) { return _mm512_fmadd_ps(a, b, c); }
  static Register divide(Register a, Register b) { return _mm512_div_ps(a, b); }
  // vmaxps returns its second operand for equals and NaN, so only a NaN in x needs a hand.
  static Register max(Register x, Register kept) {
    return _mm512_mask_mov_ps(_mm512_max_ps(x, kept), _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), x);
  }

  static void load(const float* p, Register* r) { r[0] = _mm512_loadu_ps(p); }
  // Even and odd elements part ways: a shift and a mask widen 32 of them without a shuffle.
  static void load(const BFloat16* p, Register* r) {
    const __m512i x = _mm512_loadu_si512(p);
    r[0] = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
    r[1] = _mm512_castsi512_ps(_mm512_and_si512(x, high_half()));
  }
  static void load(const Float16* p, Register* r) {
    for (int i = 0; i < 2; ++i) r[i] = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + i));
  }

  template <bool kStream, bool kRound>
  static void store(float* p, const Register* r) {
    put<kStream>(p, _mm512_castps_si512(r[0]));
  }
  template <bool kStream, bool kRound>
  static void store(BFloat16* p, const Register* r) {
    const __m512i even = _mm512_srli_epi32(bf16_bits<kRound>(r[0]), 16);
    put<kStream>(p, _mm512_or_si512(even, _mm512_and_si512(bf16_bits<kRound>(r[1]), high_half())));
  }
  template <bool kStream, bool kRound>
  static void store(Float16* p, const Register* r) {
    const __m256i low = _mm512_cvtps_ph(r[0], _MM_FROUND_TO_NEAREST_INT);
    const __m256i high = _mm512_cvtps_ph(r[1], _MM_FROUND_TO_NEAREST_INT);
    put<kStream>(p, _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
  }

 private:
  static __m512i high_half() { return _mm512_set1_epi32(static_cast<int>(0xffff0000)); }

  // The upper half of each float, rounded to nearest even; NaN becomes the quiet NaN that torch writes.
  template <bool kRound>
  static __m512i bf16_bits(Register r) {
    const __m512i bits = _mm512_castps_si512(r);
    if (!kRound) return bits;
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(r, r, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
  }

  template <bool kStream>
  static void put(void* p, __m512i x) {
    if (kStream) {
      _mm512_stream_si512(static_cast<__m512i*>(p), x);
    } else {
      _mm512_storeu_si512(p, x);
    }
  }
};

}  // namespace sfllava::cpu
