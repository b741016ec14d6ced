// Replaces the compiler's header: AVX-512 in plain C++ (SIMDe), for processors that lack it.
#pragma once

#define SIMDE_NO_NATIVE
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include <cmath>
#include <cstdint>
#include <cstring>

// What SIMDe 0.7 lacks. Later versions define these names as macros.
#if !defined(_mm512_cvtph_ps)
inline __m512 _mm512_cvtph_ps(__m256i halves) {
  uint16_t half[16];
  float x[16];
  std::memcpy(half, &halves, sizeof half);
  for (int i = 0; i < 16; ++i) {
    const int power = half[i] >> 10 & 31, fraction = half[i] & 1023;
    const float size = power == 31  ? (fraction ? NAN : INFINITY)
                       : power == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                    : std::ldexp(static_cast<float>(1024 + fraction), power - 25);
    x[i] = std::copysign(size, half[i] & 0x8000 ? -1.0f : 1.0f);
  }
  return simde_mm512_loadu_ps(x);
}
#endif

#if !defined(_mm512_cvtps_ph)
inline __m256i _mm512_cvtps_ph(__m512 floats,
                               int) {  // to nearest even, the rounding that nearbyint has by default
  float x[16];
  uint16_t half[16];
  std::memcpy(x, &floats, sizeof x);
  for (int i = 0; i < 16; ++i) {
    const float size = std::fabs(x[i]);
    int bits = 0x7e00;
    if (size >= 65520.0f) {
      bits = 0x7c00;
    } else if (size == size) {
      const int power = size < 0x1p-14f ? -14 : std::ilogb(size);
      bits = (power + 14) * 1024 + static_cast<int>(std::nearbyint(std::ldexp(size, 10 - power)));
    }
    half[i] = static_cast<uint16_t>(bits | (std::signbit(x[i]) ? 0x8000 : 0));
  }
  __m256i halves;
  std::memcpy(&halves, half, sizeof halves);
  return halves;
}
#endif

#if !defined(_mm512_stream_si512)
inline void _mm512_stream_si512(__m512i* to, __m512i x) { simde_mm512_store_si512(to, x); }
#endif
