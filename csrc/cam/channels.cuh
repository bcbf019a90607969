// How a block reads and writes its share of activations (batch, channels, height, width): a chunk
// of the channels of one sample, all pixels.
//
// Planes: the pixels of a channel lie side by side, or somewhere. Vectors of N elements are walked
// in the order of memory; they may begin in one channel and end in the next (7 x 7 has 49 pixels).
// Channels: those of a pixel lie side by side.
#pragma once

#include "cam/cam.h"
#include "common/block.cuh"
#include "common/elements.cuh"

namespace camkernels {
namespace cuda {

constexpr int kLargestChunk = 256;       // channels of a block
constexpr int kPartials = 8 * kThreads;  // sums of vectors, one per thread and lane

enum Access : int { kPlanes, kPlaneVectors, kChannelVectors };

// How `view` can be read by vectors; of `size` bytes are its elements.
inline Access access_of(const Sizes& sizes, const View& view, int size) {
  const int64_t lanes = kVectorBytes / size, pixels = sizes.pixels();
  const bool aligned = is_aligned(view.data) && (sizes.batch == 1 || view.stride_b % lanes == 0);
  const bool row = sizes.width == 1 || view.stride_w == 1;
  const bool rows = sizes.height == 1 || view.stride_h == sizes.width;
  if (aligned && row && rows && (sizes.channels == 1 || view.stride_k == pixels)) {
    if (pixels % lanes == 0 || pixels <= kThreads) return kPlaneVectors;  // see sum_planes
  }
  if (aligned && view.stride_k == 1 && pixels > 1 && view.stride_h % lanes == 0 &&
      view.stride_w % lanes == 0) {
    return kChannelVectors;
  }
  return kPlanes;
}

inline int element_bytes(int dtype) { return dtype == kFloat32 ? 4 : 2; }

// A chunk of channels of one sample.
template <class T>
struct Chunk {
  const T* data;
  int64_t stride_k, stride_h, stride_w;
  int width;
  bool flat;  // pixel p lies at p stride_w

  __device__ Chunk(const View& view, const Sizes& sizes, int64_t b, int64_t k)
      : data(static_cast<const T*>(view.data) + b * view.stride_b + k * view.stride_k),
        stride_k(view.stride_k),
        stride_h(view.stride_h),
        stride_w(sizes.width == 1 ? view.stride_h : view.stride_w),
        width((int)sizes.width),
        flat(sizes.height == 1 || sizes.width == 1 || view.stride_h == width * stride_w) {}
  __device__ const T* pixel(int p) const {
    return data + (flat ? p * stride_w : p / width * stride_h + p % width * stride_w);
  }
  __device__ const T* at(int k, int p) const { return pixel(p) + k * stride_k; }
};

// Weights of N pixels of one channel: 1, or what `weight(p)` says.
struct One {
  __device__ float operator()(int) const { return 1.0f; }
};

// sums[k] (+)= sum_p weight(p) x_kp over pixels [begin, end), a warp per channel.
template <class T, class Weight>
__device__ inline void reduce_planes(const Chunk<T>& x, int count, int begin, int end,
                                     Weight weight, bool add, Shared<float> sums) {
  const int lane = threadIdx.x % kWarp;
  for (int k = threadIdx.x / kWarp; k < count; k += kWarps) {
    float sum = 0;
#pragma unroll 4
    for (int p = begin + lane; p < end; p += kWarp) sum += weight(p) * to_float(*x.at(k, p));
    sum = reduce_lanes(sum, kWarp, Sum());
    if (lane == 0) sums.set(k, add ? sums.get(k) + sum : sum);
  }
}

// The same where rows of pixels are whole vectors.
template <class T, class Weight>
__device__ inline void reduce_plane_vectors(const Chunk<T>& x, int count, int begin, int end,
                                            Weight weight, bool add, Shared<float> sums) {
  constexpr int N = kLanes<T>;
  const int lane = threadIdx.x % kWarp;
  for (int k = threadIdx.x / kWarp; k < count; k += kWarps) {
    const T* plane = x.data + k * x.stride_k;
    float sum = 0;
#pragma unroll 2
    for (int p = begin + lane * N; p < end; p += kWarp * N) {
      float values[N];
      load<N>(plane + p, values);
#pragma unroll
      for (int j = 0; j < N; ++j) sum += weight(p + j) * values[j];
    }
    sum = reduce_lanes(sum, kWarp, Sum());
    if (lane == 0) sums.set(k, add ? sums.get(k) + sum : sum);
  }
}

// The same where channels lie side by side: a thread takes N channels and every groups-th pixel.
template <class T, class Weight>
__device__ inline void reduce_channel_vectors(const Chunk<T>& x, int count, int begin, int end,
                                              Weight weight, bool add, Shared<float> sums,
                                              Shared<float> partials) {
  constexpr int N = kLanes<T>;
  const int vectors = ceil_div(count, N), groups = kThreads / vectors;
  const int k = threadIdx.x % vectors * N, group = threadIdx.x / vectors;
  if (group < groups) {
    float acc[N] = {};
    if (k + N <= count) {
#pragma unroll 2
      for (int p = begin + group; p < end; p += groups) {
        float values[N];
        load<N>(x.pixel(p) + k, values);
        const float w = weight(p);
#pragma unroll
        for (int j = 0; j < N; ++j) acc[j] += w * values[j];
      }
    } else {
      for (int p = begin + group; p < end; p += groups) {
        const T* pixel = x.pixel(p);
        const float w = weight(p);
#pragma unroll
        for (int j = 0; j < N; ++j) {
          if (k + j < count) acc[j] += w * to_float(pixel[k + j]);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < N; ++j)
      partials.set((group * vectors + threadIdx.x % vectors) * N + j, acc[j]);
  }
  __syncthreads();
  for (int c = threadIdx.x; c < count; c += kThreads) {
    float sum = add ? sums.get(c) : 0.0f;
    for (int g = 0; g < groups; ++g) sum += partials.get(g * vectors * N + c);
    sums.set(c, sum);
  }
}

// sums[k] (+)= sum_p weight(p) x_kp over pixels [begin, end), which begin at a whole vector.
// Whoever reads the sums waits for the block first.
template <class T, class Weight>
__device__ inline void reduce_pixels(const Chunk<T>& x, int count, int pixels, Access access,
                                     int begin, int end, Weight weight, bool add,
                                     Shared<float> sums, Shared<float> partials) {
  if (access == kChannelVectors) {
    reduce_channel_vectors(x, count, begin, end, weight, add, sums, partials);
  } else if (access == kPlaneVectors && pixels % kLanes<T> == 0) {
    reduce_plane_vectors(x, count, begin, end, weight, add, sums);
  } else {
    reduce_planes(x, count, begin, end, weight, add, sums);
  }
}

// map[p] = sum_k alpha_k x_kp, planes of any strides (N = 1) or vectors in the order of memory.
//
// A column is a vector's place within the unit after which the pattern of channels and pixels
// repeats. A thread keeps its column, and takes every groups-th unit.
template <int N, class T>
__device__ inline void sum_planes(const Chunk<T>& x, int count, int pixels, Shared<float> alpha,
                                  Shared<float> partials, float* map) {
  const int rows = pixels % N == 0 ? 1 : N;  // channels of a unit; N is a power of two, and
  const int unit = rows * pixels / N;        // where they share a factor this wastes nothing much
  const int units = ceil_div(count, rows);
  [[maybe_unused]] constexpr int kUnroll = N == 8 ? 2 : 4;  // loads in flight that registers allow
  for (int begin = 0; begin < unit; begin += kThreads) {
    const int columns = unit - begin < kThreads ? unit - begin : kThreads;
    const int groups = kThreads / columns;
    const int column = begin + (int)threadIdx.x % columns, group = threadIdx.x / columns;
    if (group < groups) {
      float acc[N] = {};
      int row[N];
#pragma unroll
      for (int j = 0; j < N; ++j) row[j] = (column * N + j) / pixels;
      const T* at = N > 1 ? x.data + column * N : x.pixel(column);
#pragma unroll kUnroll
      for (int u = group; u < units; u += groups) {
        const int k = u * rows;
        float values[N];
        if (N == 1 || k + row[N - 1] < count) {
          load<N>(at + k * x.stride_k, values);
        } else {
#pragma unroll
          for (int j = 0; j < N; ++j) {
            values[j] = k + row[j] < count ? to_float(at[k * x.stride_k + j]) : 0.0f;
          }
        }
#pragma unroll
        for (int j = 0; j < N; ++j) {
          if (N == 1 || k + row[j] < count) acc[j] += alpha.get(k + row[j]) * values[j];
        }
      }
#pragma unroll
      for (int j = 0; j < N; ++j) partials.set((group * columns + column - begin) * N + j, acc[j]);
    }
    __syncthreads();
    const int reached = rows == 1 ? columns * N : pixels;  // rows > 1: all columns are here
    for (int p = threadIdx.x; p < reached; p += kThreads) {
      float sum = 0;
      for (int g = 0; g < groups; ++g) {
        for (int r = 0; r < rows; ++r) sum += partials.get(g * columns * N + r * pixels + p);
      }
      map[begin * N + p] = sum;
    }
    __syncthreads();
  }
}

// The same where channels lie side by side: a few lanes per pixel.
template <class T>
__device__ inline void sum_channels(const Chunk<T>& x, int count, int pixels, Shared<float> alpha,
                                    float* map) {
  constexpr int N = kLanes<T>;
  int lanes = 1;
  while (lanes < kWarp && lanes * N < count) lanes *= 2;
  const int per_step = kThreads / lanes, lane = threadIdx.x % lanes;
  for (int begin = 0; begin < pixels; begin += per_step) {
    const int p = begin + (int)threadIdx.x / lanes;
    float sum = 0;
    if (p < pixels) {
      const T* pixel = x.pixel(p);
#pragma unroll 2
      for (int k = lane * N; k < count; k += lanes * N) {
        float values[N];
        if (k + N <= count) {
          load<N>(pixel + k, values);
#pragma unroll
          for (int j = 0; j < N; ++j) sum += alpha.get(k + j) * values[j];
        } else {
#pragma unroll
          for (int j = 0; j < N; ++j) {
            if (k + j < count) sum += alpha.get(k + j) * to_float(pixel[k + j]);
          }
        }
      }
    }
    sum = reduce_lanes(sum, lanes, Sum());
    if (lane == 0 && p < pixels) map[p] = sum;
  }
}

}  // namespace cuda
}  // namespace camkernels
