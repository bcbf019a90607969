// Crop, resize and flip of each sample, and the way back. camkernels/ops/warp/reference.py says
// what.
#pragma once

#include "common/isa.h"
#include "common/view.h"
#include "warp/taps.h"

namespace camkernels {

struct WarpArguments {
  int64_t batch, channels;
  Warp warp;
  View input;     // the source; of the backward, the cotangent of the output
  void* output;   // contiguous, in the dtype of the input
  char* scratch;  // `scratch_bytes` per thread
  int64_t scratch_bytes;
  int threads;
};

CAMKERNELS_DECLARE_KERNEL(warp_fwd, WarpArguments)
CAMKERNELS_DECLARE_KERNEL(warp_bwd, WarpArguments)

}  // namespace camkernels
