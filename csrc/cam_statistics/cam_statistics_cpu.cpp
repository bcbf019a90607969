#include "cam/channel_loops.h"
#include "cam_statistics/cam_statistics.h"
#include "map_statistics/statistics_loops.h"

namespace camkernels {
namespace CAMKERNELS_ISA {

template <class A>
static void forward(const CamStatisticsForward& args) {
  const CamForward& cam = args.cam;
  const int64_t pixels = cam.sizes.pixels();
  const int64_t blocks = (cam.sizes.channels + cam.block - 1) / cam.block;
  const int64_t tasks = cam.sizes.batch * blocks;
#pragma omp parallel num_threads(cam.threads) if (cam.threads > 1)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) {
      forward_block<A>(cam, task / blocks, task % blocks);
    }
#pragma omp for schedule(static) nowait
    for (int64_t b = 0; b < cam.sizes.batch; ++b) {
      A* map = join_blocks<A>(cam, b);
      static_cast<A*>(args.total)[b] = dot_row<A, A, true>(map, nullptr, pixels);
      if (cam.relu) relu_row<A>(map, pixels);
      statistics_of(map, cam.sizes.height, cam.sizes.width, b, args.statistics);
    }
  }
}

// D, the cotangent of the map before its ReLU, of one sample.
template <class A>
static void map_gradient(const CamStatisticsBackward& args, int64_t b) {
  const Sizes& sizes = args.cam.sizes;
  const int64_t pixels = sizes.pixels();
  const View& view = args.cam.grad_maps;
  const A* map = static_cast<const A*>(args.cam.maps) + b * pixels;
  A* out = static_cast<A*>(args.cam.masked) + b * pixels;
  bool any = false;
  for (int i = 0; i < kStatistics; ++i) any = any || args.grads[i] != nullptr;
  if (view.data != nullptr) {
    const A* grad = static_cast<const A*>(view.data) + b * view.stride_b;
    for (int64_t i = 0; i < sizes.height; ++i) {
      for (int64_t j = 0; j < sizes.width; ++j) {
        out[i * sizes.width + j] = grad[i * view.stride_h + j * view.stride_w];
      }
    }
  } else if (!any) {
    for (int64_t p = 0; p < pixels; ++p) out[p] = 0;
  }
  if (any) {
    statistics_gradient(map, sizes.height, sizes.width, b, args.statistics, args.grads,
                        view.data != nullptr, out);
  }
  if (!args.relu) return;
  for (int64_t p = 0; p < pixels; ++p) out[p] = map[p] <= 0 ? (A)0 : out[p];
}

template <class A>
static void backward(const CamStatisticsBackward& args) {
  const CamBackward& cam = args.cam;
  const int64_t blocks = (cam.sizes.channels + cam.block - 1) / cam.block;
  const int64_t tasks = cam.sizes.batch * blocks;
#pragma omp parallel num_threads(cam.threads) if (cam.threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t b = 0; b < cam.sizes.batch; ++b) map_gradient<A>(args, b);
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t task = 0; task < tasks; ++task) {
      backward_block<A>(cam, task / blocks, task % blocks);
    }
  }
}

void cam_statistics_fwd(const CamStatisticsForward& args) {
  args.cam.activations.dtype == kFloat64 ? forward<double>(args) : forward<float>(args);
}

void cam_statistics_bwd(const CamStatisticsBackward& args) {
  args.cam.grad_maps.dtype == kFloat64 ? backward<double>(args) : backward<float>(args);
}

}  // namespace CAMKERNELS_ISA
}  // namespace camkernels
