#pragma once

#include <array>

#include "common/bindings.h"
#include "warp/warp.h"

namespace camkernels::warp_bindings {

using Axis = std::array<int64_t, 3>;
using Strides = std::array<int64_t, 4>;

WarpArguments arguments(int64_t batch, int64_t channels, const Axis& rows, const Axis& columns,
                        Pointer boxes, Pointer flips, Pointer input, int dtype,
                        const Strides& strides, Pointer output, Pointer scratch,
                        int64_t scratch_bytes, int threads) {
  const Warp warp{{rows[0], rows[1], rows[2]},
                  {columns[0], columns[1], columns[2]},
                  at<const int64_t>(boxes),
                  at<const uint8_t>(flips)};
  const View view{at<const void>(input), dtype, strides[0], strides[1], strides[2], strides[3]};
  return {batch, channels, warp, view, at(output), at<char>(scratch), scratch_bytes, threads};
}

template <class... Args>
void define(py::module_& module, WarpArguments (*make)(Args...)) {
  module.def(
      "warp_fwd",
      [make](Args... args) {
        const WarpArguments made = make(args...);
        CAMKERNELS_RUN(warp_fwd, made);
      },
      Release());
  module.def(
      "warp_bwd",
      [make](Args... args) {
        const WarpArguments made = make(args...);
        CAMKERNELS_RUN(warp_bwd, made);
      },
      Release());
}

void define(py::module_& module) { define(module, &arguments); }

}  // namespace camkernels::warp_bindings
