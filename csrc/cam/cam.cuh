// The map of one sample by several blocks, and the cotangents of a chunk of channels: what cam and
// cam_statistics share. Formulas: camkernels/ops/cam/reference.py.
#pragma once

#include "cam/channels.cuh"

namespace camkernels {
namespace cuda {

// Shared memory of a block, in floats.
constexpr int kTile = 2048;  // pixels of D that are kept
constexpr int kAlphaAt = 0, kSumsAt = kLargestChunk, kScratchAt = kSumsAt + kPartials;
constexpr int kScratch = 64, kDAt = kScratchAt + kScratch;
constexpr int kForwardBytes = kDAt * sizeof(float);
constexpr int kGradAlphaAt = kDAt + kTile;
constexpr int kBackwardBytes = (kGradAlphaAt + kLargestChunk) * sizeof(float);

inline int64_t chunks_of(const Sizes& sizes, int64_t chunk) {
  return ceil_div(sizes.channels, chunk);
}

// alpha of the chunk into shared memory; where gradients are given, also into args.alpha.
__device__ inline void chunk_weights(const CamForward& args, Access of_gradients, int64_t b,
                                     int64_t first, int count, Shared<float> weights,
                                     Shared<float> partials) {
  const int pixels = (int)args.sizes.pixels();
  float* alpha = static_cast<float*>(args.alpha) + b * args.sizes.channels + first;
  if (args.gradients.data == nullptr) {
    for (int k = threadIdx.x; k < count; k += kThreads) weights.set(k, alpha[k]);
    __syncthreads();
    return;
  }
  CAMKERNELS_CUDA_SWITCH(
      args.gradients.dtype,
      reduce_pixels(Chunk<T>(args.gradients, args.sizes, b, first), count, pixels, of_gradients, 0,
                    pixels, One(), false, weights, partials));
  __syncthreads();
  for (int k = threadIdx.x; k < count; k += kThreads) {
    const float mean = weights.get(k) / (float)pixels;
    weights.set(k, mean);
    alpha[k] = mean;
  }
  __syncthreads();
}

// The map of sample b from a chunk of its channels, by one of ceil(K / chunk) blocks. True in the
// block that completed it; there `total` is the sum before the ReLU, in every thread.
template <class T>
__device__ inline bool make_map(const CamForward& args, Access of_activations, Access of_gradients,
                                float* total) {
  const int chunk = (int)args.block, chunks = (int)ceil_div<int64_t>(args.sizes.channels, chunk);
  const int64_t b = blockIdx.x / chunks;
  const int index = blockIdx.x % chunks, pixels = (int)args.sizes.pixels();
  const int64_t first = (int64_t)index * chunk, left = args.sizes.channels - first;
  const int count = left < chunk ? (int)left : chunk;
  const Shared<float> weights = shared_array<float>(kAlphaAt);
  const Shared<float> partials = shared_array<float>(kSumsAt);

  chunk_weights(args, of_gradients, b, first, count, weights, partials);
  float* partial = static_cast<float*>(args.partial) + (b * chunks + index) * pixels;
  const Chunk<T> x(args.activations, args.sizes, b, first);
  if (of_activations == kChannelVectors) {
    sum_channels(x, count, pixels, weights, partial);
  } else if (of_activations == kPlaneVectors) {
    sum_planes<kLanes<T>>(x, count, pixels, weights, partials, partial);
  } else {
    sum_planes<1>(x, count, pixels, weights, partials, partial);
  }
  if (!arrives_last(args.arrivals + b, chunks, shared_array<int>(kScratchAt))) return false;

  float* map = static_cast<float*>(args.maps) + b * pixels;
  partial -= index * (int64_t)pixels;
  float sums[1] = {0};
  for (int p = threadIdx.x; p < pixels; p += kThreads) {
    float value = __ldcg(partial + p);
    for (int i = 1; i < chunks; ++i) value += __ldcg(partial + i * (int64_t)pixels + p);
    sums[0] += value;
    map[p] = args.relu && value < 0 ? 0.0f : value;  // keeps NaN, as torch's relu does
  }
  reduce_block(sums, shared_array<float>(kScratchAt), Sum());
  *total = sums[0];
  return true;
}

// grad_activations = alpha D for pixels [begin, end) of a chunk.
template <int N, class T>
__device__ inline void write_planes(T* out, Shared<float> alpha, Shared<float> d, int count,
                                    int pixels, int begin, int end) {
  const int vectors = (end - begin) / N;  // N = 1, or planes are whole vectors
  for (int i = threadIdx.x; i < count * vectors; i += kThreads) {
    const int k = i / vectors, p = i % vectors * N;
    float values[N];
    const float weight = alpha.get(k);
#pragma unroll
    for (int j = 0; j < N; ++j) values[j] = weight * d.get(p + j);
    store<N>(out + (int64_t)k * pixels + begin + p, values);
  }
}

// The same over whole vectors that may end in another channel, where all pixels are in the tile.
template <class T>
__device__ inline void write_across_planes(T* out, Shared<float> alpha, Shared<float> d, int count,
                                           int pixels) {
  constexpr int N = kLanes<T>;
  const int elements = count * pixels;
  for (int e = threadIdx.x * N; e < elements; e += kThreads * N) {
    int k = e / pixels, p = e % pixels;
    float values[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      values[j] = k < count ? alpha.get(k) * d.get(p) : 0.0f;
      if (++p == pixels) {
        p = 0;
        ++k;
      }
    }
    if (e + N <= elements) {
      store<N>(out + e, values);
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        if (e + j < elements) out[e + j] = from_float<T>(values[j]);
      }
    }
  }
}

template <int N, class T>
__device__ inline void write_channels(T* out, int64_t channels, Shared<float> alpha,
                                      Shared<float> d, int count, int begin, int end) {
  const int vectors = count / N;  // N = 1, or the chunk is whole vectors
  for (int i = threadIdx.x; i < (end - begin) * vectors; i += kThreads) {
    const int p = i / vectors, k = i % vectors * N;
    float values[N];
    const float weight = d.get(p);
#pragma unroll
    for (int j = 0; j < N; ++j) values[j] = alpha.get(k + j) * weight;
    store<N>(out + (begin + p) * channels + k, values);
  }
}

// Pixels [begin, end) of grad_activations; `vectors`: the output is aligned.
template <class T>
__device__ inline void write_tile(const CamBackward& args, bool vectors, int64_t b, int64_t first,
                                  int count, int begin, int end, Shared<float> alpha,
                                  Shared<float> d) {
  constexpr int N = kLanes<T>;
  const int64_t channels = args.sizes.channels;
  const int pixels = (int)args.sizes.pixels();
  T* out = static_cast<T*>(args.grad_activations) + b * channels * pixels;
  if (args.channels_last) {
    if (vectors && channels % N == 0) {
      write_channels<N>(out + first, channels, alpha, d, count, begin, end);
    } else {
      write_channels<1>(out + first, channels, alpha, d, count, begin, end);
    }
    return;
  }
  out += first * pixels;
  if (vectors && pixels % N == 0) {
    write_planes<N>(out, alpha, d, count, pixels, begin, end);
  } else if (vectors && end - begin == pixels && channels * pixels % N == 0) {
    write_across_planes(out, alpha, d, count, pixels);
  } else {
    write_planes<1>(out, alpha, d, count, pixels, begin, end);
  }
}

// Both cotangents of a chunk of channels of one sample; `cotangent(p)` is D at pixel p.
template <class T, class Cotangent>
__device__ inline void write_cotangents(const CamBackward& args, Access of_activations,
                                        bool vectors, int64_t b, int64_t first,
                                        Cotangent cotangent) {
  const int64_t left = args.sizes.channels - first;
  const int count = left < args.block ? (int)left : (int)args.block;
  const int pixels = (int)args.sizes.pixels();
  const Shared<float> alpha = shared_array<float>(kAlphaAt), d = shared_array<float>(kDAt);
  const Shared<float> partials = shared_array<float>(kSumsAt);
  const Shared<float> sums = shared_array<float>(kGradAlphaAt);
  if (args.alpha != nullptr) {
    const float* weights = static_cast<const float*>(args.alpha) + b * args.sizes.channels + first;
    for (int k = threadIdx.x; k < count; k += kThreads) alpha.set(k, weights[k]);
  }
  for (int begin = 0; begin < pixels; begin += kTile) {
    const int end = pixels - begin < kTile ? pixels : begin + kTile;
    __syncthreads();  // the tile before has been read
    for (int p = begin + threadIdx.x; p < end; p += kThreads) d.set(p - begin, cotangent(p));
    __syncthreads();
    if (args.activations.data != nullptr) {
      auto weight = [&](int p) { return d.get(p - begin); };
      reduce_pixels(Chunk<T>(args.activations, args.sizes, b, first), count, pixels, of_activations,
                    begin, end, weight, begin > 0, sums, partials);
    }
    if (args.alpha != nullptr) {
      write_tile<T>(args, vectors, b, first, count, begin, end, alpha, d);
    }
  }
  if (args.activations.data == nullptr) return;
  __syncthreads();
  float* out = static_cast<float*>(args.grad_alpha) + b * args.sizes.channels + first;
  for (int k = threadIdx.x; k < count; k += kThreads) out[k] = sums.get(k);
}

// D without statistics: the cotangent of the map where the ReLU was open; NaN counts as open.
struct MapCotangent {
  const float *grad, *map;
  int64_t stride_h, stride_w;
  int width;

  __device__ MapCotangent(const CamBackward& args, int64_t b)
      : grad(static_cast<const float*>(args.grad_maps.data)),
        map(static_cast<const float*>(args.maps)),
        stride_h(args.grad_maps.stride_h),
        stride_w(args.grad_maps.stride_w),
        width((int)args.sizes.width) {
    if (grad != nullptr) grad += b * args.grad_maps.stride_b;
    if (map != nullptr) map += b * args.sizes.pixels();
  }
  __device__ float given(int p) const {
    return grad == nullptr ? 0.0f : grad[p / width * stride_h + p % width * stride_w];
  }
  __device__ float operator()(int p) const {
    return map != nullptr && map[p] <= 0 ? 0.0f : given(p);
  }
};

}  // namespace cuda
}  // namespace camkernels
