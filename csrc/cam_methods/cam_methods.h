// Channel weights of Grad-CAM++ and XGrad-CAM, maps of LayerCAM and HiResCAM, and the ways back.
// camkernels/ops/cam_weights/reference.py and cam_pixels/reference.py say what.
#pragma once

#include "common/isa.h"
#include "common/view.h"

namespace camkernels {

enum CamMethod : int { kGradCamPlusPlus = 0, kXGradCam = 1 };

// A dense cotangent of a tensor (batch, channels, height, width), in its dtype; null: not wanted.
struct Cotangent {
  void* data;
  bool channels_last;
};

struct CamWeights {
  Sizes sizes;
  View activations, gradients;  // of one dtype
  int method;
  double eps;
  void* weights;     // (batch, channels) of the forward
  const void* grad;  // (batch, channels), null: forward
  Cotangent to_activations, to_gradients;
  int threads;
};

struct CamPixels {
  Sizes sizes;
  View activations, gradients;
  bool positive, relu;
  // Forward: (batch, pixels), and (batch, blocks, pixels) scratch, the maps where blocks == 1.
  void *maps, *partial;
  int64_t block;  // channels per block
  // Backward: D (batch, pixels), contiguous; null: forward.
  const void* grad;
  Cotangent to_activations, to_gradients;
  int threads;
};

CAMKERNELS_DECLARE_KERNEL(cam_weights, CamWeights)
CAMKERNELS_DECLARE_KERNEL(cam_pixels, CamPixels)

}  // namespace camkernels
