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
// Rooms that bind themselves. One source for all: what pybind11 costs a compiler it costs once.
#include "add_scaled/add_scaled_bindings.h"
#include "batch_norm_relu/batch_norm_relu_bindings.h"
#include "best_box_ious/best_box_ious_bindings.h"
#include "cam_methods/cam_methods_bindings.h"
#include "gradient_error/gradient_error_bindings.h"
#include "lp_norm/lp_norm_bindings.h"
#include "max_pool/max_pool_bindings.h"
#include "min_max/min_max_bindings.h"
#include "relu/relu_bindings.h"
#include "ssim/ssim_bindings.h"
#include "warp/warp_bindings.h"
#include "warped_ssim/warped_ssim_bindings.h"

namespace camkernels {

int g_level = kBaseline;

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
  add_scaled_bindings::define(module);
  relu_bindings::define(module);
  gradient_error_bindings::define(module);
  batch_norm_relu_bindings::define(module);
  max_pool_bindings::define(module);
  warp_bindings::define(module);
  ssim_bindings::define(module);
  warped_ssim_bindings::define(module);
  min_max_bindings::define(module);
  lp_norm_bindings::define(module);
  cam_methods_bindings::define(module);
  best_box_ious_bindings::define(module);
}
