#pragma once

#include "common/bindings.h"
#include "relu/relu.h"

namespace camkernels::relu_bindings {

void run_relu_fwd(Pointer input, Pointer output, Pointer mask, int64_t count, int dtype,
                  bool streaming, int threads) {
  const ReluForward args{at(input), at(output), at<uint8_t>(mask), count, dtype,
                         streaming, threads};
  CAMKERNELS_RUN(relu_fwd, args);
}

void run_relu_bwd(Pointer grad, Pointer mask, Pointer output, Pointer grad_input, int64_t count,
                  int dtype, bool guided, bool streaming, int threads) {
  const ReluBackward args{at(grad), at<uint8_t>(mask), at(output), at(grad_input), count, dtype,
                          guided,   streaming,         threads};
  CAMKERNELS_RUN(relu_bwd, args);
}

void define(py::module_& module) {
  module.def("relu_fwd", &run_relu_fwd, Release());
  module.def("relu_bwd", &run_relu_bwd, Release());
}

}  // namespace camkernels::relu_bindings
