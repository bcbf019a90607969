#pragma once

#include <array>
#include <vector>

#include "common/bindings.h"
#include "warped_ssim/warped_ssim.h"

namespace camkernels::warped_ssim_bindings {

using Axis = std::array<int64_t, 3>;
using Strides = std::array<int64_t, 3>;
using Weights = std::vector<double>;

WarpAxis axis_of(const Axis& axis) { return {axis[0], axis[1], axis[2]}; }

View view_of(Pointer data, int dtype, const Strides& strides) {
  return {at<const void>(data), dtype, strides[0], 0, strides[1], strides[2]};
}

void run(int64_t batch, const Axis& rows, const Axis& columns, const Axis& other_rows,
         const Axis& other_columns, Pointer boxes, Pointer flips, Pointer maps, int maps_dtype,
         const Strides& maps_strides, Pointer others, int others_dtype,
         const Strides& others_strides, const Weights& window_rows, const Weights& window_columns,
         double c1, double c2, bool same, Pointer grad, Pointer values, Pointer grad_maps,
         Pointer grad_others, Pointer scratch, int64_t scratch_bytes, int threads) {
  const int64_t box[4] = {0, 0, other_rows[1], other_columns[1]};
  const uint8_t flip = 0;
  const WarpedSsimArguments args{
      batch,
      {axis_of(rows), axis_of(columns), at<const int64_t>(boxes), at<const uint8_t>(flips)},
      {axis_of(other_rows), axis_of(other_columns), box, &flip},
      view_of(maps, maps_dtype, maps_strides),
      view_of(others, others_dtype, others_strides),
      {window_rows.data(), window_columns.data(), (int)window_rows.size(),
       (int)window_columns.size(), c1, c2, same},
      at<const void>(grad),
      at(values),
      at(grad_maps),
      at(grad_others),
      at<char>(scratch),
      scratch_bytes,
      threads};
  CAMKERNELS_RUN(warped_ssim, args);
}

void define(py::module_& module) { module.def("warped_ssim", &run, Release()); }

}  // namespace camkernels::warped_ssim_bindings
