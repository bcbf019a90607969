// A thread takes the eight elements of one byte of the mask: 16 or 32 bytes, and the byte.
#include "common/elements.cuh"
#include "common/launch.cuh"
#include "relu/relu.h"

namespace camkernels {
namespace cuda {

namespace {

constexpr int kGroup = 8;

// `vectors`: all addresses are aligned. Behind `count` elements read as 0.
template <class T>
__device__ void load_group(const T* from, int64_t first, int64_t count, bool vectors,
                           T (&to)[kGroup]) {
  if (vectors && first + kGroup <= count) {
#pragma unroll
    for (int i = 0; i < kGroup; i += kLanes<T>) {
      load_raw<kLanes<T>>(from + first + i, reinterpret_cast<T(&)[kLanes<T>]>(to[i]));
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kGroup; ++i) to[i] = first + i < count ? from[first + i] : from_float<T>(0);
}

template <class T>
__device__ void store_group(T* to, int64_t first, int64_t count, bool vectors,
                            const T (&from)[kGroup]) {
  if (vectors && first + kGroup <= count) {
#pragma unroll
    for (int i = 0; i < kGroup; i += kLanes<T>) {
      store_raw<kLanes<T>>(to + first + i, reinterpret_cast<const T(&)[kLanes<T>]>(from[i]));
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    if (first + i < count) to[first + i] = from[i];
  }
}

__device__ int64_t first_element() {
  return ((int64_t)blockIdx.x * kThreads + threadIdx.x) * kGroup;
}

template <class T>
__global__ void __launch_bounds__(kThreads) relu_fwd_kernel(ReluForward args, bool vectors) {
  const int64_t first = first_element();
  if (first >= args.count) return;
  T value[kGroup];
  load_group(static_cast<const T*>(args.input), first, args.count, vectors, value);
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    const bool closed = to_float(value[i]) <= 0;  // false for NaN, which stays
    if (closed) value[i] = from_float<T>(0);
    if (!closed) bits |= 1u << i;
  }
  store_group(static_cast<T*>(args.output), first, args.count, vectors, value);
  if (args.mask != nullptr) args.mask[first / kGroup] = (uint8_t)bits;
}

// kGuided; kMask: by the mask, otherwise by the output.
template <class T, bool kGuided, bool kMask>
__global__ void __launch_bounds__(kThreads) relu_bwd_kernel(ReluBackward args, bool vectors) {
  const int64_t first = first_element();
  if (first >= args.count) return;
  T grad[kGroup], output[kGroup];
  load_group(static_cast<const T*>(args.grad), first, args.count, vectors, grad);
  unsigned bits = 0;
  if constexpr (kMask) {
    bits = args.mask[first / kGroup];
  } else {
    load_group(static_cast<const T*>(args.output), first, args.count, vectors, output);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) bits |= (to_float(output[i]) <= 0 ? 0u : 1u) << i;
  }
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    const bool closed = !(bits >> i & 1u) || (kGuided && to_float(grad[i]) <= 0);
    if (closed) grad[i] = from_float<T>(0);
  }
  store_group(static_cast<T*>(args.grad_input), first, args.count, vectors, grad);
}

}  // namespace

int relu_fwd(const ReluForward& args, void* stream) {
  const int64_t blocks = ceil_div<int64_t>(args.count, kGroup * kThreads);
  const bool vectors = is_aligned(args.input) && is_aligned(args.output);
  int status = 0;
  CAMKERNELS_CUDA_SWITCH(args.dtype,
                         status = launch(relu_fwd_kernel<T>, blocks, 0, stream, args, vectors));
  return status;
}

int relu_bwd(const ReluBackward& args, void* stream) {
  const int64_t blocks = ceil_div<int64_t>(args.count, kGroup * kThreads);
  const bool by_mask = args.mask != nullptr;
  const bool vectors =
      is_aligned(args.grad) && is_aligned(args.grad_input) && (by_mask || is_aligned(args.output));
  int status = 0;
  CAMKERNELS_CUDA_SWITCH(args.dtype, {
    auto kernel =
        by_mask
            ? (args.guided ? relu_bwd_kernel<T, true, true> : relu_bwd_kernel<T, false, true>)
            : (args.guided ? relu_bwd_kernel<T, true, false> : relu_bwd_kernel<T, false, false>);
    status = launch(kernel, blocks, 0, stream, args, vectors);
  });
  return status;
}

}  // namespace cuda
}  // namespace camkernels
