// Max pooling that keeps where in its window each maximum was, and the two linear maps that follow
// from it. camkernels/ops/max_pool/reference.py says what.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/view.h"

namespace camkernels {

// Windows along one dimension: tap t of window o lies at o stride - padding + t dilation. Every
// window has a tap inside.
struct PoolAxis {
  int64_t input, output, kernel, stride, padding, dilation;
};

// At most this many taps, so that their number u * columns.kernel + v is one byte.
constexpr int kPoolTaps = 256;

// Everything is dense, in NCHW or in channels_last; positions lie as the pooled tensor does.
struct MaxPool {
  const void* input;
  uint8_t* positions;  // written by the forward, read by the others
  void* output;
  float* scratch;  // of the scatter of 16-bit NCHW: one plane per thread
  int64_t batch, channels;
  PoolAxis rows, columns;
  int dtype;
  bool channels_last;
  int threads;
};

CAMKERNELS_DECLARE_KERNEL(max_pool_fwd, MaxPool)
CAMKERNELS_DECLARE_KERNEL(max_pool_gather, MaxPool)
CAMKERNELS_DECLARE_KERNEL(max_pool_scatter, MaxPool)

}  // namespace camkernels
