// What the two directions of gradient_error share: rows in the type of the sums, sums in double
// (squares of 1e30 fit, and long sums round little), the sigmoid.
#pragma once

#include "common/vec.h"
#include "gradient_error/gradient_error.h"

namespace camkernels {
namespace CAMKERNELS_ISA {

// Entries that are widened at a time, in the first-level cache.
constexpr int64_t kChunk = 512;

template <class A>
constexpr int kDTypeOf = sizeof(A) == 8 ? (int)kFloat64 : (int)kFloat32;

// `count` entries in the type of the sums: where they lie, or widened into `buffer`.
template <class A>
static const A* widened(const Rows& rows, int64_t b, int64_t first, int64_t count, A* buffer) {
  const int64_t offset = b * rows.stride + first;
  if (rows.dtype == kDTypeOf<A>) return static_cast<const A*>(rows.data) + offset;
  constexpr int N = Lanes<A>::count;
  CAMKERNELS_SWITCH(A, rows.dtype, {
    const T* source = static_cast<const T*>(rows.data) + offset;
    int64_t i = 0;
    for (; i + N <= count; i += N) store<A>(buffer + i, load<A>(source + i));
    if (i < count) store_partial<A>(buffer + i, load_partial<A>(source + i, count - i), count - i);
  });
  return buffer;
}

// visit(d, g) for vectors of entries; lanes behind the last entry are 0 on both sides.
template <class A, class Visit>
static CAMKERNELS_INLINE void each(const A* d, const A* g, int64_t count, const Visit& visit) {
  constexpr int N = Lanes<A>::count;
  int64_t i = 0;
  for (; i + N <= count; i += N) visit(load<A>(d + i), load<A>(g + i));
  if (i < count) visit(load_partial<A>(d + i, count - i), load_partial<A>(g + i, count - i));
}

// A sum of vectors, in double.
template <class A>
struct Sum {
  Vec<double> low = {}, high = {};

  static CAMKERNELS_INLINE void widen(Vec<A> value, Vec<double>* low, Vec<double>* high) {
    if constexpr (sizeof(A) == 8) {
      *low = value;
      *high = Vec<double>{};
    } else {
      typedef float Half __attribute__((vector_size(CAMKERNELS_VECTOR_BYTES / 2)));
      Half halves[2];
      __builtin_memcpy(halves, &value, sizeof(value));
      *low = __builtin_convertvector(halves[0], Vec<double>);
      *high = __builtin_convertvector(halves[1], Vec<double>);
    }
  }

  CAMKERNELS_INLINE void add(Vec<A> value) {
    Vec<double> l, h;
    widen(value, &l, &h);
    low += l;
    high += h;
  }

  // The product itself is taken in double.
  CAMKERNELS_INLINE void add(Vec<A> one, Vec<A> other) {
    Vec<double> l, h, m, k;
    widen(one, &l, &h);
    widen(other, &m, &k);
    low += l * m;
    high += h * k;
  }

  double total() const { return sum_lanes<double>(low + high); }
};

template <class A>
CAMKERNELS_INLINE Vec<A> magnitude(Vec<A> x) {
  return x < 0 ? -x : x;
}

// exp(y) for y <= 0, within 2 units in the last place; NaN passes.
CAMKERNELS_INLINE Vec<float> exp_negative(Vec<float> y) {
  typedef Mask<float> Int;
  y = y < -110.0f ? splat(-110.0f) : y;  // 0 in float32, denormals included
  const Int k = __builtin_convertvector(y * 1.44269504f - 0.5f, Int);
  const Vec<float> e = __builtin_convertvector(k, Vec<float>);
  // ln 2 = 355/512 - 2.12e-4: e times the first part is exact.
  const Vec<float> r = (y - e * 0.693359375f) + e * 2.12194440054690583e-4f;
  const Vec<float> series =
      1.0f +
      r * (1.0f +
           r * (1.0f / 2 +
                r * (1.0f / 6 +
                     r * (1.0f / 24 + r * (1.0f / 120 + r * (1.0f / 720 + r * (1.0f / 5040)))))));
  // 2^k in two factors, since k may be below the smallest exponent.
  const Int half = k >> 1, rest = k - half;
  return series * bit_cast<Vec<float>>((half + 127) << 23) *
         bit_cast<Vec<float>>((rest + 127) << 23);
}

CAMKERNELS_INLINE Vec<double> exp_negative(Vec<double> y) {
  Vec<double> result = {};
  for (int i = 0; i < Lanes<double>::count; ++i) result[i] = __builtin_exp(y[i]);
  return result;
}

// sigma(x), and sigma'(x); neither cancels at either end. Infinity is no place to be finite.
template <class A>
CAMKERNELS_INLINE void sigmoid(Vec<A> x, Vec<A>* value, Vec<A>* slope) {
  const Vec<A> t = exp_negative(-magnitude<A>(x)), inverse = (A)1 / ((A)1 + t);
  *value = (x < 0 ? t : splat((A)1)) * inverse + (x - x);
  *slope = t * inverse * inverse;
}

template <class A>
constexpr double kTiny = sizeof(A) == 8 ? 2.2250738585072014e-308 : 1.17549435082228751e-38;

}  // namespace CAMKERNELS_ISA
}  // namespace camkernels
