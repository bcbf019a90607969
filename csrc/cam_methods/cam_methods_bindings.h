#pragma once

#include <array>

#include "cam_methods/cam_methods.h"
#include "common/bindings.h"

namespace camkernels::cam_methods_bindings {

using Four = std::array<int64_t, 4>;

View view_of(Pointer data, int dtype, const Four& strides) {
  return {at<const void>(data), dtype, strides[0], strides[1], strides[2], strides[3]};
}

void run_cam_weights(const Four& shape, Pointer activations, int dtype,
                     const Four& activations_strides, Pointer gradients,
                     const Four& gradients_strides, int method, double eps, Pointer weights,
                     Pointer grad, Pointer to_activations, bool activations_last,
                     Pointer to_gradients, bool gradients_last, int threads) {
  const CamWeights args{{shape[0], shape[1], shape[2], shape[3]},
                        view_of(activations, dtype, activations_strides),
                        view_of(gradients, dtype, gradients_strides),
                        method,
                        eps,
                        at(weights),
                        at<const void>(grad),
                        {at(to_activations), activations_last},
                        {at(to_gradients), gradients_last},
                        threads};
  CAMKERNELS_RUN(cam_weights, args);
}

void run_cam_pixels(const Four& shape, Pointer activations, int dtype,
                    const Four& activations_strides, Pointer gradients,
                    const Four& gradients_strides, bool positive, bool relu, Pointer maps,
                    Pointer partial, int64_t block, Pointer grad, Pointer to_activations,
                    bool activations_last, Pointer to_gradients, bool gradients_last, int threads) {
  const CamPixels args{{shape[0], shape[1], shape[2], shape[3]},
                       view_of(activations, dtype, activations_strides),
                       view_of(gradients, dtype, gradients_strides),
                       positive,
                       relu,
                       at(maps),
                       at(partial),
                       block,
                       at<const void>(grad),
                       {at(to_activations), activations_last},
                       {at(to_gradients), gradients_last},
                       threads};
  CAMKERNELS_RUN(cam_pixels, args);
}

void define(py::module_& module) {
  module.def("cam_weights", &run_cam_weights, Release());
  module.def("cam_pixels", &run_cam_pixels, Release());
}

}  // namespace camkernels::cam_methods_bindings
