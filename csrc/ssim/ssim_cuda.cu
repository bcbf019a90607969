// Forward: a block per sample, channel and band of windows; the last block of a sample joins their
// sums in order. Backward: a block per tile of pixels. One launch each way.
#include "common/elements.cuh"
#include "ssim/windows.cuh"

namespace camkernels {
namespace cuda {

namespace {

__device__ float load_any(const void* data, int dtype, int64_t offset) {
  if (dtype == kFloat32) return static_cast<const float*>(data)[offset];
  if (dtype == kBFloat16) return to_float(static_cast<const bfloat16*>(data)[offset]);
  return to_float(static_cast<const float16*>(data)[offset]);
}

__device__ void store_any(void* data, int dtype, int64_t offset, float value) {
  if (dtype == kFloat32) {
    static_cast<float*>(data)[offset] = value;
  } else if (dtype == kBFloat16) {
    static_cast<bfloat16*>(data)[offset] = from_float<bfloat16>(value);
  } else {
    static_cast<float16*>(data)[offset] = from_float<float16>(value);
  }
}

// One plane of two stored pictures. Read a pixel at a time: spans begin at any pixel (a tile less
// its padding), seldom at 16 bytes, and the lanes of a warp read 32 neighbours as it is. Which
// dtype is one branch for the whole warp; pictures of two dtypes would make nine kernels of each.
struct Stored {
  static constexpr bool kShares = false;
  const View &x, &y;
  int64_t x_plane, y_plane;
  int height, width, top, left;

  __device__ Stored(const Sizes& sizes, const View& first, const View& second, int64_t b, int64_t c)
      : x(first),
        y(second),
        x_plane(b * first.stride_b + c * first.stride_k),
        y_plane(b * second.stride_b + c * second.stride_k),
        height((int)sizes.height),
        width((int)sizes.width),
        top(0),
        left(0) {}
  __device__ void prepare(int row, int column) {
    top = row;
    left = column;
  }
  __device__ void at(int r, int c, float* to_x, float* to_y) const {
    const int i = top + r, j = left + c;
    if (i < 0 || j < 0 || i >= height || j >= width) return;
    *to_x = load_any(x.data, x.dtype, x_plane + i * x.stride_h + j * x.stride_w);
    *to_y = load_any(y.data, y.dtype, y_plane + i * y.stride_h + j * y.stride_w);
  }
};

__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    ssim_fwd_kernel(SsimDeviceForward args) {
  const WindowCount count = windows_of(args.window, (int)args.sizes.height, (int)args.sizes.width);
  const int bands = ceil_div(count.down, kOut), blocks = bands * (int)args.sizes.channels;
  const int64_t b = blockIdx.x / blocks;
  const int index = blockIdx.x % blocks;
  const Shared<float> scratch = shared_array<float>(kWindowScratchAt);
  Stored source(args.sizes, args.x, args.y, b, index / bands);
  const int height = (int)args.sizes.height, width = (int)args.sizes.width;
  const int row = index % bands * kOut;
  float sum[1] = {
      sum_of_band(source, args.window, count, row, pivot_of_tile(source, row, 0, height, width))};
  reduce_block(sum, scratch, Sum());
  if (threadIdx.x == 0) args.sums[blockIdx.x] = sum[0];
  if (!arrives_last(args.arrivals + b, blocks, shared_array<int>(kWindowScratchAt))) return;
  float total[1] = {0};
  for (int i = threadIdx.x; i < blocks; i += kThreads) {
    total[0] += __ldcg(args.sums + b * blocks + i);
  }
  reduce_block(total, scratch, Sum());
  const float windows = (float)count.down * (float)count.across * (float)args.sizes.channels;
  if (threadIdx.x == 0) args.values[b] = total[0] / windows;
}

__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    ssim_bwd_kernel(SsimDeviceBackward args) {
  const int height = (int)args.sizes.height, width = (int)args.sizes.width;
  const int down = ceil_div(height, kOut), across = ceil_div(width, kOut);
  const int64_t plane = blockIdx.x / (down * across), b = plane / args.sizes.channels;
  const int tile = (int)(blockIdx.x % (down * across));
  const int top = tile / across * kOut, left = tile % across * kOut;
  const WindowCount count = windows_of(args.window, height, width);
  const float windows = (float)count.down * (float)count.across * (float)args.sizes.channels;
  Stored source(args.sizes, args.x, args.y, b, plane % args.sizes.channels);
  float sums[kMeans] = {};
  const Pivot pivot = pivot_of_tile(source, top, left, height, width);
  filter_back(source, args.window, count, pivot, top, left, args.grad[b] / windows, sums);
  const int i = top + (int)threadIdx.x / kOut, j = left + (int)threadIdx.x % kOut;
  if (i >= height || j >= width) return;
  float x = 0, y = 0;
  source.prepare(0, 0);
  source.at(i, j, &x, &y);
  x -= pivot.x;
  y -= pivot.y;
  const int64_t out = (plane * height + i) * width + j;
  if (args.grad_x != nullptr) {
    store_any(args.grad_x, args.x.dtype, out, sums[0] + 2 * x * sums[2] + y * sums[3]);
  }
  if (args.grad_y != nullptr) {
    store_any(args.grad_y, args.y.dtype, out, sums[1] + 2 * y * sums[2] + x * sums[3]);
  }
}

constexpr int kBytes = kWindowFloats * sizeof(float);

}  // namespace

int ssim_fwd(const SsimDeviceForward& args, void* stream) {
  const WindowCount count = windows_of(args.window, (int)args.sizes.height, (int)args.sizes.width);
  const int64_t blocks = args.sizes.batch * args.sizes.channels * ceil_div(count.down, kOut);
  return launch(ssim_fwd_kernel, blocks, kBytes, stream, args);
}

int ssim_bwd(const SsimDeviceBackward& args, void* stream) {
  const int64_t tiles =
      ceil_div<int64_t>(args.sizes.height, kOut) * ceil_div<int64_t>(args.sizes.width, kOut);
  const int64_t blocks = args.sizes.batch * args.sizes.channels * tiles;
  return launch(ssim_bwd_kernel, blocks, kBytes, stream, args);
}

}  // namespace cuda
}  // namespace camkernels
