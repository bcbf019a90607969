// What is asked of CUDA beside launches.
#include <cuda_runtime.h>

#include <atomic>

#include "common/device.h"
#include "common/launch.cuh"

namespace camkernels {
namespace cuda {

std::atomic<int64_t> g_launches{0};

namespace {

__global__ void nothing_kernel() {}

}  // namespace

const char* error_name(int error) { return cudaGetErrorName((cudaError_t)error); }

const char* error_text(int error) { return cudaGetErrorString((cudaError_t)error); }

Versions versions() {
  Versions found = {};
  cudaDriverGetVersion(&found.driver);
  cudaRuntimeGetVersion(&found.runtime);
  return found;
}

int device_status() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, nothing_kernel);
  cudaGetLastError();  // a later launch is not to report it
  return error;
}

int64_t launches() { return g_launches; }

}  // namespace cuda
}  // namespace camkernels
