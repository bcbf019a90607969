#pragma once

#include <array>

#include "common/bindings.h"
#include "lp_norm/lp_norm.h"

namespace camkernels::lp_norm_bindings {

using Three = std::array<int64_t, 3>;
using Two = std::array<int64_t, 2>;

void run(const Three& shape, const Two& size, bool enlarges, Pointer values, int dtype,
         const Three& strides, double p, Pointer norms, Pointer grad_norms, Pointer out,
         Pointer scratch, int64_t scratch_bytes, int threads) {
  const int64_t box[4] = {0, 0, size[0], size[1]};
  const uint8_t flip = 0;
  const LpNorm args{{shape[0], 1, shape[1], shape[2]},
                    {at<const void>(values), dtype, strides[0], 0, strides[1], strides[2]},
                    {{shape[1], size[0], size[0]}, {shape[2], size[1], size[1]}, box, &flip},
                    enlarges,
                    p,
                    at(norms),
                    at<const void>(grad_norms),
                    at(out),
                    at<char>(scratch),
                    scratch_bytes,
                    threads};
  CAMKERNELS_RUN(lp_norm, args);
}

void define(py::module_& module) { module.def("lp_norm", &run, Release()); }

}  // namespace camkernels::lp_norm_bindings
