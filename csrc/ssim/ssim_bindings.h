#pragma once

#include <array>
#include <vector>

#include "common/bindings.h"
#include "ssim/ssim.h"

namespace camkernels::ssim_bindings {

using Shape = std::array<int64_t, 4>;
using Weights = std::vector<double>;

View view_of(Pointer data, int dtype, const Shape& strides) {
  return {at<const void>(data), dtype, strides[0], strides[1], strides[2], strides[3]};
}

void run(const Shape& shape, Pointer x, int x_dtype, const Shape& x_strides, Pointer y, int y_dtype,
         const Shape& y_strides, const Weights& rows, const Weights& columns, double c1, double c2,
         bool same, Pointer grad, Pointer values, Pointer grad_x, Pointer grad_y, Pointer scratch,
         int64_t scratch_elements, Pointer sums, int threads) {
  const SsimArguments args{
      {shape[0], shape[1], shape[2], shape[3]},
      view_of(x, x_dtype, x_strides),
      view_of(y, y_dtype, y_strides),
      {rows.data(), columns.data(), (int)rows.size(), (int)columns.size(), c1, c2, same},
      at<const void>(grad),
      at(values),
      at(grad_x),
      at(grad_y),
      at(scratch),
      scratch_elements,
      at<double>(sums),
      threads};
  CAMKERNELS_RUN(ssim, args);
}

void define(py::module_& module) { module.def("ssim", &run, Release()); }

}  // namespace camkernels::ssim_bindings
