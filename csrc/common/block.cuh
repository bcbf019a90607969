// Shared memory of a block, and reductions over its threads in a fixed order: equal inputs give
// equal bits.
#pragma once

#include <cuda_runtime.h>

#include "common/launch.cuh"

// The host build of the tests watches every access; see tests/cuda_host/cuda_runtime.h.
#ifndef CAMKERNELS_WATCH
#define CAMKERNELS_WATCH(address, bytes, writes) ((void)0)
#endif

namespace camkernels {
namespace cuda {

// An array in shared memory.
template <class T>
struct Shared {
  T* data;

  __device__ T get(int i) const {
    CAMKERNELS_WATCH(data + i, sizeof(T), false);
    return data[i];
  }
  __device__ void set(int i, T value) const {
    CAMKERNELS_WATCH(data + i, sizeof(T), true);
    data[i] = value;
  }
};

// `offset` floats behind the start of the block's dynamic shared memory.
template <class T>
__device__ inline Shared<T> shared_array(int offset) {
  extern __shared__ float camkernels_shared[];
  return {reinterpret_cast<T*>(camkernels_shared + offset)};
}

struct Sum {
  __device__ float operator()(float a, float b) const { return a + b; }
};
// Of numbers that are no NaN.
struct Largest {
  __device__ float operator()(float a, float b) const { return a > b ? a : b; }
};

// Over groups of `lanes` neighbouring lanes (a power of two); every lane gets its group's result.
template <class Combine>
__device__ inline float reduce_lanes(float value, int lanes, Combine combine) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  return value;
}

// Floats of shared memory that reduce_block takes for N values.
constexpr int reduction_floats(int n) { return n * kWarps; }

// N values of every thread to their reductions over the block, which every thread gets. All threads
// must come; `scratch` may be used again afterwards.
template <int N, class Combine>
__device__ inline void reduce_block(float (&values)[N], Shared<float> scratch, Combine combine) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    values[n] = reduce_lanes(values[n], kWarp, combine);
    if (lane == 0) scratch.set(n * kWarps + warp, values[n]);
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; ++n) {
    values[n] = scratch.get(n * kWarps);
    for (int w = 1; w < kWarps; ++w) values[n] = combine(values[n], scratch.get(n * kWarps + w));
  }
  __syncthreads();
}

// Whether this block is the last of `count` to come here; what the others wrote before can be read
// then (past the first-level cache: __ldcg). `arrivals` is one int, zero before and after.
__device__ inline bool arrives_last(int* arrivals, int count, Shared<int> flag) {
  if (count == 1) {
    __syncthreads();
    return true;
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const bool last = atomicAdd(arrivals, 1) == count - 1;
    if (last) *arrivals = 0;
    flag.set(0, last);
  }
  __syncthreads();
  const bool last = flag.get(0) != 0;
  __syncthreads();  // the flag's place may be used again
  if (last) __threadfence();
  return last;
}

}  // namespace cuda
}  // namespace camkernels
