// Arguments of the CUDA kernels of warped_ssim.
#pragma once

#include "ssim/ssim_device.h"

namespace camkernels {

struct WarpedSsimDevice {
  int64_t batch;
  // Maps (map_y, map_x) are enlarged to (via_y, via_x), cropped, and resized to (size_y, size_x);
  // others (other_y, other_x) are enlarged to that.
  int map_y, map_x, via_y, via_x, size_y, size_x, other_y, other_x;
  const int64_t* boxes;  // (batch, 4): top, left, height, width
  const uint8_t* flips;  // (batch,)
  View maps, others;     // stride_k unused
  DeviceWindow window;
  int* arrivals;  // (batch,) zeros
  float* sums;    // of the forward: (batch, bands of windows)
  float* values;  // (batch,)
  // Of the backward: what each band of pixels gives, (batch, bands, pixels of a map), and the
  // cotangents; null where not wanted.
  const float* grad;  // (batch,)
  float *map_sums, *other_sums;
  void *grad_maps, *grad_others;  // contiguous, in the dtypes of the maps
};

CAMKERNELS_DECLARE_CUDA_KERNEL(warped_ssim_fwd, WarpedSsimDevice)
CAMKERNELS_DECLARE_CUDA_KERNEL(warped_ssim_bwd, WarpedSsimDevice)

}  // namespace camkernels
