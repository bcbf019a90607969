// CUDA as the bindings see it, without its headers.
#pragma once

#include <cstdint>

namespace camkernels {
namespace cuda {

const char* error_name(int error);
const char* error_text(int error);

// As 1000 major + 10 minor; the driver's is 0 where there is none.
struct Versions {
  int driver, runtime;
};
Versions versions();

// Whether kernels of this build run on the current device: cudaSuccess, or why not.
int device_status();

// Kernels launched by this process.
int64_t launches();

}  // namespace cuda
}  // namespace camkernels
