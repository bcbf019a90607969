// Similarity of two maps after warping one and enlarging the other. A block makes the pixels that
// it needs from the maps, span by span; nothing of the size of the picture is stored.
//
// Forward: a block per sample and band of windows. Backward: a block per sample and band of pixels,
// which sums P^T (cotangent of a tile) Q over its tiles. The last block of a sample joins the bands
// in order. One launch each way.
#include "common/elements.cuh"
#include "ssim/windows.cuh"
#include "warp/taps.cuh"
#include "warped_ssim/warped_ssim_device.h"

namespace camkernels {
namespace cuda {

namespace {

// Shared memory behind the windows': four pixels and four weights of each row and column of a span,
// for both maps.
constexpr int kTapsAt = kWindowFloats, kTapsOfAxis = 8 * kSpan;
constexpr int kBytes = (kTapsAt + 4 * kTapsOfAxis) * sizeof(float);

// At three blocks of 80 registers a few would spill.
constexpr int kBlocks = 2;

// Taps of a span along one axis, in shared memory; weights of 0 where there is no pixel.
struct SpanTaps {
  Shared<int> index;
  Shared<float> weight;

  __device__ explicit SpanTaps(int which)
      : index(shared_array<int>(kTapsAt + which * kTapsOfAxis)),
        weight(shared_array<float>(kTapsAt + which * kTapsOfAxis + 4 * kSpan)) {}

  __device__ void set(int n, const DeviceAxis& axis, const Crop& crop, int i) const {
    const bool exists = i >= 0 && i < axis.size;
    const DeviceTaps taps = taps_of(axis, crop, exists ? i : 0);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      index.set(4 * n + k, taps.index[k]);
      weight.set(4 * n + k, exists ? taps.weight[k] : 0.0f);
    }
  }

  // Entry of P or Q for row n of the span and a pixel of the map.
  __device__ float entry(int n, int pixel) const {
    float sum = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (index.get(4 * n + k) == pixel) sum += weight.get(4 * n + k);
    }
    return sum;
  }
};

// A map in memory, seen through rows and columns of a span. Read a pixel at a time: the taps of a
// resampling lie anywhere in a map.
struct Enlarged {
  const void* data;
  int dtype;
  int64_t stride_h, stride_w;
  SpanTaps rows, columns;

  __device__ Enlarged(const View& view, int64_t b, int which)
      : data(static_cast<const char*>(view.data) +
             b * view.stride_b * (view.dtype == kFloat32 ? 4 : 2)),
        dtype(view.dtype),
        stride_h(view.stride_h),
        stride_w(view.stride_w),
        rows(2 * which),
        columns(2 * which + 1) {}

  __device__ float load(int i, int j) const {
    const int64_t at = i * stride_h + j * stride_w;
    if (dtype == kFloat32) return static_cast<const float*>(data)[at];
    if (dtype == kBFloat16) return to_float(static_cast<const bfloat16*>(data)[at]);
    return to_float(static_cast<const float16*>(data)[at]);
  }

  __device__ float at(int r, int c) const {
    float sum = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float weight = rows.weight.get(4 * r + k);
      if (weight == 0) continue;
      const int i = rows.index.get(4 * r + k);
      float across = 0;
#pragma unroll
      for (int l = 0; l < 4; ++l) {
        const float share = columns.weight.get(4 * c + l);
        if (share != 0) across += share * load(i, columns.index.get(4 * c + l));
      }
      sum += weight * across;
    }
    return sum;
  }
};

// Both maps of a sample as pictures (size_y, size_x).
struct Views {
  static constexpr bool kShares = true;
  const WarpedSsimDevice& args;
  DeviceBox box;
  Enlarged map, other;

  __device__ Views(const WarpedSsimDevice& of, int64_t b)
      : args(of),
        box(box_of(of.boxes + 4 * b, of.flips[b] != 0, of.via_y, of.via_x)),
        map(of.maps, b, 0),
        other(of.others, b, 1) {}

  // Taps of the rows and columns of the span from pixel top, left on: one per thread of four warps.
  __device__ void prepare(int top, int left) const {
    const int n = threadIdx.x % kSpan, which = threadIdx.x / kSpan;
    const Crop all_rows = {0, args.size_y, false}, all_columns = {0, args.size_x, false};
    if (which == 0) map.rows.set(n, {args.map_y, args.via_y, args.size_y}, box.rows, top + n);
    if (which == 1)
      map.columns.set(n, {args.map_x, args.via_x, args.size_x}, box.columns, left + n);
    if (which == 2) other.rows.set(n, {args.other_y, args.size_y, args.size_y}, all_rows, top + n);
    if (which == 3) {
      other.columns.set(n, {args.other_x, args.size_x, args.size_x}, all_columns, left + n);
    }
  }

  __device__ void at(int r, int c, float* x, float* y) const {
    *x = map.at(r, c);
    *y = other.at(r, c);
  }
};

__global__ void __launch_bounds__(kThreads, kBlocks) warped_ssim_fwd_kernel(WarpedSsimDevice args) {
  const WindowCount count = windows_of(args.window, args.size_y, args.size_x);
  const int bands = ceil_div(count.down, kOut);
  const int64_t b = blockIdx.x / bands;
  const Shared<float> scratch = shared_array<float>(kWindowScratchAt);
  Views source(args, b);
  const int row = (int)(blockIdx.x % bands) * kOut;
  float sum[1] = {sum_of_band(source, args.window, count, row,
                              pivot_of_tile(source, row, 0, args.size_y, args.size_x))};
  reduce_block(sum, scratch, Sum());
  if (threadIdx.x == 0) args.sums[blockIdx.x] = sum[0];
  if (!arrives_last(args.arrivals + b, bands, shared_array<int>(kWindowScratchAt))) return;
  if (threadIdx.x != 0) return;
  float total = 0;
  for (int i = 0; i < bands; ++i) total += __ldcg(args.sums + b * bands + i);
  const float nan = __int_as_float(0x7fffffff);
  args.values[b] = source.box.valid ? total / ((float)count.down * (float)count.across) : nan;
}

// sums[i, j] += sum over the tile's pixels of P[y, i] D[y, x] Q[x, j]. A pixel of the map is added
// to by one thread only, whichever the tile. Ends with a barrier: taps and d may be used again.
__device__ inline void add_tile(const Enlarged& map, int height, int width, Shared<float> d,
                                Shared<float> part, float* sums) {
  const int row = threadIdx.x / kOut, column = threadIdx.x % kOut;
  int first = height, last = -1;  // rows of the map that the tile touches
  for (int n = 0; n < 4 * kOut; ++n) {
    if (map.rows.weight.get(n) == 0) continue;
    first = smaller(first, map.rows.index.get(n));
    last = larger(last, map.rows.index.get(n));
  }
  for (int begin = first; begin <= last; begin += kOut) {
    float sum = 0;
    for (int y = 0; y < kOut; ++y) {
      sum += map.rows.entry(y, begin + row) * d.get(y * kOut + column);
    }
    part.set(threadIdx.x, sum);
    __syncthreads();
    const int end = smaller(begin + kOut, last + 1) * width;
    const int ahead = ((int)threadIdx.x - begin * width) % kThreads;
    for (int p = begin * width + (ahead < 0 ? ahead + kThreads : ahead); p < end; p += kThreads) {
      float total = 0;
      for (int x = 0; x < kOut; ++x) {
        total += part.get((p / width - begin) * kOut + x) * map.columns.entry(x, p % width);
      }
      sums[p] += total;
    }
    __syncthreads();
  }
}

// The cotangent of a map from the sums of the bands, in their order; NaN where the box is not
// valid.
__device__ inline void join_bands(const float* sums, int bands, int pixels, bool valid, int dtype,
                                  void* out) {
  for (int p = threadIdx.x; p < pixels; p += kThreads) {
    float total = valid ? 0.0f : __int_as_float(0x7fffffff);
    for (int i = 0; i < bands; ++i) total += __ldcg(sums + (int64_t)i * pixels + p);
    CAMKERNELS_CUDA_SWITCH(dtype, static_cast<T*>(out)[p] = from_float<T>(total));
  }
}

__global__ void __launch_bounds__(kThreads, kBlocks) warped_ssim_bwd_kernel(WarpedSsimDevice args) {
  const WindowCount count = windows_of(args.window, args.size_y, args.size_x);
  const int bands = ceil_div(args.size_y, kOut), band = (int)(blockIdx.x % bands);
  const int64_t b = blockIdx.x / bands;
  const int map_pixels = args.map_y * args.map_x, other_pixels = args.other_y * args.other_x;
  const bool to_maps = args.grad_maps != nullptr, to_others = args.grad_others != nullptr;
  float* map_sums = to_maps ? args.map_sums + (b * bands + band) * map_pixels : nullptr;
  float* other_sums = to_others ? args.other_sums + (b * bands + band) * other_pixels : nullptr;
  const Shared<float> d = shared_array<float>(kCotangentsAt), part = shared_array<float>(kPartAt);
  Views source(args, b);
  const float scale = args.grad[b] / ((float)count.down * (float)count.across);
  const int row = threadIdx.x / kOut, column = threadIdx.x % kOut, top = band * kOut;
  if (to_maps) {
    for (int p = threadIdx.x; p < map_pixels; p += kThreads) map_sums[p] = 0;
  }
  if (to_others) {
    for (int p = threadIdx.x; p < other_pixels; p += kThreads) other_sums[p] = 0;
  }
  for (int left = 0; left < args.size_x; left += kOut) {
    float sums[kMeans] = {};
    const Pivot pivot = pivot_of_tile(source, top, left, args.size_y, args.size_x);
    filter_back(source, args.window, count, pivot, top, left, scale, sums);
    source.prepare(top, left);
    __syncthreads();
    const bool exists = top + row < args.size_y && left + column < args.size_x;
    float x = 0, y = 0;
    source.at(row, column, &x, &y);
    x -= pivot.x;
    y -= pivot.y;
    d.set(threadIdx.x, exists ? sums[0] + 2 * x * sums[2] + y * sums[3] : 0.0f);
    d.set(kThreads + threadIdx.x, exists ? sums[1] + 2 * y * sums[2] + x * sums[3] : 0.0f);
    __syncthreads();
    if (to_maps) add_tile(source.map, args.map_y, args.map_x, d, part, map_sums);
    const Shared<float> other_d = {d.data + kThreads};
    if (to_others) add_tile(source.other, args.other_y, args.other_x, other_d, part, other_sums);
  }
  if (!arrives_last(args.arrivals + b, bands, shared_array<int>(kWindowScratchAt))) return;
  const bool valid = source.box.valid;
  if (to_maps) {
    join_bands(args.map_sums + b * bands * map_pixels, bands, map_pixels, valid, args.maps.dtype,
               static_cast<char*>(args.grad_maps) +
                   b * map_pixels * (args.maps.dtype == kFloat32 ? 4 : 2));
  }
  if (to_others) {
    join_bands(args.other_sums + b * bands * other_pixels, bands, other_pixels, valid,
               args.others.dtype,
               static_cast<char*>(args.grad_others) +
                   b * other_pixels * (args.others.dtype == kFloat32 ? 4 : 2));
  }
}

}  // namespace

int warped_ssim_fwd(const WarpedSsimDevice& args, void* stream) {
  const int bands = ceil_div(windows_of(args.window, args.size_y, args.size_x).down, kOut);
  return launch(warped_ssim_fwd_kernel, args.batch * bands, kBytes, stream, args);
}

int warped_ssim_bwd(const WarpedSsimDevice& args, void* stream) {
  const int bands = ceil_div(args.size_y, kOut);
  return launch(warped_ssim_bwd_kernel, args.batch * bands, kBytes, stream, args);
}

}  // namespace cuda
}  // namespace camkernels
