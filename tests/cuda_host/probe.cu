// Kernels for the tests of the host build itself: right ones, and ones with a fault that a GPU may
// or may not show.
#include <vector>

#include "common/block.cuh"
#include "probe.h"

namespace camkernels {
namespace cuda {

namespace {

constexpr int kSharedFloats = kThreads;

__global__ void mirror(const float* in, float* out, bool barrier) {
  const Shared<float> kept = shared_array<float>(0);
  const int i = threadIdx.x;
  kept.set(i, in[i]);
  if (barrier) __syncthreads();
  out[i] = kept.get(kThreads - 1 - i);
}

__global__ void reuse(const float* in, float* out) {
  const Shared<float> kept = shared_array<float>(0);
  const int i = threadIdx.x;
  for (int round = 0; round < 2; ++round) {
    kept.set(i, in[i] + (float)round);
    __syncthreads();
    out[i] = kept.get((i + 1) % kThreads);  // the next round may overwrite it
  }
}

__global__ void half_a_barrier(float* out) {
  if (threadIdx.x < kThreads / 2) __syncthreads();
  out[threadIdx.x] = 0;
}

__global__ void two_barriers(float* out) {
  if (threadIdx.x < kThreads / 2) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 0;
}

__global__ void beyond(float* out, int index) {
  out[threadIdx.x] = shared_array<float>(0).get(index);
}

__global__ void half_a_warp(float* out) {
  const int i = threadIdx.x;
  float value = (float)i;
  if (i % kWarp < kWarp / 2) value = __shfl_xor_sync(0xffffffffu, value, 1);
  out[i] = value;
}

// Sum and largest over the block, the lane below, and the votes of the warp.
__global__ void warps(const float* in, float* out) {
  const int i = threadIdx.x;
  float sum[1] = {in[i]}, largest[1] = {in[i]};
  reduce_block(sum, shared_array<float>(0), Sum());
  reduce_block(largest, shared_array<float>(0), Largest());
  const float below = __shfl_down_sync(0xffffffffu, in[i], 1);
  const unsigned votes = __ballot_sync(0xffffffffu, in[i] > 0);
  __syncwarp();
  out[i] = sum[0];
  out[kThreads + i] = largest[0];
  out[2 * kThreads + i] = below;
  out[3 * kThreads + i] = (float)(votes & 0xffffu);
}

__global__ void count_arrivals(int* arrivals, int blocks, float* out) {
  const bool last = arrives_last(arrivals, blocks, shared_array<int>(0));
  if (threadIdx.x == 0) out[blockIdx.x] = last;
}

// An arrival as of arrives_last, or without one of its parts.
__global__ void arrive(int* arrivals, bool fences, bool barrier, bool fences_again, float* out) {
  out[threadIdx.x] = 1;
  if (fences) __threadfence();
  if (barrier) __syncthreads();
  if (threadIdx.x == 0) atomicAdd(arrivals, 1);
  __syncthreads();
  if (fences_again) __threadfence();
  out[kThreads + threadIdx.x] = __ldcg(out + threadIdx.x);
}

// The first lanes of a warp, and a mask of 16 of them.
__global__ void shuffle(float* out, int lanes, int from) {
  const int i = threadIdx.x;
  float value = (float)i;
  if (i % kWarp < lanes) value = __shfl_sync(0xffffu, value, from);
  out[i] = value;
}

// Blocks of another size than launch() gives them.
int launch_threads(unsigned threads, float* out) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(1);
  config.blockDim = dim3(threads);
  return cudaLaunchKernelEx(&config, beyond, out, 0);
}

}  // namespace

int probe(const std::string& name, const float* in, float* out) {
  const int bytes = kSharedFloats * sizeof(float);
  if (name == "mirror") return launch(mirror, 2, bytes, nullptr, in, out, true);
  if (name == "mirror without barrier") return launch(mirror, 1, bytes, nullptr, in, out, false);
  if (name == "reuse without barrier") return launch(reuse, 1, bytes, nullptr, in, out);
  if (name == "half a barrier") return launch(half_a_barrier, 1, bytes, nullptr, out);
  if (name == "two barriers") return launch(two_barriers, 1, bytes, nullptr, out);
  if (name == "beyond") return launch(beyond, 1, bytes, nullptr, out, kSharedFloats);
  if (name == "below") return launch(beyond, 1, bytes, nullptr, out, -1);
  if (name == "unwritten") return launch(beyond, 1, bytes, nullptr, out, 7);
  if (name == "half a warp") return launch(half_a_warp, 1, bytes, nullptr, out);
  if (name == "warps") return launch(warps, 1, bytes, nullptr, in, out);
  if (name == "shuffle of half a warp") return launch(shuffle, 1, 0, nullptr, out, 16, 3);
  if (name == "shuffle from outside") return launch(shuffle, 1, 0, nullptr, out, 16, 17);
  if (name == "shuffle of others") return launch(shuffle, 1, 0, nullptr, out, kWarp, 3);
  if (name == "part of a warp") return launch_threads(kWarp + 8, out);
  if (name == "too many threads") return launch_threads(1024 + kWarp, out);
  if (name == "too much shared memory") return launch(mirror, 1, 1 << 20, nullptr, in, out, true);
  if (name == "arrivals") {
    int arrivals = 0;
    const int status = launch(count_arrivals, 3, bytes, nullptr, &arrivals, 3, out);
    out[3] = (float)arrivals;
    return status;
  }
  if (name.rfind("arrival", 0) == 0) {
    int arrivals = 0;
    return launch(arrive, 1, 0, nullptr, &arrivals, name != "arrival without fence",
                  name != "arrival without barrier", name != "arrival without second fence", out);
  }
  return -1;
}

}  // namespace cuda
}  // namespace camkernels
