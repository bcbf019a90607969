// One block per map; what is read again comes from the cache.
#include "common/elements.cuh"
#include "map_statistics/statistics.cuh"

namespace camkernels {
namespace cuda {

namespace {

// Keeps NaN, as torch's relu does.
__device__ float clamped(float value, bool clamp) { return clamp && value < 0 ? 0.0f : value; }

template <class T>
struct Map {
  const T* data;
  int64_t stride_h, stride_w;
  int width;
  bool clamp;

  __device__ Map(const View& view, int64_t b, int width, bool clamp)
      : data(static_cast<const T*>(view.data) + b * view.stride_b),
        stride_h(view.stride_h),
        stride_w(view.stride_w),
        width(width),
        clamp(clamp) {}
  __device__ float operator()(int p) const {
    return clamped(to_float(data[p / width * stride_h + p % width * stride_w]), clamp);
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) map_statistics_fwd_kernel(StatisticsForward args) {
  const int64_t b = blockIdx.x;
  const int height = (int)args.sizes.height, width = (int)args.sizes.width;
  block_statistics(Map<T>(args.maps, b, width, args.clamp), height, width, b, args.statistics,
                   shared_array<float>(0));
}

template <class T>
__global__ void __launch_bounds__(kThreads) map_statistics_bwd_kernel(StatisticsBackward args) {
  const int64_t b = blockIdx.x;
  const int width = (int)args.sizes.width, pixels = (int)args.sizes.height * width;
  const Map<T> map(args.maps, b, width, args.clamp);
  const Slope<float> slope = slope_of<float>(b, pixels, args.statistics, args.grads);
  T* out = static_cast<T*>(args.grad_maps) + b * pixels;
  for (int p = threadIdx.x; p < pixels; p += kThreads) {
    const float value = map(p);
    const float gradient = slope_at(slope, value, p / width, p % width, (float)pixels);
    out[p] = from_float<T>(args.clamp && value <= 0 ? 0.0f : gradient);
  }
}

}  // namespace

int map_statistics_fwd(const StatisticsForward& args, void* stream) {
  int status = 0;
  CAMKERNELS_CUDA_SWITCH(args.maps.dtype,
                         status = launch(map_statistics_fwd_kernel<T>, args.sizes.batch,
                                         kStatisticsFloats * sizeof(float), stream, args));
  return status;
}

int map_statistics_bwd(const StatisticsBackward& args, void* stream) {
  int status = 0;
  CAMKERNELS_CUDA_SWITCH(args.maps.dtype, status = launch(map_statistics_bwd_kernel<T>,
                                                          args.sizes.batch, 0, stream, args));
  return status;
}

}  // namespace cuda
}  // namespace camkernels
