// What one lane holds: N elements of a patch or a token, and their sums in float32. On the device through the
// hardware's conversions, on the host through their model.
#pragma once

#include <type_traits>

#include "sfllava/convert.h"
#include "sfllava/linear.h"
#include "tuning.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#if defined(__CUDA_ARCH__)
#define SFLLAVA_UNROLL _Pragma("unroll")
#define SFLLAVA_KEEP_LOOP _Pragma("unroll 1")
#else
#define SFLLAVA_UNROLL
#define SFLLAVA_KEEP_LOOP
#endif

namespace sfllava::gpu {

// In words as they come from memory: the compiler would keep an array of 16-bit numbers in a register each.
template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
  using Word = std::conditional_t<(N * sizeof(T) >= 4), uint32_t, uint16_t>;
  static constexpr int kPerWord = sizeof(Word) / sizeof(T);

  Word words[N / kPerWord];

  SFLLAVA_HOST_DEVICE T get(int i) const {
    const Bits bits = static_cast<Bits>(words[i / kPerWord] >> shift(i));
    T element;
    memcpy(&element, &bits, sizeof element);
    return element;
  }
  SFLLAVA_HOST_DEVICE void set(int i, T element) {
    Bits bits;
    memcpy(&bits, &element, sizeof bits);
    Word& word = words[i / kPerWord];
    word = i % kPerWord ? word | Word{bits} << shift(i) : Word{bits};
  }

 private:
  SFLLAVA_HOST_DEVICE static constexpr int shift(int i) { return i % kPerWord * 8 * static_cast<int>(sizeof(T)); }
};

#if defined(__CUDA_ARCH__)

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(BFloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
__device__ inline float to_float(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ inline void round_to(float x, float& to) { to = x; }
__device__ inline void round_to(float x, BFloat16& to) { to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
__device__ inline void round_to(float x, Float16& to) { to.bits = __half_as_ushort(__float2half_rn(x)); }
__device__ inline float add(float a, float b) { return __fadd_rn(a, b); }
__device__ inline float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ inline float divide(float a, float b) { return __fdiv_rn(a, b); }
__device__ inline float reciprocal(float a) { return __frcp_rn(a); }
__device__ inline float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }

// Patches are never written while a kernel runs: they go through the read-only path.
template <int N, Load kHint = kLoad, class T>
__device__ Pack<T, N> load(const T* from) {
  if constexpr (N == 1) {
    return *reinterpret_cast<const Pack<T, N>*>(from);
  } else {
    // Volatile: the compiler would move a plain load to its first use, and the next load would wait for it.
    uint4 bits;
    const auto at = __cvta_generic_to_global(from);
#define SFLLAVA_LOAD(kind)                                              \
  asm volatile("ld.global" kind ".v4.b32 {%0, %1, %2, %3}, [%4];"       \
               : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w) \
               : "l"(at))
    if constexpr (kHint == kLoad) SFLLAVA_LOAD(".nc");
    if constexpr (kHint == kLoadNoAllocate) SFLLAVA_LOAD(".nc.L1::no_allocate");
    if constexpr (kHint == kLoadStreaming) SFLLAVA_LOAD(".cs");
#undef SFLLAVA_LOAD
    return {bits.x, bits.y, bits.z, bits.w};
  }
}

template <Store kHint = kStore, class T, int N>
__device__ void store(T* to, const Pack<T, N>& pack) {
  if constexpr (N == 1) {
    *reinterpret_cast<Pack<T, N>*>(to) = pack;
  } else if constexpr (kHint == kStoreStreaming) {
    __stcs(reinterpret_cast<uint4*>(to), make_uint4(pack.words[0], pack.words[1], pack.words[2], pack.words[3]));
  } else {
    // The compiler splits a plain store into words.
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(pack.words[0]),
                 "r"(pack.words[1]), "r"(pack.words[2]), "r"(pack.words[3])
                 : "memory");
  }
}

#else

template <class T>
float to_float(T x) {
  return widen(x);
}
template <class T>
void round_to(float x, T& to) {
  narrow(x, to);
}
inline float add(float a, float b) { return a + b; }
inline float multiply(float a, float b) { return a * b; }
inline float divide(float a, float b) { return a / b; }
inline float reciprocal(float a) { return 1.0f / a; }
inline float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

// The sanitizer checks that what is said to be aligned is.
template <int N, Load = kLoad, class T>
Pack<T, N> load(const T* from) {
  Pack<T, N> pack;
  std::memcpy(&pack, __builtin_assume_aligned(from, alignof(Pack<T, N>)), sizeof pack);
  return pack;
}
template <Store = kStore, class T, int N>
void store(T* to, const Pack<T, N>& pack) {
  std::memcpy(__builtin_assume_aligned(to, alignof(Pack<T, N>)), &pack, sizeof pack);
}

#endif

template <class T, int N>
SFLLAVA_HOST_DEVICE Pack<T, N> round_pack(const float (&x)[N]) {
  Pack<T, N> pack;
  SFLLAVA_UNROLL
  for (int i = 0; i < N; ++i) {
    T element;
    round_to(x[i], element);
    pack.set(i, element);
  }
  return pack;
}

constexpr float kMostDivided = 64;  // by a reciprocal

// A reduction R in progress.
template <Reduce R, int N>
class Sums {
 public:
  SFLLAVA_HOST_DEVICE Sums() {
    SFLLAVA_UNROLL
    for (int i = 0; i < N; ++i) x_[i] = R == kMax ? -__builtin_inff() : 0.0f;
  }

  // After the first patch. (A sum starts from 0: alone, -0 comes out as 0.)
  template <class T>
  SFLLAVA_HOST_DEVICE explicit Sums(const Pack<T, N>& first) {
    SFLLAVA_UNROLL
    for (int i = 0; i < N; ++i) x_[i] = R == kMax ? to_float(first.get(i)) : add(0.0f, to_float(first.get(i)));
  }

  // Adds, or keeps the larger: NaN passes on, and of equals (0 and -0) the first stays.
  template <class T>
  SFLLAVA_HOST_DEVICE void take(const Pack<T, N>& pack) {
    SFLLAVA_UNROLL
    for (int i = 0; i < N; ++i) {
      const float x = to_float(pack.get(i));
      x_[i] = R == kMean ? add(x_[i], x) : (x > x_[i] || x != x) ? x : x_[i];
    }
  }
  template <class T>
  SFLLAVA_HOST_DEVICE void take(const Pack<T, N>& pack, float weight) {
    static_assert(R == kMean, "only a sum has weights");
    SFLLAVA_UNROLL
    for (int i = 0; i < N; ++i) x_[i] = add(x_[i], multiply(to_float(pack.get(i)), weight));
  }

  // Turns a sum into a mean over a box, one axis after the other.
  SFLLAVA_HOST_DEVICE void finish(int32_t frames, int32_t rows, int32_t cols) {
    if constexpr (R == kMean) {
      SFLLAVA_KEEP_LOOP
      for (int axis = 0; axis < 3; ++axis) {
        const int32_t size = axis == 0 ? frames : axis == 1 ? rows : cols;
        if (size != 1) divide_by(static_cast<float>(size));
      }
    }
  }

  // The same for boxes of one or two rows and columns.
  template <int kRows, int kCols>
  SFLLAVA_HOST_DEVICE void finish() {
    static_assert(kRows <= 2 && kCols <= 2);
    SFLLAVA_UNROLL
    for (int i = 0; R == kMean && i < N; ++i) {
      if (kRows == 2) x_[i] = multiply(x_[i], 0.5f);
      if (kCols == 2) x_[i] = multiply(x_[i], 0.5f);
    }
  }

  SFLLAVA_HOST_DEVICE float get(int i) const { return x_[i]; }

  template <class T>
  SFLLAVA_HOST_DEVICE Pack<T, N> rounded() const {
    return round_pack<T>(x_);
  }

 private:
  // An IEEE division has a branch, which would put N of them one after the other. A quotient by way of the reciprocal,
  // corrected by its own remainder, is rounded as they are where nothing leaves the normal range and the size is small
  // (tests/cpp/division_test.cpp tries all); 0 and -0 stay what they are.
  SFLLAVA_HOST_DEVICE void divide_by(float size) {
    const float share = reciprocal(size);
    float quotient[N];
    bool exact = size <= kMostDivided;
    SFLLAVA_UNROLL
    for (int i = 0; i < N; ++i) {
      const float rough = multiply(x_[i], share), most = __builtin_fabsf(x_[i]);
      quotient[i] = most == 0.0f ? x_[i] : multiply_add(multiply_add(-rough, size, x_[i]), share, rough);
      exact &= most == 0.0f || (most > 1e-30f && most < 1e30f);
    }
    SFLLAVA_UNROLL
    for (int i = 0; exact && i < N; ++i) x_[i] = quotient[i];
    SFLLAVA_UNROLL
    for (int i = 0; !exact && i < N; ++i) x_[i] = divide(x_[i], size);
  }

  float x_[N];
};

}  // namespace sfllava::gpu
