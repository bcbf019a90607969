// BatchNorm, residual add and ReLU, forward and two orders of backward; the formulas are in
// camkernels/ops/batch_norm_relu/reference.py.
//
// All six kernels pass once over memory. Work is split into tasks: stretches of at most `block`
// pixels of one plane of contiguous z, `block` pixels of channels_last z. The tasks follow from
// shape and dtype alone, and their sums are added in a fixed order, so that no result depends on
// the thread count.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/view.h"

namespace camkernels {

// Tensors as camkernels/ops/batch_norm_relu/cpu.py lists them; null where a kernel has none.
// Full-size ones are dense in the layout of z and of its dtype, those per channel are of the type
// of the sums.
struct BatchNorm {
  int64_t batch, channels, pixels;
  int dtype;
  bool channels_last, streaming;  // streaming: store past the caches
  bool relu, guided, scaled;
  double inv_count;
  int64_t block;  // pixels per task
  int threads;
  const void *z, *mean, *rstd, *gamma, *beta;
  const uint8_t* mask;
  const void *grad, *residual, *addend;
  const void *grad_grad, *grad_grad_residual, *grad_prime;
  const void *sums, *grad_sums, *c_gamma, *c_beta;
  // out may be grad_grad, second_out grad_prime; second_out null where it is not wanted
  void *out, *second_out;
  uint8_t* out_mask;
  void* results;  // (k, channels) of a reduction
  void* scratch;  // see scratch_size in cpu.py

  int64_t rows() const { return channels_last ? batch * pixels : batch * channels; }
  int64_t row_length() const { return channels_last ? channels : pixels; }
  int64_t mask_row() const { return (row_length() + 7) / 8; }
  // Contiguous z: stretches per plane.
  int64_t stretches() const { return (pixels + block - 1) / block; }
  int64_t tasks() const {
    return channels_last ? (rows() + block - 1) / block : rows() * stretches();
  }
  // Channels in scratch, where whole vectors are read.
  int64_t padded() const { return (channels + 15) / 16 * 16; }
};

CAMKERNELS_DECLARE_KERNEL(bn_stats, BatchNorm)
CAMKERNELS_DECLARE_KERNEL(bn_fwd, BatchNorm)
CAMKERNELS_DECLARE_KERNEL(bn_bwd_reduce, BatchNorm)
CAMKERNELS_DECLARE_KERNEL(bn_bwd, BatchNorm)
CAMKERNELS_DECLARE_KERNEL(bn_bwd_bwd_reduce, BatchNorm)
CAMKERNELS_DECLARE_KERNEL(bn_bwd_bwd, BatchNorm)

}  // namespace camkernels
