// Min-max normalisation of maps, and its gradient. camkernels/ops/min_max/reference.py says what.
#pragma once

#include "common/isa.h"
#include "common/view.h"

namespace camkernels {

struct MinMax {
  Sizes sizes;  // channels unused
  View maps;
  const void* grad;  // backward: cotangents in the type of the sums, with strides of their own
  int64_t grad_b, grad_h, grad_w;
  void* extremes;  // (batch, 2)
  void* out;       // contiguous: normalised maps, or cotangents in the dtype of the maps
  int threads;
};

CAMKERNELS_DECLARE_KERNEL(min_max_fwd, MinMax)
CAMKERNELS_DECLARE_KERNEL(min_max_bwd, MinMax)

}  // namespace camkernels
