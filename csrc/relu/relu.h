// ReLU with its mask, and the plain and guided backward. camkernels/ops/relu/reference.py says
// what.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/view.h"

namespace camkernels {

// Everything is dense in one order of memory. The mask has one bit per element, least significant
// first, ceil(count / 8) bytes.
struct ReluForward {
  const void* input;
  void* output;   // may be the input
  uint8_t* mask;  // null where it is not wanted
  int64_t count;
  int dtype;
  bool streaming;  // past the caches; the output is aligned to 64 bytes
  int threads;
};

struct ReluBackward {
  const void* grad;
  const uint8_t* mask;  // null: by the output
  const void* output;
  void* grad_input;
  int64_t count;
  int dtype;
  bool guided, streaming;
  int threads;
};

CAMKERNELS_DECLARE_KERNEL(relu_fwd, ReluForward)
CAMKERNELS_DECLARE_KERNEL(relu_bwd, ReluBackward)
CAMKERNELS_DECLARE_CUDA_KERNEL(relu_fwd, ReluForward)
CAMKERNELS_DECLARE_CUDA_KERNEL(relu_bwd, ReluBackward)

}  // namespace camkernels
