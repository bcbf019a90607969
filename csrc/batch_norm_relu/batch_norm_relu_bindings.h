#pragma once

#include <array>

#include "batch_norm_relu/batch_norm_relu.h"
#include "common/bindings.h"

namespace camkernels::batch_norm_relu_bindings {

// In the order of TENSORS in camkernels/ops/batch_norm_relu/cpu.py.
using Tensors = std::array<Pointer, 21>;

BatchNorm batch_norm(const std::array<int64_t, 3>& sizes, int dtype, bool channels_last,
                     bool streaming, bool relu, bool guided, bool scaled, double inv_count,
                     int64_t block, int threads, const Tensors& t) {
  return {sizes[0],
          sizes[1],
          sizes[2],
          dtype,
          channels_last,
          streaming,
          relu,
          guided,
          scaled,
          inv_count,
          block,
          threads,
          at(t[0]),
          at(t[1]),
          at(t[2]),
          at(t[3]),
          at(t[4]),                 // z, mean, rstd, gamma, beta
          at<const uint8_t>(t[5]),  // mask
          at(t[6]),
          at(t[7]),
          at(t[8]),  // grad, residual, addend
          at(t[9]),
          at(t[10]),
          at(t[11]),  // grad_grad, _residual, grad_prime
          at(t[12]),
          at(t[13]),
          at(t[14]),
          at(t[15]),  // sums, grad_sums, c_gamma, c_beta
          at(t[16]),
          at(t[17]),
          at<uint8_t>(t[18]),  // out, second_out, out_mask
          at(t[19]),
          at(t[20])};  // results, scratch
}

template <class Kernel, class... Arguments>
void define(py::module_& module, const char* name, Kernel kernel, BatchNorm (*)(Arguments...)) {
  module.def(
      name, [kernel](Arguments... arguments) { kernel(batch_norm(arguments...)); }, Release());
}

void define(py::module_& module) {
  const auto define_kernel = [&](const char* name, auto kernel) {
    define(module, name, kernel, &batch_norm);
  };
  define_kernel("bn_stats", [](const BatchNorm& args) { CAMKERNELS_RUN(bn_stats, args); });
  define_kernel("bn_fwd", [](const BatchNorm& args) { CAMKERNELS_RUN(bn_fwd, args); });
  define_kernel("bn_bwd_reduce",
                [](const BatchNorm& args) { CAMKERNELS_RUN(bn_bwd_reduce, args); });
  define_kernel("bn_bwd", [](const BatchNorm& args) { CAMKERNELS_RUN(bn_bwd, args); });
  define_kernel("bn_bwd_bwd_reduce",
                [](const BatchNorm& args) { CAMKERNELS_RUN(bn_bwd_bwd_reduce, args); });
  define_kernel("bn_bwd_bwd", [](const BatchNorm& args) { CAMKERNELS_RUN(bn_bwd_bwd, args); });
}

}  // namespace camkernels::batch_norm_relu_bindings
