// Vectors as wide as the instruction set has, and conversion of float32, bfloat16, float16 and
// float64 to and from the type of the sums.
#pragma once

#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/isa.h"
#include "common/view.h"

#if defined(CAMKERNELS_ISA_AVX512)
#define CAMKERNELS_VECTOR_BYTES 64
#elif defined(CAMKERNELS_ISA_AVX2)
#define CAMKERNELS_VECTOR_BYTES 32
#else
#define CAMKERNELS_VECTOR_BYTES 16
#endif
#define CAMKERNELS_INLINE inline __attribute__((always_inline))

namespace camkernels {
namespace CAMKERNELS_ISA {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class A>
struct Lanes;
template <>
struct Lanes<float> {
  static constexpr int count = CAMKERNELS_VECTOR_BYTES / 4;
  typedef float type __attribute__((vector_size(CAMKERNELS_VECTOR_BYTES)));
  typedef int32_t mask __attribute__((vector_size(CAMKERNELS_VECTOR_BYTES)));
};
template <>
struct Lanes<double> {
  static constexpr int count = CAMKERNELS_VECTOR_BYTES / 8;
  typedef double type __attribute__((vector_size(CAMKERNELS_VECTOR_BYTES)));
  typedef int64_t mask __attribute__((vector_size(CAMKERNELS_VECTOR_BYTES)));
};
template <class A>
using Vec = typename Lanes<A>::type;
template <class A>
using Mask = typename Lanes<A>::mask;

typedef uint32_t Bits32 __attribute__((vector_size(CAMKERNELS_VECTOR_BYTES)));
typedef uint16_t Bits16 __attribute__((vector_size(CAMKERNELS_VECTOR_BYTES / 2)));

template <class A>
CAMKERNELS_INLINE Vec<A> splat(A value) {
  return value - Vec<A>{};
}

template <class To, class From>
CAMKERNELS_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

// --- 16-bit types by integer arithmetic; round to nearest, ties to even -------------------------

CAMKERNELS_INLINE Vec<float> widen(Bits16 bits, bfloat16) {
#if defined(CAMKERNELS_ISA_AVX2)
  // One instruction, where GCC 12 makes five of the conversion below.
  return (Vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)bits), 16);
#else
  return bit_cast<Vec<float>>(__builtin_convertvector(bits, Bits32) << 16);
#endif
}

CAMKERNELS_INLINE Bits16 narrow(Vec<float> value, bfloat16) {
  const Bits32 bits = bit_cast<Bits32>(value);
  const Bits32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits32 nan = Bits32{} + 0x7fc0u;
  return __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded, Bits16);
}

#if defined(CAMKERNELS_ISA_AVX512)
// The masked forms, with all lanes: GCC 12 warns of undefined lanes inside the plain ones.
CAMKERNELS_INLINE Vec<float> widen(Bits16 bits, float16) {
  return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)bits);
}
CAMKERNELS_INLINE Bits16 narrow(Vec<float> value, float16) {
  return (Bits16)_mm512_maskz_cvtps_ph(0xffff, (__m512)value, _MM_FROUND_TO_NEAREST_INT);
}
#elif defined(CAMKERNELS_ISA_AVX2)
CAMKERNELS_INLINE Vec<float> widen(Bits16 bits, float16) {
  return (Vec<float>)_mm256_cvtph_ps((__m128i)bits);
}
CAMKERNELS_INLINE Bits16 narrow(Vec<float> value, float16) {
  return (Bits16)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
}
#else
CAMKERNELS_INLINE Vec<float> widen(Bits16 half, float16) {
  const Bits32 bits = __builtin_convertvector(half, Bits32);
  const Bits32 magnitude = bits & 0x7fffu, sign = (bits & 0x8000u) << 16;
  const Bits32 normal = (magnitude << 13) + 0x38000000u;  // exponent bias 15 -> 127
  const Bits32 special = (magnitude << 13) | 0x7f800000u;
  // A subnormal is magnitude * 2^-24: as mantissa of 0.5, less 0.5. Safe where denormals flush.
  const Vec<float> half_plus = bit_cast<Vec<float>>(magnitude | 0x3f000000u);
  const Bits32 subnormal = bit_cast<Bits32>(half_plus - 0.5f);
  const Bits32 finite = magnitude < 0x0400u ? subnormal : normal;
  return bit_cast<Vec<float>>((magnitude >= 0x7c00u ? special : finite) | sign);
}
CAMKERNELS_INLINE Bits16 narrow(Vec<float> value, float16) {
  const Bits32 bits = bit_cast<Bits32>(value);
  const Bits32 magnitude = bits & 0x7fffffffu, sign = (bits >> 16) & 0x8000u;
  const Bits32 normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  // Below 2^-14 the unit is 2^-24, which is the last place of 0.5: adding it rounds.
  const Bits32 small = bit_cast<Bits32>(bit_cast<Vec<float>>(magnitude) + 0.5f) - 0x3f000000u;
  const Bits32 infinite = Bits32{} + 0x7c00u, nan = Bits32{} + 0x7e00u;
  Bits32 result = magnitude < 0x38800000u ? small : normal;
  result = magnitude >= 0x477ff000u ? infinite : result;  // from 65520 on
  result = magnitude > 0x7f800000u ? nan : result;
  return __builtin_convertvector(result | sign, Bits16);
}
#endif

// --- loads and stores ---------------------------------------------------------------------------

template <class A, class T>
CAMKERNELS_INLINE Vec<A> load(const T* source) {
  if constexpr (sizeof(T) == sizeof(A)) {
    Vec<A> value;
    __builtin_memcpy(&value, source, sizeof(value));
    return value;
  } else {
    Bits16 bits;
    __builtin_memcpy(&bits, source, sizeof(bits));
    return widen(bits, T{});
  }
}

// The first `count` lanes; zero in the others. Reads nothing beyond.
template <class A, class T>
CAMKERNELS_INLINE Vec<A> load_partial(const T* source, int64_t count) {
#if defined(CAMKERNELS_ISA_AVX512)
  if constexpr (sizeof(T) == 4) {
    return (Vec<A>)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), source);
  } else if constexpr (sizeof(T) == 2) {
    const __mmask16 lanes = (__mmask16)((1u << count) - 1);
    return widen((Bits16)_mm256_maskz_loadu_epi16(lanes, source), T{});
  }
#endif
  T buffer[Lanes<A>::count] = {};
  for (int64_t i = 0; i < count; ++i) buffer[i] = source[i];
  return load<A>(buffer);
}

template <class A, class T>
CAMKERNELS_INLINE void store(T* target, Vec<A> value) {
  if constexpr (sizeof(T) == sizeof(A)) {
    __builtin_memcpy(target, &value, sizeof(value));
  } else {
    const Bits16 bits = narrow(value, T{});
    __builtin_memcpy(target, &bits, sizeof(bits));
  }
}

template <class A, class T>
CAMKERNELS_INLINE void store_partial(T* target, Vec<A> value, int64_t count) {
#if defined(CAMKERNELS_ISA_AVX512)
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(target, (__mmask16)((1u << count) - 1), (__m512)value);
    return;
  }
#endif
  T buffer[Lanes<A>::count];
  store<A>(buffer, value);
  for (int64_t i = 0; i < count; ++i) target[i] = buffer[i];
}

// Past the caches, to an address aligned to the vector stored: no line is read before it is
// written. Such stores are unordered until stream_fence().
template <class A, class T>
CAMKERNELS_INLINE void stream(T* target, Vec<A> value) {
#if defined(CAMKERNELS_ISA_AVX512)
  if constexpr (sizeof(T) == 2) {
    _mm256_stream_si256((__m256i*)target, (__m256i)narrow(value, T{}));
  } else {
    _mm512_stream_si512((__m512i*)target, (__m512i)value);
  }
#elif defined(CAMKERNELS_ISA_AVX2)
  if constexpr (sizeof(T) == 2) {
    _mm_stream_si128((__m128i*)target, (__m128i)narrow(value, T{}));
  } else {
    _mm256_stream_si256((__m256i*)target, (__m256i)value);
  }
#elif defined(__SSE2__)
  if constexpr (sizeof(T) == 2) {
    store<A>(target, value);
  } else {
    _mm_stream_si128((__m128i*)target, (__m128i)value);
  }
#else
  store<A>(target, value);
#endif
}

CAMKERNELS_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// One element, in the type of the sums.
template <class A, class T>
CAMKERNELS_INLINE A element(const T* source) {
  if constexpr (sizeof(T) == sizeof(A)) {
    return (A)*source;
  } else {
    return widen(Bits16{source->bits}, T{})[0];
  }
}

// --- arithmetic ---------------------------------------------------------------------------------

// Sum of the lanes, always in the same order: halves are added until one lane is left. Exchanges
// of lanes stay in registers; through memory this was most of the time of a short row.
template <class A>
CAMKERNELS_INLINE A sum_lanes(Vec<A> value) {
#if defined(__GNUC__) && !defined(__clang__)
  typedef Mask<A> Index;
  constexpr int N = Lanes<A>::count;
  Index lane;
  for (int i = 0; i < N; ++i) lane[i] = i;
#pragma GCC unroll 4
  for (int width = N / 2; width > 0; width /= 2) value += __builtin_shuffle(value, lane ^ width);
  return value[0];
#else
  A lanes[Lanes<A>::count];
  __builtin_memcpy(lanes, &value, sizeof(value));
  for (int width = Lanes<A>::count / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
#endif
}

template <class A>
CAMKERNELS_INLINE Vec<A> lane_index() {
  Vec<A> index;
  for (int i = 0; i < Lanes<A>::count; ++i) index[i] = (A)i;
  return index;
}

// Natural logarithm of positive values, within 2 units in the last place; NaN and Inf pass.
CAMKERNELS_INLINE Vec<float> log_positive(Vec<float> x) {
  typedef Mask<float> Int;
  const Vec<float> one = splat(1.0f);
  const Int denormal = x < 1.17549435e-38f;
  const Vec<float> normal = denormal ? x * 8388608.0f : x;
  const Int bits = bit_cast<Int>(normal);
  // x = m 2^e with m in [sqrt(1/2), sqrt(2)): counting the exponent from the bits of sqrt(1/2).
  const Int offset = bits - 0x3f3504f3;
  const Int exponent = (offset >> 23) + (denormal ? Int{} - 23 : Int{});
  const Vec<float> m = bit_cast<Vec<float>>((offset & 0x007fffff) + 0x3f3504f3);
  const Vec<float> e = __builtin_convertvector(exponent, Vec<float>);
  // ln m = 2 atanh(s) with s = (m - 1) / (m + 1); written so that the leading term r is exact.
  const Vec<float> r = m - one, s = r / (m + one), z = s * s;
  const Vec<float> series =
      z * (2.0f / 3 + z * (2.0f / 5 + z * (2.0f / 7 + z * (2.0f / 9))));  // next: below 1e-9
  const Vec<float> half = 0.5f * r * r;
  const Vec<float> log_m = r - (half - s * (half + series));
  // ln 2 = 355/512 - 2.12e-4: e times the first part is exact.
  const Vec<float> result = e * 0.693359375f + (log_m - e * 2.12194440054690583e-4f);
  return x < __builtin_inff() ? result : x;
}

CAMKERNELS_INLINE Vec<double> log_positive(Vec<double> x) {
  Vec<double> result = {};
  for (int i = 0; i < Lanes<double>::count; ++i) result[i] = __builtin_log(x[i]);
  return result;
}

}  // namespace CAMKERNELS_ISA
}  // namespace camkernels

// Runs `statement` with T the element type of `dtype`. A is the type of sums: float64 goes with
// float64 only, which the caller has seen to.
#define CAMKERNELS_SWITCH(A, dtype, ...) \
  if constexpr (sizeof(A) == 8) {        \
    typedef double T;                    \
    __VA_ARGS__;                         \
  } else if ((dtype) == kBFloat16) {     \
    typedef bfloat16 T;                  \
    __VA_ARGS__;                         \
  } else if ((dtype) == kFloat16) {      \
    typedef float16 T;                   \
    __VA_ARGS__;                         \
  } else {                               \
    typedef float T;                     \
    __VA_ARGS__;                         \
  }
