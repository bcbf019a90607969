// p-norms of each sample, also of maps that are enlarged first, and their gradient.
// camkernels/ops/lp_norm/reference.py says what.
#pragma once

#include "common/isa.h"
#include "common/view.h"
#include "warp/taps.h"

namespace camkernels {

struct LpNorm {
  Sizes sizes;  // of the values; channels unused
  View values;
  Warp warp;  // to the size that the norm is taken at
  bool enlarges;
  double p;
  void* norms;             // (batch,): written by the forward, read by the backward
  const void* grad_norms;  // null: forward
  void* out;               // of the backward: contiguous, in the dtype of the values
  char* scratch;           // `scratch_bytes` per thread
  int64_t scratch_bytes;
  int threads;
};

CAMKERNELS_DECLARE_KERNEL(lp_norm, LpNorm)

}  // namespace camkernels
