#pragma once

#include "common/bindings.h"
#include "gradient_error/gradient_error.h"

namespace camkernels::gradient_error_bindings {

void run_fwd(Pointer delta, int delta_dtype, int64_t delta_stride, Pointer guided, int guided_dtype,
             int64_t guided_stride, int64_t batch, int64_t entries, int error, Pointer errors,
             Pointer statistics, Pointer partial, int threads) {
  const GradientErrorForward args{{at(delta), delta_dtype, delta_stride},
                                  {at(guided), guided_dtype, guided_stride},
                                  batch,
                                  entries,
                                  error,
                                  at(errors),
                                  at(statistics),
                                  at<double>(partial),
                                  threads};
  CAMKERNELS_RUN(gradient_error_fwd, args);
}

void run_bwd(Pointer grad_errors, Pointer delta, int delta_dtype, int64_t delta_stride,
             Pointer guided, int guided_dtype, int64_t guided_stride, Pointer statistics,
             Pointer grad_delta, int64_t batch, int64_t entries, int error, bool streaming,
             int threads) {
  const GradientErrorBackward args{at(grad_errors),
                                   {at(delta), delta_dtype, delta_stride},
                                   {at(guided), guided_dtype, guided_stride},
                                   at(statistics),
                                   at(grad_delta),
                                   batch,
                                   entries,
                                   error,
                                   streaming,
                                   threads};
  CAMKERNELS_RUN(gradient_error_bwd, args);
}

void define(py::module_& module) {
  module.attr("GRADIENT_ERROR_BLOCK") = kErrorBlock;
  module.def("gradient_error_fwd", &run_fwd, Release());
  module.def("gradient_error_bwd", &run_bwd, Release());
}

}  // namespace camkernels::gradient_error_bindings
