#include "cam/cam.h"
#include "cam/channel_loops.h"

namespace camkernels {
namespace CAMKERNELS_ISA {

template <class A>
static void forward(const CamForward& args) {
  const int64_t blocks = (args.sizes.channels + args.block - 1) / args.block;
  const int64_t tasks = args.sizes.batch * blocks;
#pragma omp parallel num_threads(args.threads) if (args.threads > 1)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) {
      forward_block<A>(args, task / blocks, task % blocks);
    }
#pragma omp for schedule(static) nowait
    for (int64_t b = 0; b < args.sizes.batch; ++b) {
      A* map = join_blocks<A>(args, b);
      if (args.relu) relu_row<A>(map, args.sizes.pixels());
    }
  }
}

// D = grad_maps where the ReLU was open; NaN in the map counts as open.
template <class A>
static void mask_gradient(const CamBackward& args, int64_t b) {
  const int64_t P = args.sizes.pixels(), width = args.sizes.width;
  const View& view = args.grad_maps;
  const A* grad = static_cast<const A*>(view.data) + b * view.stride_b;
  const A* map = args.maps == nullptr ? nullptr : static_cast<const A*>(args.maps) + b * P;
  A* out = static_cast<A*>(args.masked) + b * P;
  for (int64_t i = 0; i < args.sizes.height; ++i) {
    for (int64_t j = 0; j < width; ++j) {
      const int64_t p = i * width + j;
      const A value = grad[i * view.stride_h + j * view.stride_w];
      out[p] = map != nullptr && map[p] <= 0 ? (A)0 : value;
    }
  }
}

template <class A>
static void backward(const CamBackward& args) {
  const int64_t blocks = (args.sizes.channels + args.block - 1) / args.block;
  const int64_t tasks = args.sizes.batch * blocks;
#pragma omp parallel num_threads(args.threads) if (args.threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t b = 0; b < args.sizes.batch; ++b) mask_gradient<A>(args, b);
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t task = 0; task < tasks; ++task) {
      backward_block<A>(args, task / blocks, task % blocks);
    }
  }
}

void cam_fwd(const CamForward& args) {
  args.activations.dtype == kFloat64 ? forward<double>(args) : forward<float>(args);
}

void cam_bwd(const CamBackward& args) {
  args.grad_maps.dtype == kFloat64 ? backward<double>(args) : backward<float>(args);
}

}  // namespace CAMKERNELS_ISA
}  // namespace camkernels
