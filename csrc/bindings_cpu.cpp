// Python module camkernels._cpu: pointers, sizes and strides in, kernels of the chosen width run.
// Everything is checked by camkernels/ops/*/cpu.py; the GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cam/cam.h"
#include "cam_statistics/cam_statistics.h"
#include "common/bindings.h"
#include "common/simd_level.h"
#include "map_statistics/map_statistics.h"

namespace camkernels {

int g_level = kBaseline;

// Rooms that bind themselves, in csrc/<op>/<op>_bindings.cpp.
void define_relu(py::module_&);
void define_gradient_error(py::module_&);
void define_batch_norm_relu(py::module_&);
void define_max_pool(py::module_&);
void define_warp(py::module_&);
void define_ssim(py::module_&);
void define_warped_ssim(py::module_&);
void define_min_max(py::module_&);
void define_lp_norm(py::module_&);

namespace {

using Shape = std::array<int64_t, 4>;
using Pointers = std::array<Pointer, kStatistics>;

int chosen_level() {
  const int widest = widest_simd_level();
  const char* asked = std::getenv("CAMKERNELS_SIMD");
  if (asked == nullptr || *asked == '\0') return widest;
  const int level = simd_level_of(asked);
  if (level < 0) {
    throw std::runtime_error(std::string("CAMKERNELS_SIMD: unknown level '") + asked +
                             "', allowed are baseline, avx2, avx512");
  }
  if (level > widest) {
    throw std::runtime_error(std::string("CAMKERNELS_SIMD=") + asked +
                             ": this machine, or this build, has at most " + simd_name(widest));
  }
  return level;
}

Sizes sizes_of(const Shape& shape) { return {shape[0], shape[1], shape[2], shape[3]}; }

View view_of(Pointer data, int dtype, const Shape& strides) {
  return {at<const void>(data), dtype, strides[0], strides[1], strides[2], strides[3]};
}

CamForward cam_forward(const Shape& shape, Pointer activations, int activations_dtype,
                       const Shape& activations_strides, Pointer gradients, int gradients_dtype,
                       const Shape& gradients_strides, Pointer alpha, Pointer partial, Pointer maps,
                       int64_t block, bool relu, int threads) {
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

CamBackward cam_backward(const Shape& shape, Pointer grad_maps, int dtype,
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

template <class... Cam>
void run_cam_fwd(Cam... cam) {
  CAMKERNELS_RUN(cam_fwd, cam_forward(cam...));
}

template <class... Cam>
void run_cam_bwd(Cam... cam) {
  CAMKERNELS_RUN(cam_bwd, cam_backward(cam...));
}

void run_map_statistics_fwd(const Shape& shape, Pointer maps, int dtype, const Shape& strides,
                            bool clamp, const Pointers& statistics, Pointer scratch, int threads) {
  StatisticsForward args{sizes_of(shape), view_of(maps, dtype, strides), clamp, {}, at(scratch),
                         threads};
  copy_pointers(statistics, args.statistics);
  CAMKERNELS_RUN(map_statistics_fwd, args);
}

void run_map_statistics_bwd(const Shape& shape, Pointer maps, int dtype, const Shape& strides,
                            bool clamp, const Pointers& statistics, const Pointers& grads,
                            Pointer grad_maps, Pointer scratch, int threads) {
  StatisticsBackward args{
      sizes_of(shape), view_of(maps, dtype, strides), clamp, {}, {}, at(grad_maps), at(scratch),
      threads};
  copy_pointers(statistics, args.statistics);
  copy_pointers(grads, args.grads);
  CAMKERNELS_RUN(map_statistics_bwd, args);
}

template <class... Cam>
void run_cam_statistics_fwd(Pointer total, const Pointers& statistics, Cam... cam) {
  CamStatisticsForward args{cam_forward(cam...), at(total), {}};
  copy_pointers(statistics, args.statistics);
  CAMKERNELS_RUN(cam_statistics_fwd, args);
}

template <class... Cam>
void run_cam_statistics_bwd(bool relu, const Pointers& statistics, const Pointers& grads,
                            Cam... cam) {
  CamStatisticsBackward args{cam_backward(cam...), relu, {}, {}};
  copy_pointers(statistics, args.statistics);
  copy_pointers(grads, args.grads);
  CAMKERNELS_RUN(cam_statistics_bwd, args);
}

// Deduces the arguments of cam_forward and cam_backward for the templates above.
template <class Arguments, class... Cam>
void define_cam(py::module_& module, Arguments (*)(Cam...)) {
  if constexpr (std::is_same_v<Arguments, CamForward>) {
    module.def("cam_fwd", &run_cam_fwd<Cam...>, Release());
    module.def("cam_statistics_fwd", &run_cam_statistics_fwd<Cam...>, Release());
  } else {
    module.def("cam_bwd", &run_cam_bwd<Cam...>, Release());
    module.def("cam_statistics_bwd", &run_cam_statistics_bwd<Cam...>, Release());
  }
}

}  // namespace
}  // namespace camkernels

PYBIND11_MODULE(_cpu, module) {
  using namespace camkernels;
  module.doc() = "C++ kernels for the CPU; called by camkernels.ops.*.cpu.";
  g_level = chosen_level();
  module.def("simd_level", [] { return simd_name(g_level); }, "Instruction set that runs here.");
  module.def("openmp", [] {
#if defined(_OPENMP)
    return true;
#else
    return false;
#endif
  });
  define_cam(module, &cam_forward);
  define_cam(module, &cam_backward);

  module.def("map_statistics_fwd", &run_map_statistics_fwd, Release());
  module.def("map_statistics_bwd", &run_map_statistics_bwd, Release());
  define_relu(module);
  define_gradient_error(module);
  define_batch_norm_relu(module);
  define_max_pool(module);
  define_warp(module);
  define_ssim(module);
  define_warped_ssim(module);
  define_min_max(module);
  define_lp_norm(module);
}
