// What the Python bindings of every room share: addresses, and the kernel of the chosen width.
// A room's csrc/<op>/<op>_bindings.h defines `void define(py::module_&)` in a namespace of its own,
// camkernels::<op>_bindings, for bindings_cpu.cpp.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

#include "common/simd_level.h"

namespace camkernels {

namespace py = pybind11;
using Pointer = std::uintptr_t;
using Release = py::call_guard<py::gil_scoped_release>;

// The instruction set that runs, set when the module is imported.
extern int g_level;

template <class T = void>
T* at(Pointer address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace camkernels

// Runs camkernels::<isa>::name(args); to be used inside namespace camkernels.
#if defined(CAMKERNELS_HAS_AVX512)
#define CAMKERNELS_RUN(name, args) \
  if (g_level == kAvx512) {        \
    avx512::name(args);            \
  } else if (g_level == kAvx2) {   \
    avx2::name(args);              \
  } else {                         \
    baseline::name(args);          \
  }
#elif defined(CAMKERNELS_HAS_AVX2)
#define CAMKERNELS_RUN(name, args) \
  if (g_level == kAvx2) {          \
    avx2::name(args);              \
  } else {                         \
    baseline::name(args);          \
  }
#else
#define CAMKERNELS_RUN(name, args) baseline::name(args);
#endif
