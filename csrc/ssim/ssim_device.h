// Arguments of the CUDA kernels of ssim: their window lies on the device.
#pragma once

#include "common/isa.h"
#include "common/view.h"

namespace camkernels {

// Windows of a picture (height, width), with zeros around it where pads are not 0.
struct DeviceWindow {
  const float* weights;  // length_y for the rows, then length_x for the columns
  int length_y, length_x, pad_y, pad_x;
  float c1, c2;
};

struct SsimDeviceForward {
  Sizes sizes;
  View x, y;
  DeviceWindow window;
  float* values;  // (batch,)
  float* sums;    // (batch, blocks of a sample)
  int* arrivals;  // (batch,) zeros
};

struct SsimDeviceBackward {
  Sizes sizes;
  View x, y;
  DeviceWindow window;
  const float* grad;      // (batch,)
  void *grad_x, *grad_y;  // contiguous, in the dtypes of x and y; null where not wanted
};

CAMKERNELS_DECLARE_CUDA_KERNEL(ssim_fwd, SsimDeviceForward)
CAMKERNELS_DECLARE_CUDA_KERNEL(ssim_bwd, SsimDeviceBackward)

}  // namespace camkernels
