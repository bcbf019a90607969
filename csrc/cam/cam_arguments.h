// What Python passes of cam and of the statistics, as the kernels' arguments: for C++ and for CUDA.
#pragma once

#include <array>
#include <type_traits>

#include "cam/cam.h"
#include "common/bindings.h"
#include "map_statistics/map_statistics.h"

namespace camkernels {

using Shape = std::array<int64_t, 4>;
using Pointers = std::array<Pointer, kStatistics>;

inline Sizes sizes_of(const Shape& shape) { return {shape[0], shape[1], shape[2], shape[3]}; }

inline View view_of(Pointer data, int dtype, const Shape& strides) {
  return {at<const void>(data), dtype, strides[0], strides[1], strides[2], strides[3]};
}

inline CamForward cam_forward(const Shape& shape, Pointer activations, int activations_dtype,
                              const Shape& activations_strides, Pointer gradients,
                              int gradients_dtype, const Shape& gradients_strides, Pointer alpha,
                              Pointer partial, Pointer maps, int64_t block, bool relu,
                              int threads) {
  return {sizes_of(shape),
          view_of(activations, activations_dtype, activations_strides),
          view_of(gradients, gradients_dtype, gradients_strides),
          at(alpha),
          at(partial),
          at(maps),
          block,
          relu,
          threads};
}

inline CamBackward cam_backward(const Shape& shape, Pointer grad_maps, int dtype,
                                const Shape& grad_maps_strides, Pointer maps, Pointer activations,
                                int activations_dtype, const Shape& activations_strides,
                                Pointer grad_alpha, Pointer alpha, Pointer grad_activations,
                                int grad_dtype, bool channels_last, bool streaming, Pointer masked,
                                int64_t block, int threads) {
  return {sizes_of(shape),
          view_of(grad_maps, dtype, grad_maps_strides),
          at<const void>(maps),
          view_of(activations, activations_dtype, activations_strides),
          at(grad_alpha),
          at<const void>(alpha),
          at(grad_activations),
          grad_dtype,
          channels_last,
          streaming,
          at(masked),
          block,
          threads};
}

template <class T>
void copy_pointers(const Pointers& from, T** to) {
  for (int i = 0; i < kStatistics; ++i) to[i] = at<T>(from[i]);
}

inline StatisticsForward statistics_forward(const Shape& shape, Pointer maps, int dtype,
                                            const Shape& strides, bool clamp,
                                            const Pointers& statistics, Pointer scratch,
                                            int threads) {
  StatisticsForward args{sizes_of(shape), view_of(maps, dtype, strides), clamp, {}, at(scratch),
                         threads};
  copy_pointers(statistics, args.statistics);
  return args;
}

inline StatisticsBackward statistics_backward(const Shape& shape, Pointer maps, int dtype,
                                              const Shape& strides, bool clamp,
                                              const Pointers& statistics, const Pointers& grads,
                                              Pointer grad_maps, Pointer scratch, int threads) {
  StatisticsBackward args{
      sizes_of(shape), view_of(maps, dtype, strides), clamp, {}, {}, at(grad_maps), at(scratch),
      threads};
  copy_pointers(statistics, args.statistics);
  copy_pointers(grads, args.grads);
  return args;
}

// Binds one call; the pack is what the function above takes.
template <class Runs, class Arguments, class... Given>
void define_by(py::module_& module, Arguments (*)(Given...)) {
  if constexpr (std::is_same_v<Arguments, CamForward>) {
    module.def("cam_fwd", &Runs::template cam_fwd<Given...>, Release());
    module.def("cam_statistics_fwd", &Runs::template cam_statistics_fwd<Given...>, Release());
  } else if constexpr (std::is_same_v<Arguments, CamBackward>) {
    module.def("cam_bwd", &Runs::template cam_bwd<Given...>, Release());
    module.def("cam_statistics_bwd", &Runs::template cam_statistics_bwd<Given...>, Release());
  } else if constexpr (std::is_same_v<Arguments, StatisticsForward>) {
    module.def("map_statistics_fwd", &Runs::template map_statistics_fwd<Given...>, Release());
  } else {
    module.def("map_statistics_bwd", &Runs::template map_statistics_bwd<Given...>, Release());
  }
}

// Binds the calls of cam and of the statistics: `Runs` has each as a static template.
template <class Runs>
void define_cam(py::module_& module) {
  define_by<Runs>(module, &cam_forward);
  define_by<Runs>(module, &cam_backward);
  define_by<Runs>(module, &statistics_forward);
  define_by<Runs>(module, &statistics_backward);
}

}  // namespace camkernels
