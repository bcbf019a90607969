// OpenMP by the runtime that torch has loaded; without OpenMP one thread does all.
#pragma once

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace camkernels {
namespace CAMKERNELS_ISA {

// Index of the calling thread within its team.
static inline int thread_index() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace CAMKERNELS_ISA
}  // namespace camkernels
