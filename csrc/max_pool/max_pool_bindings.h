#pragma once

#include <array>

#include "common/bindings.h"
#include "max_pool/max_pool.h"

namespace camkernels::max_pool_bindings {

// input, output, kernel, stride, padding, dilation.
using Axis = std::array<int64_t, 6>;

PoolAxis axis_of(const Axis& axis) {
  return {axis[0], axis[1], axis[2], axis[3], axis[4], axis[5]};
}

MaxPool arguments(Pointer input, Pointer positions, Pointer output, Pointer scratch, int64_t batch,
                  int64_t channels, const Axis& rows, const Axis& columns, int dtype,
                  bool channels_last, int threads) {
  return {at<const void>(input),
          at<uint8_t>(positions),
          at(output),
          at<float>(scratch),
          batch,
          channels,
          axis_of(rows),
          axis_of(columns),
          dtype,
          channels_last,
          threads};
}

// Deduces the arguments of a MaxPool for the three kernels.
template <class... Args>
void define(py::module_& module, MaxPool (*make)(Args...)) {
  module.def(
      "max_pool_fwd",
      [make](Args... args) {
        const MaxPool pool = make(args...);
        CAMKERNELS_RUN(max_pool_fwd, pool);
      },
      Release());
  module.def(
      "max_pool_gather",
      [make](Args... args) {
        const MaxPool pool = make(args...);
        CAMKERNELS_RUN(max_pool_gather, pool);
      },
      Release());
  module.def(
      "max_pool_scatter",
      [make](Args... args) {
        const MaxPool pool = make(args...);
        CAMKERNELS_RUN(max_pool_scatter, pool);
      },
      Release());
}

void define(py::module_& module) { define(module, &arguments); }

}  // namespace camkernels::max_pool_bindings
