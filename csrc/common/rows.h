// Rows of a tensor of any stride, to and from the type of the sums.
#pragma once

#include "common/vec.h"

namespace camkernels {
namespace CAMKERNELS_ISA {

template <class A, class T>
static void read_row(const T* row, int64_t stride, int64_t count, A* out) {
  constexpr int N = Lanes<A>::count;
  int64_t j = 0;
  if (stride == 1) {
    for (; j + N <= count; j += N) store<A>(out + j, load<A>(row + j));
  }
  for (; j < count; ++j) out[j] = element<A>(row + j * stride);
}

// To neighbouring elements.
template <class A, class T>
static void write_row(const A* row, int64_t count, T* out) {
  constexpr int N = Lanes<A>::count;
  int64_t j = 0;
  for (; j + N <= count; j += N) store<A>(out + j, load<A>(row + j));
  if (j < count) store_partial<A>(out + j, load_partial<A>(row + j, count - j), count - j);
}

// out[0, count) = value.
template <class A, class T>
static void fill_row(A value, int64_t count, T* out) {
  for (int64_t j = 0; j < count; ++j) store_partial<A>(out + j, splat(value), 1);
}

}  // namespace CAMKERNELS_ISA
}  // namespace camkernels
