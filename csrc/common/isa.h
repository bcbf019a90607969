// Which instruction set this translation unit is compiled for.
//
// A kernel source is compiled once per instruction set, each time in a namespace of its own, so
// that no function compiled for AVX-512 can be merged by the linker with one that a smaller
// machine runs. For the same reason kernels use no function of the C++ library: the linker keeps
// one copy of an inline function, whichever unit it came from.
#pragma once

#ifndef CAMKERNELS_ISA
#define CAMKERNELS_ISA baseline
#endif

// What host and device code share.
#if defined(__CUDACC__)
#define CAMKERNELS_HD __host__ __device__
#else
#define CAMKERNELS_HD
#endif

// Declares what launches a CUDA kernel on a stream (cudaStream_t); it returns a cudaError_t. No
// CUDA type is named, so that the bindings need none of its headers.
#define CAMKERNELS_DECLARE_CUDA_KERNEL(name, Arguments) \
  namespace cuda {                                      \
  int name(const Arguments& arguments, void* stream);   \
  }

// Declares a kernel in the namespace of every instruction set.
#define CAMKERNELS_DECLARE_KERNEL(name, Arguments) \
  namespace baseline {                             \
  void name(const Arguments& arguments);           \
  }                                                \
  namespace avx2 {                                 \
  void name(const Arguments& arguments);           \
  }                                                \
  namespace avx512 {                               \
  void name(const Arguments& arguments);           \
  }
