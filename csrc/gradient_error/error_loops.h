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

// Vectors that are added in the type of the sums before they are added in double.
constexpr int kRun = 8;

// A sum of vectors, in double; those of a run first among themselves, since widening each would
// cost more than what is summed.
template <class A>
struct Sum {
  Vec<A> run = {};
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

  CAMKERNELS_INLINE void add(Vec<A> value) { run += value; }

  CAMKERNELS_INLINE void fold() {
    Vec<double> l, h;
    widen(run, &l, &h);
    low += l;
    high += h;
    run = Vec<A>{};
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

// visit(d, g) for vectors of entries, which adds to `sums`; lanes behind the last entry are 0 on
// both sides.
template <class A, class Visit, class... Sums>
static CAMKERNELS_INLINE void each(const A* d, const A* g, int64_t count, const Visit& visit,
                                   Sums&... sums) {
  constexpr int N = Lanes<A>::count;
  int64_t i = 0;
  for (; i + kRun * N <= count; i += kRun * N) {
    for (int k = 0; k < kRun; ++k) visit(load<A>(d + i + k * N), load<A>(g + i + k * N));
    (sums.fold(), ...);
  }
  for (; i + N <= count; i += N) visit(load<A>(d + i), load<A>(g + i));
  if (i < count) visit(load_partial<A>(d + i, count - i), load_partial<A>(g + i, count - i));
  (sums.fold(), ...);
}

// |x|: one instruction, where a comparison and a choice take three.
template <class A>
CAMKERNELS_INLINE Vec<A> magnitude(Vec<A> x) {
  typedef Mask<A> Int;
  constexpr auto sign = (decltype(Int{}[0] + 0))1 << (8 * sizeof(A) - 1);
  return bit_cast<Vec<A>>(bit_cast<Int>(x) & ~sign);
}

// exp(y) for y <= 0, within 2 units in the last place; 0 below -87, where it is hardly a normal
// number; NaN passes.
CAMKERNELS_INLINE Vec<float> exp_negative(Vec<float> y) {
  typedef Mask<float> Int;
  const Int dead = y < -87.0f;
  // 1.5 2^23 has units in its last place: a sum with it is rounded to them and lies in its low
  // bits, here with the bias of exponents.
  const Vec<float> magic = splat(12582912.0f + 127.0f);
  const Vec<float> shifted = y * 1.44269504f + magic;
  const Vec<float> e = shifted - magic;
  // ln 2 = 355/512 - 2.12e-4: e times the first part is exact.
  const Vec<float> r = (y - e * 0.693359375f) + e * 2.12194440054690583e-4f;
  // Least relative error over |r| <= ln(2) / 2: 2e-9. By pairs: from the innermost on, each step
  // would wait for the one before.
  const Vec<float> square = r * r;
  const Vec<float> high = (0.041668225f + r * 0.008374827f) + square * 0.0013836832f;
  const Vec<float> middle = (0.4999999f + r * 0.1666642f) + square * high;
  const Vec<float> series = (1.0f + r) + square * middle;
  const Vec<float> power = bit_cast<Vec<float>>(bit_cast<Int>(shifted) << 23);
  return bit_cast<Vec<float>>(bit_cast<Int>(series * power) & ~dead);
}

CAMKERNELS_INLINE Vec<double> exp_negative(Vec<double> y) {
  Vec<double> result = {};
  for (int i = 0; i < Lanes<double>::count; ++i) result[i] = __builtin_exp(y[i]);
  return result;
}

// sigma(x), and sigma'(x); neither cancels at either end. NaN passes.
template <class A>
CAMKERNELS_INLINE void sigmoid(Vec<A> x, Vec<A>* value, Vec<A>* slope) {
  const Vec<A> t = exp_negative(-magnitude<A>(x)), inverse = (A)1 / ((A)1 + t);
  const Vec<A> smaller = t * inverse;
  *value = bit_cast<Mask<A>>(x) < 0 ? smaller : inverse;
  *slope = smaller * inverse;
}

template <class A>
constexpr double kTiny = sizeof(A) == 8 ? 2.2250738585072014e-308 : 1.17549435082228751e-38;

}  // namespace CAMKERNELS_ISA
}  // namespace camkernels
