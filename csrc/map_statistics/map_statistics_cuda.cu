// One block per map; what is read again comes from the cache.
#include "common/elements.cuh"
#include "map_statistics/statistics.cuh"

namespace camkernels {
namespace cuda {

namespace {

// Keeps NaN, as torch's relu does.
__device__ float clamped(float value, bool clamp) { return clamp && value < 0 ? 0.0f : value; }

// kVectors: pixels lie side by side, and are read by 16 bytes.
template <class T, bool kVectors>
struct Map {
  static constexpr int kRun = kVectors ? kLanes<T> : 1;
  const T* data;
  int64_t stride_h, stride_w;
  int pixels, width;
  bool clamp;

  __device__ Map(const Sizes& sizes, const View& view, int64_t b, bool clamp)
      : data(static_cast<const T*>(view.data) + b * view.stride_b),
        stride_h(view.stride_h),
        stride_w(view.stride_w),
        pixels((int)sizes.pixels()),
        width((int)sizes.width),
        clamp(clamp) {}
  __device__ void read(int p, int y, int x, float (&to)[kRun]) const {
    if constexpr (kVectors) {
      load<kRun>(data + p, to);
    } else {
      to[0] = to_float(data[y * stride_h + x * stride_w]);
    }
#pragma unroll
    for (int j = 0; j < kRun; ++j) to[j] = clamped(to[j], clamp);
  }
  // Row and column of the next pixel.
  __device__ void advance(int* y, int* x) const {
    if (++*x < width) return;
    *x = 0;
    ++*y;
  }
  template <class Visit>
  __device__ void each(Visit visit) const {
    walk<kRun>(pixels, width, [&](int p, int y, int x) {
      float values[kRun];
      read(p, y, x, values);
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        visit(values[j], y, x);
        advance(&y, &x);
      }
    });
  }
};

template <class T, bool kVectors>
__global__ void __launch_bounds__(kThreads) map_statistics_fwd_kernel(StatisticsForward args) {
  const int64_t b = blockIdx.x;
  const int height = (int)args.sizes.height, width = (int)args.sizes.width;
  block_statistics(Map<T, kVectors>(args.sizes, args.maps, b, args.clamp), height, width, b,
                   args.statistics, shared_array<float>(0));
}

template <class T, bool kVectors>
__global__ void __launch_bounds__(kThreads) map_statistics_bwd_kernel(StatisticsBackward args) {
  constexpr int kRun = Map<T, kVectors>::kRun;
  const int64_t b = blockIdx.x;
  const Map<T, kVectors> map(args.sizes, args.maps, b, args.clamp);
  const Slope<float> slope = slope_of<float>(b, map.pixels, args.statistics, args.grads);
  T* out = static_cast<T*>(args.grad_maps) + b * map.pixels;
  walk<kRun>(map.pixels, map.width, [&](int p, int y, int x) {
    float values[kRun];
    map.read(p, y, x, values);
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      const float gradient = slope_at(slope, values[j], y, x, (float)map.pixels);
      values[j] = args.clamp && values[j] <= 0 ? 0.0f : gradient;
      map.advance(&y, &x);
    }
    store<kRun>(out + p, values);
  });
}

// Whether all maps can be read by 16 bytes, and are worth it: of a smaller one a thread has a pixel
// at most.
template <class T>
bool has_vectors(const Sizes& sizes, const View& view) {
  const int64_t lanes = kLanes<T>, pixels = sizes.pixels();
  const bool dense = (sizes.width == 1 || view.stride_w == 1) &&
                     (sizes.height == 1 || view.stride_h == sizes.width);
  const bool aligned = is_aligned(view.data) && (sizes.batch == 1 || view.stride_b % lanes == 0);
  return dense && aligned && pixels % lanes == 0 && pixels > kThreads;
}

}  // namespace

int map_statistics_fwd(const StatisticsForward& args, void* stream) {
  int status = 0;
  CAMKERNELS_CUDA_SWITCH(args.maps.dtype, {
    auto kernel = has_vectors<T>(args.sizes, args.maps) ? map_statistics_fwd_kernel<T, true>
                                                        : map_statistics_fwd_kernel<T, false>;
    status = launch(kernel, args.sizes.batch, kStatisticsFloats * sizeof(float), stream, args);
  });
  return status;
}

int map_statistics_bwd(const StatisticsBackward& args, void* stream) {
  int status = 0;
  CAMKERNELS_CUDA_SWITCH(args.maps.dtype, {
    const bool vectors = has_vectors<T>(args.sizes, args.maps) && is_aligned(args.grad_maps);
    auto kernel =
        vectors ? map_statistics_bwd_kernel<T, true> : map_statistics_bwd_kernel<T, false>;
    status = launch(kernel, args.sizes.batch, 0, stream, args);
  });
  return status;
}

}  // namespace cuda
}  // namespace camkernels
