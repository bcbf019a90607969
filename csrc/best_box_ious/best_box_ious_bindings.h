#pragma once

#include <array>

#include "best_box_ious/best_box_ious.h"
#include "common/bindings.h"

namespace camkernels::best_box_ious_bindings {

void define(py::module_& module) {
  module.def(
      "best_box_ious",
      [](const std::array<int64_t, 3>& shape, int64_t thresholds, Pointer levels, Pointer boxes,
         Pointer numbers, Pointer scores, Pointer ious, int threads) {
        const BestBoxIous args{shape[0],
                               shape[1],
                               shape[2],
                               thresholds,
                               at<const int32_t>(levels),
                               at<const double>(boxes),
                               at<int32_t>(numbers),
                               at<double>(scores),
                               at<double>(ious),
                               threads};
        CAMKERNELS_RUN(best_box_ious, args);
      },
      Release());
}

}  // namespace camkernels::best_box_ious_bindings
