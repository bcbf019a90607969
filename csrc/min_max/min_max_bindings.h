#pragma once

#include <array>

#include "common/bindings.h"
#include "min_max/min_max.h"

namespace camkernels::min_max_bindings {

using Three = std::array<int64_t, 3>;

MinMax arguments(const Three& shape, Pointer maps, int dtype, const Three& strides, Pointer grad,
                 const Three& grad_strides, Pointer extremes, Pointer out, int threads) {
  return {{shape[0], 1, shape[1], shape[2]},
          {at<const void>(maps), dtype, strides[0], 0, strides[1], strides[2]},
          at<const void>(grad),
          grad_strides[0],
          grad_strides[1],
          grad_strides[2],
          at(extremes),
          at(out),
          threads};
}

template <class... Args>
void define(py::module_& module, MinMax (*make)(Args...)) {
  module.def(
      "min_max_fwd",
      [make](Args... args) {
        const MinMax made = make(args...);
        CAMKERNELS_RUN(min_max_fwd, made);
      },
      Release());
  module.def(
      "min_max_bwd",
      [make](Args... args) {
        const MinMax made = make(args...);
        CAMKERNELS_RUN(min_max_bwd, made);
      },
      Release());
}

void define(py::module_& module) { define(module, &arguments); }

}  // namespace camkernels::min_max_bindings
