// Grad-CAM maps: M = relu(sum_k alpha_k A_k), alpha_k = 1/Z sum_ij G_k, and the way back.
//
// Work is split over samples and blocks of channels. The blocks follow from the shape alone, and
// their partial maps are added in a fixed order, so that no result depends on the thread count.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/view.h"

namespace camkernels {

struct CamForward {
  Sizes sizes;
  View activations;
  View gradients;  // data is null where channel weights are given
  void* alpha;     // (batch, channels): read where weights are given, written otherwise
  void* partial;   // (batch, blocks, pixels) scratch; the maps themselves where blocks == 1
  void* maps;      // (batch, pixels)
  int64_t block;   // channels per block
  bool relu;
  int threads;              // of the CPU
  int* arrivals = nullptr;  // (batch,) zeros, CUDA: blocks of a sample count their arrival
};

struct CamBackward {
  Sizes sizes;
  View grad_maps;          // stride_k unused
  const void* maps;        // (batch, pixels), null where no ReLU was applied
  View activations;        // data is null where grad_alpha is not wanted
  void* grad_alpha;        // (batch, channels)
  const void* alpha;       // (batch, channels), null where grad_activations is not wanted
  void* grad_activations;  // dense, channels_last or contiguous
  int grad_dtype;
  bool channels_last;
  bool streaming;  // store past the caches
  void* masked;    // (batch, pixels) scratch for D
  int64_t block;
  int threads;
};

CAMKERNELS_DECLARE_KERNEL(cam_fwd, CamForward)
CAMKERNELS_DECLARE_KERNEL(cam_bwd, CamBackward)
CAMKERNELS_DECLARE_CUDA_KERNEL(cam_fwd, CamForward)
CAMKERNELS_DECLARE_CUDA_KERNEL(cam_bwd, CamBackward)

}  // namespace camkernels
