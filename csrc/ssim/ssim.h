// Structural similarity of two pictures, and its gradient to both.
// camkernels/ops/ssim/reference.py says what.
#pragma once

#include "common/isa.h"
#include "common/view.h"
#include "ssim/ssim_loops.h"

namespace camkernels {

struct SsimArguments {
  Sizes sizes;
  View x, y;
  SsimWindow window;
  const void* grad;       // (batch,), null: forward
  void* values;           // (batch,) of the forward
  void *grad_x, *grad_y;  // contiguous, in the dtypes of x and y; null where not wanted
  void* scratch;          // `scratch_elements` of the type of the sums per thread
  int64_t scratch_elements;
  double* sums;  // (batch, channels)
  int threads;
};

CAMKERNELS_DECLARE_KERNEL(ssim, SsimArguments)

}  // namespace camkernels
