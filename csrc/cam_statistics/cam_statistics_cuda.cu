// As csrc/cam/cam_cuda.cu; the block that completes a map also takes its statistics, and the way
// back begins at their cotangents. One launch each way.
#include "cam/cam.cuh"
#include "cam_statistics/cam_statistics.h"
#include "map_statistics/statistics.cuh"

namespace camkernels {
namespace cuda {

namespace {

static_assert(kStatisticsFloats <= kScratch, "the scratch of a forward holds the statistics'");

// The map that a block has just made.
struct MadeMap {
  const float* data;
  int pixels, width;

  template <class Visit>
  __device__ void each(Visit visit) const {
    walk<1>(pixels, width, [&](int p, int y, int x) { visit(data[p], y, x); });
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    cam_statistics_fwd_kernel(CamStatisticsForward args, Access of_activations,
                              Access of_gradients) {
  float total;
  if (!make_map<T>(args.cam, of_activations, of_gradients, &total)) return;
  const Sizes& sizes = args.cam.sizes;
  const int64_t b = blockIdx.x / ceil_div(sizes.channels, args.cam.block);
  if (threadIdx.x == 0) static_cast<float*>(args.total)[b] = total;
  const float* data = static_cast<const float*>(args.cam.maps) + b * sizes.pixels();
  // reduce_block has made the block wait since the map was written.
  block_statistics(MadeMap{data, (int)sizes.pixels(), (int)sizes.width}, (int)sizes.height,
                   (int)sizes.width, b, args.statistics, shared_array<float>(kScratchAt));
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    cam_statistics_bwd_kernel(CamStatisticsBackward args, Access of_activations, bool vectors,
                              bool any) {
  const Sizes& sizes = args.cam.sizes;
  const int64_t chunks = ceil_div(sizes.channels, args.cam.block);
  const int64_t b = blockIdx.x / chunks, first = blockIdx.x % chunks * args.cam.block;
  const int width = (int)sizes.width, pixels = (int)sizes.pixels();
  const MapCotangent given(args.cam, b);
  Slope<float> slope = {};
  if (any) slope = slope_of<float>(b, pixels, args.statistics, args.grads);
  auto cotangent = [&](int p) {
    const float map = given.map[p];
    if (args.relu && map <= 0) return 0.0f;
    const float to_map = given.given(p);
    return any ? to_map + slope_at(slope, map, p / width, p % width, (float)pixels) : to_map;
  };
  write_cotangents<T>(args.cam, of_activations, vectors, b, first, cotangent);
}

}  // namespace

int cam_statistics_fwd(const CamStatisticsForward& args, void* stream) {
  const CamForward& cam = args.cam;
  const int64_t blocks = cam.sizes.batch * chunks_of(cam.sizes, cam.block);
  const Access of_activations =
      access_of(cam.sizes, cam.activations, element_bytes(cam.activations.dtype));
  const Access of_gradients =
      access_of(cam.sizes, cam.gradients, element_bytes(cam.gradients.dtype));
  int status = 0;
  CAMKERNELS_CUDA_SWITCH(cam.activations.dtype,
                         status = launch(cam_statistics_fwd_kernel<T>, blocks, kForwardBytes,
                                         stream, args, of_activations, of_gradients));
  return status;
}

int cam_statistics_bwd(const CamStatisticsBackward& args, void* stream) {
  const CamBackward& cam = args.cam;
  const int64_t blocks = cam.sizes.batch * chunks_of(cam.sizes, cam.block);
  const Access of_activations =
      access_of(cam.sizes, cam.activations, element_bytes(cam.activations.dtype));
  const bool vectors = is_aligned(cam.grad_activations);
  bool any = false;
  for (const void* grad : args.grads) any = any || grad != nullptr;
  int status = 0;
  CAMKERNELS_CUDA_SWITCH(
      cam.grad_dtype, status = launch(cam_statistics_bwd_kernel<T>, blocks, kBackwardBytes, stream,
                                      args, of_activations, vectors, any));
  return status;
}

}  // namespace cuda
}  // namespace camkernels
