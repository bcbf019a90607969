// Vectors beyond common/vec.h: one rounding, bits of a mask, whole vectors and the rest of a row.
#pragma once

#include "common/vec.h"

namespace camkernels {
namespace CAMKERNELS_ISA {

// a b + c with one rounding where the machine has it; the compiler is not left to choose, because
// the sign of the result decides about gradients and must be the same in every kernel.
template <class A>
CAMKERNELS_INLINE Vec<A> fused(Vec<A> a, Vec<A> b, Vec<A> c) {
#if defined(CAMKERNELS_ISA_AVX512)
  if constexpr (sizeof(A) == 4) {
    return (Vec<A>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  } else {
    return (Vec<A>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
  }
#elif defined(CAMKERNELS_ISA_AVX2)
  if constexpr (sizeof(A) == 4) {
    return (Vec<A>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  } else {
    return (Vec<A>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
  }
#else
  return a * b + c;
#endif
}

// --- bits of a mask -----------------------------------------------------------------------------

// Bit i from lane i.
template <class A>
CAMKERNELS_INLINE uint32_t bits_of(Mask<A> lanes) {
#if defined(CAMKERNELS_ISA_AVX512)
  if constexpr (sizeof(A) == 4) return _mm512_movepi32_mask((__m512i)lanes);
  if constexpr (sizeof(A) == 8) return _mm512_movepi64_mask((__m512i)lanes);
#elif defined(CAMKERNELS_ISA_AVX2)
  if constexpr (sizeof(A) == 4) return (uint32_t)_mm256_movemask_ps((__m256)lanes);
  if constexpr (sizeof(A) == 8) return (uint32_t)_mm256_movemask_pd((__m256d)lanes);
#elif defined(__SSE2__)
  if constexpr (sizeof(A) == 4) return (uint32_t)_mm_movemask_ps((__m128)lanes);
  if constexpr (sizeof(A) == 8) return (uint32_t)_mm_movemask_pd((__m128d)lanes);
#else
  uint32_t bits = 0;
  for (int i = 0; i < Lanes<A>::count; ++i) bits |= (uint32_t)(lanes[i] & 1) << i;
  return bits;
#endif
}

// Lane i from bit i.
template <class A>
CAMKERNELS_INLINE Mask<A> lanes_of(uint32_t bits) {
  Mask<A> lane;
  for (int i = 0; i < Lanes<A>::count; ++i) lane[i] = 1 << i;
  return ((Mask<A>{} + (int)bits) & lane) != 0;
}

// The bits of `count` elements from element i on, a multiple of the lanes; whole bytes are kept,
// so that vectors of fewer than 8 lanes share one.
template <class A>
CAMKERNELS_INLINE uint32_t load_bits(const uint8_t* row, int64_t i, int64_t count) {
  constexpr int N = Lanes<A>::count;
  const uint32_t byte = row[i / 8];
  if constexpr (N < 8) return byte >> (i % 8);
  if constexpr (N > 8) return count > 8 ? byte | (uint32_t)row[i / 8 + 1] << 8 : byte;
  return byte;
}

template <class A>
CAMKERNELS_INLINE void store_bits(uint8_t* row, int64_t i, int64_t count, uint32_t bits) {
  constexpr int N = Lanes<A>::count;
  bits &= (1u << count) - 1;  // what pads a row is zero
  if constexpr (N < 8) {
    const uint32_t before = i % 8 == 0 ? 0 : row[i / 8];
    row[i / 8] = (uint8_t)(before | bits << (i % 8));
  } else {
    row[i / 8] = (uint8_t)bits;
    if (N > 8 && count > 8) row[i / 8 + 1] = (uint8_t)(bits >> 8);
  }
}

// --- whole vectors and the rest of a row --------------------------------------------------------

struct Whole {
  static constexpr bool value = true;
};
struct Part {
  static constexpr bool value = false;
};

#if defined(CAMKERNELS_ISA_AVX2)
// What load_partial and store_partial do, without a call of memcpy, which spills every register:
// planes of 7 x 7 end with a part each.
template <class A>
CAMKERNELS_INLINE Mask<A> first_lanes(int64_t count) {
  Mask<A> lane;
  for (int i = 0; i < Lanes<A>::count; ++i) lane[i] = i;
  return lane < Mask<A>{} + (int)count;
}

typedef uint64_t Halves __attribute__((vector_size(16)));

// The first count % 4 elements of 16 bits as one number, and back.
CAMKERNELS_INLINE uint64_t read_few(const char* source, int64_t count) {
  uint32_t two = 0;
  uint16_t one = 0;
  if (count & 2) __builtin_memcpy(&two, source, 4);
  if (count & 1) __builtin_memcpy(&one, source + (count & 2) * 2, 2);
  return two | (uint64_t)one << (count & 2 ? 32 : 0);
}

CAMKERNELS_INLINE void write_few(char* target, uint64_t values, int64_t count) {
  if (count & 2) __builtin_memcpy(target, &values, 4);
  const uint64_t rest = count & 2 ? values >> 32 : values;
  if (count & 1) __builtin_memcpy(target + (count & 2) * 2, &rest, 2);
}

template <class A, class T>
CAMKERNELS_INLINE Vec<A> read_part(const T* source, int64_t count) {
  if constexpr (sizeof(T) == 4) {
    return (Vec<A>)_mm256_maskload_ps(source, (__m256i)first_lanes<A>(count));
  } else if constexpr (sizeof(T) == 8) {
    return (Vec<A>)_mm256_maskload_pd(source, (__m256i)first_lanes<A>(count));
  } else {
    const char* bytes = (const char*)source;
    Halves halves = {};
    if (count & 4) {
      __builtin_memcpy(&halves, bytes, 8);
      halves[1] = read_few(bytes + 8, count);
    } else {
      halves[0] = read_few(bytes, count);
    }
    return widen(bit_cast<Bits16>(halves), T{});
  }
}

template <class A, class T>
CAMKERNELS_INLINE void write_part(T* target, Vec<A> value, int64_t count) {
  if constexpr (sizeof(T) == 4) {
    _mm256_maskstore_ps(target, (__m256i)first_lanes<A>(count), (__m256)value);
  } else if constexpr (sizeof(T) == 8) {
    _mm256_maskstore_pd(target, (__m256i)first_lanes<A>(count), (__m256d)value);
  } else {
    const Halves halves = bit_cast<Halves>(narrow(value, T{}));
    char* bytes = (char*)target;
    if (count & 4) __builtin_memcpy(bytes, &halves, 8);
    const int64_t done = count & 4;
    write_few(bytes + 2 * done, done ? halves[1] : halves[0], count);
  }
}
#else
template <class A, class T>
CAMKERNELS_INLINE Vec<A> read_part(const T* source, int64_t count) {
  return load_partial<A>(source, count);
}

template <class A, class T>
CAMKERNELS_INLINE void write_part(T* target, Vec<A> value, int64_t count) {
  store_partial<A>(target, value, count);
}
#endif

template <class A, class Kind, class T>
CAMKERNELS_INLINE Vec<A> read(Kind, const T* source, int64_t count) {
  if constexpr (Kind::value) return load<A>(source);
  return read_part<A>(source, count);
}

// Rounds as narrow() of vec.h does, but looks for no NaN: rounding keeps those whose lower half is
// zero (of bfloat16 inputs) and the processor's own, and values per channel have no others.
CAMKERNELS_INLINE Bits16 narrow_fast(Vec<float> value) {
  const Bits32 bits = bit_cast<Bits32>(value);
  const Bits32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
#if defined(CAMKERNELS_ISA_AVX2)
  const __m256i packed = _mm256_packus_epi32((__m256i)rounded, (__m256i)rounded);
  return (Bits16)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0xd8));
#else
  return __builtin_convertvector(rounded, Bits16);
#endif
}

template <class T>
constexpr bool is_bfloat16(T*) {
  return false;
}
constexpr bool is_bfloat16(bfloat16*) { return true; }

CAMKERNELS_INLINE void put_bfloat16(bfloat16* target, Vec<float> value, bool streaming) {
  const Bits16 bits = narrow_fast(value);
#if defined(CAMKERNELS_ISA_AVX512)
  if (streaming) return _mm256_stream_si256((__m256i*)target, (__m256i)bits);
#elif defined(CAMKERNELS_ISA_AVX2)
  if (streaming) return _mm_stream_si128((__m128i*)target, (__m128i)bits);
#endif
  (void)streaming;
  __builtin_memcpy(target, &bits, sizeof(bits));
}

template <class A, class T>
CAMKERNELS_INLINE void put(T* target, Vec<A> value, bool streaming) {
  if constexpr (is_bfloat16(static_cast<T*>(nullptr))) {
    put_bfloat16(target, value, streaming);
  } else if (streaming) {
    stream<A>(target, value);
  } else {
    store<A>(target, value);
  }
}

template <class A, class Kind, class T>
CAMKERNELS_INLINE void write(Kind, T* target, Vec<A> value, int64_t count, bool streaming) {
  if constexpr (!Kind::value) {
    write_part<A>(target, value, count);
  } else {
    put<A>(target, value, streaming);
  }
}

// body(kind, i, count) for the vectors of [0, length).
template <class A, class Body>
CAMKERNELS_INLINE void each_vector(int64_t length, const Body& body) {
  constexpr int N = Lanes<A>::count;
  int64_t i = 0;
  for (; i + N <= length; i += N) body(Whole{}, i, (int64_t)N);
  if (i < length) body(Part{}, i, length - i);
}

}  // namespace CAMKERNELS_ISA
}  // namespace camkernels
