// Python module camkernels._cpu: pointers, sizes and strides in, kernels of the chosen width run.
// Everything is checked by camkernels/ops/*/cpu.py; the GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cam/cam_arguments.h"
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
void define_cam_methods(py::module_&);
void define_best_box_ious(py::module_&);

namespace {

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

// What cam_arguments.h binds.
struct Runs {
  template <class... Cam>
  static void cam_fwd(Cam... cam) {
    CAMKERNELS_RUN(cam_fwd, cam_forward(cam...));
  }

  template <class... Cam>
  static void cam_bwd(Cam... cam) {
    CAMKERNELS_RUN(cam_bwd, cam_backward(cam...));
  }

  template <class... Statistics>
  static void map_statistics_fwd(Statistics... statistics) {
    CAMKERNELS_RUN(map_statistics_fwd, statistics_forward(statistics...));
  }

  template <class... Statistics>
  static void map_statistics_bwd(Statistics... statistics) {
    CAMKERNELS_RUN(map_statistics_bwd, statistics_backward(statistics...));
  }

  template <class... Cam>
  static void cam_statistics_fwd(Pointer total, const Pointers& statistics, Cam... cam) {
    CamStatisticsForward args{cam_forward(cam...), at(total), {}};
    copy_pointers(statistics, args.statistics);
    CAMKERNELS_RUN(cam_statistics_fwd, args);
  }

  template <class... Cam>
  static void cam_statistics_bwd(bool relu, const Pointers& statistics, const Pointers& grads,
                                 Cam... cam) {
    CamStatisticsBackward args{cam_backward(cam...), relu, {}, {}};
    copy_pointers(statistics, args.statistics);
    copy_pointers(grads, args.grads);
    CAMKERNELS_RUN(cam_statistics_bwd, args);
  }
};

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
  define_cam<Runs>(module);
  define_relu(module);
  define_gradient_error(module);
  define_batch_norm_relu(module);
  define_max_pool(module);
  define_warp(module);
  define_ssim(module);
  define_warped_ssim(module);
  define_min_max(module);
  define_lp_norm(module);
  define_cam_methods(module);
  define_best_box_ious(module);
}
