// float32, bfloat16 and float16 in memory, float in registers; loads and stores of 16 bytes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "common/view.h"

namespace camkernels {
namespace cuda {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

constexpr int kVectorBytes = 16;
// Elements of T that lie in 16 bytes.
template <class T>
constexpr int kLanes = kVectorBytes / (int)sizeof(T);

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(bfloat16 value) { return __bfloat162float(value); }
__device__ inline float to_float(float16 value) { return __half2float(value); }

template <class T>
__device__ inline T from_float(float value);
template <>
__device__ inline float from_float<float>(float value) {
  return value;
}
template <>
__device__ inline bfloat16 from_float<bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ inline float16 from_float<float16>(float value) {
  return __float2half_rn(value);
}

// N neighbours, one by one or 16 bytes of them at an aligned address.
template <int N, class T>
__device__ inline void load_raw(const T* from, T (&to)[N]) {
  if constexpr (N * sizeof(T) == kVectorBytes) {
    const uint4 bits = *reinterpret_cast<const uint4*>(from);
    memcpy(to, &bits, kVectorBytes);
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) to[j] = from[j];
  }
}

template <int N, class T>
__device__ inline void store_raw(T* to, const T (&from)[N]) {
  if constexpr (N * sizeof(T) == kVectorBytes) {
    uint4 bits;
    memcpy(&bits, from, kVectorBytes);
    *reinterpret_cast<uint4*>(to) = bits;
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) to[j] = from[j];
  }
}

template <int N, class T>
__device__ inline void load(const T* from, float (&to)[N]) {
  T raw[N];
  load_raw<N>(from, raw);
#pragma unroll
  for (int j = 0; j < N; ++j) to[j] = to_float(raw[j]);
}

template <int N, class T>
__device__ inline void store(T* to, const float (&from)[N]) {
  T raw[N];
#pragma unroll
  for (int j = 0; j < N; ++j) raw[j] = from_float<T>(from[j]);
  store_raw<N>(to, raw);
}

inline bool is_aligned(const void* data) { return (uintptr_t)data % kVectorBytes == 0; }

}  // namespace cuda
}  // namespace camkernels

// Runs a statement with T bound to the element type of a dtype code.
#define CAMKERNELS_CUDA_SWITCH(code, ...)                      \
  switch (code) {                                              \
    case ::camkernels::kBFloat16: {                            \
      using T [[maybe_unused]] = ::camkernels::cuda::bfloat16; \
      __VA_ARGS__;                                             \
      break;                                                   \
    }                                                          \
    case ::camkernels::kFloat16: {                             \
      using T [[maybe_unused]] = ::camkernels::cuda::float16;  \
      __VA_ARGS__;                                             \
      break;                                                   \
    }                                                          \
    default: {                                                 \
      using T [[maybe_unused]] = float;                        \
      __VA_ARGS__;                                             \
    }                                                          \
  }
