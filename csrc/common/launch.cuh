// The launch itself: every kernel of camkernels._cuda comes here. A kernel is called by one thread
// block size, with dynamic shared memory only.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "common/view.h"

namespace camkernels {
namespace cuda {

constexpr int kThreads = 256;
// Said to the compiler, which of itself spills to get down to 32, 40 or 48 registers.
constexpr int kBlocksPerMultiprocessor = 3;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

extern std::atomic<int64_t> g_launches;  // see common/device.h

template <class T>
CAMKERNELS_HD constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

// Returns a cudaError_t: of this launch, or of what failed on the device before it.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), int64_t blocks, int shared_bytes, void* stream,
           Arguments... arguments) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((unsigned)blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  ++g_launches;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  const cudaError_t sticky = cudaGetLastError();
  return error != cudaSuccess ? error : sticky;
}

}  // namespace cuda
}  // namespace camkernels
