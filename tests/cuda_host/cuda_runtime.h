// As much of CUDA as camkernels' .cu files use, for g++: a block's threads run as fibres of one
// thread of the host (see host.cpp). A test tool, not a simulator: one-dimensional blocks, dynamic
// shared memory, no textures, no graphs, no timing.
//
// What it finds that a GPU hides:
// - a barrier that not all threads of the block reach, or reach at different places;
// - a warp operation that a lane of its mask misses;
// - accesses to shared memory outside of what was asked for at the launch;
// - races on shared memory: two threads, one of which writes, without a barrier between;
// - shared memory read before it was written (it is filled with NaN before each block);
// - a block that arrives (atomicAdd, which kernels use for nothing else) before all its threads
//   have called __threadfence and met at a barrier: others might read what is not written yet;
// - a read of what other blocks wrote (__ldcg) without __threadfence since the block's arrival.
// Accesses are seen through camkernels::cuda::Shared (csrc/common/block.cuh). Stores to global
// memory are not: one between a thread's fence and the barrier goes unnoticed.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __host__
#define __device__
#define __global__
#define __shared__
#define __launch_bounds__(...)

using std::fmaxf;

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
};
typedef struct CUstream_st* cudaStream_t;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};
struct cudaFuncAttributes {
  int binaryVersion;
};

namespace cuda_host {

constexpr int kWarp = 32;
constexpr int kMostThreads = 1024;
constexpr size_t kSharedBytes = 48 << 10;  // of a block, as every GPU has

// Runs `thread` once for each thread of each block. Throws std::runtime_error with what it found.
void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);

// In which order threads and blocks come: 0 as numbered, 1 from the last, else shuffled by it.
void set_order(unsigned seed);

void barrier(const char* file, int line);
// Waits for the lanes of `mask`; their values come back.
const uint32_t* exchange(const char* file, int line, unsigned mask, uint32_t value);
int lane();
void watch(const void* address, size_t bytes, bool writes);
void fence();
void arrive();
void read_from_others();
[[noreturn]] void fail(const char* message);

}  // namespace cuda_host

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

#define CAMKERNELS_WATCH(address, bytes, writes) ::cuda_host::watch(address, bytes, writes)

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  if (config->dynamicSmemBytes > cuda_host::kSharedBytes) return cudaErrorInvalidValue;
  cuda_host::run(config->gridDim, config->blockDim, config->dynamicSmemBytes,
                 [&] { kernel(arguments...); });
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaSuccess             ? "cudaSuccess"
         : error == cudaErrorInvalidValue ? "cudaErrorInvalidValue"
                                          : "cudaErrorInvalidConfiguration";
}
inline const char* cudaGetErrorString(cudaError_t) { return "in the host build of the tests"; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 0, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 0, cudaSuccess; }
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return cudaSuccess;
}

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_host::barrier(file, line);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, const char* file = __builtin_FILE(),
                       int line = __builtin_LINE()) {
  cuda_host::exchange(file, line, mask, 0);
}
inline void __threadfence() { cuda_host::fence(); }

template <class T>
T __shfl_sync(unsigned mask, T value, int from, const char* file = __builtin_FILE(),
              int line = __builtin_LINE()) {
  static_assert(sizeof(T) == 4, "one register");
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t* values = cuda_host::exchange(file, line, mask, bits);
  from %= cuda_host::kWarp;
  if (!(mask >> from & 1u)) cuda_host::fail("a shuffle reads a lane outside of its mask");
  std::memcpy(&value, values + from, 4);
  return value;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance, const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
  return __shfl_sync(mask, value, cuda_host::lane() ^ distance, file, line);
}
// Past the last lane a thread keeps its own value.
template <class T>
T __shfl_down_sync(unsigned mask, T value, int distance, const char* file = __builtin_FILE(),
                   int line = __builtin_LINE()) {
  const int lane = cuda_host::lane(), from = lane + distance;
  return __shfl_sync(mask, value, from < cuda_host::kWarp ? from : lane, file, line);
}
inline unsigned __ballot_sync(unsigned mask, bool predicate, const char* file = __builtin_FILE(),
                              int line = __builtin_LINE()) {
  const uint32_t* values = cuda_host::exchange(file, line, mask, predicate);
  unsigned votes = 0;
  for (int i = 0; i < cuda_host::kWarp; ++i) {
    if (mask >> i & 1u) votes |= values[i] << i;
  }
  return votes;
}

inline int atomicAdd(int* address, int value) {
  cuda_host::arrive();
  const int before = *address;
  *address += value;
  return before;
}
template <class T>
T __ldcg(const T* address) {
  cuda_host::read_from_others();
  return *address;
}
inline float __int_as_float(int bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
