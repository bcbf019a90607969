// Similarity of two maps after warping one and enlarging the other; neither is stored.
// camkernels/ops/warped_ssim/reference.py says what.
#pragma once

#include "common/isa.h"
#include "common/view.h"
#include "ssim/ssim_loops.h"
#include "warp/taps.h"

namespace camkernels {

struct WarpedSsimArguments {
  int64_t batch;
  Warp warp;   // of the maps
  Warp whole;  // of the others: the whole picture, for all samples alike
  View maps, others;
  SsimWindow window;
  const void* grad;               // (batch,), null: forward
  void* values;                   // (batch,) of the forward
  void *grad_maps, *grad_others;  // contiguous, in the type of the sums
  char* scratch;                  // `scratch_bytes` per thread
  int64_t scratch_bytes;
  int threads;
};

CAMKERNELS_DECLARE_KERNEL(warped_ssim, WarpedSsimArguments)

}  // namespace camkernels
