// Activations and gradients (or weights) to the statistics of the map, in one launch each way.
#pragma once

#include "cam/cam.h"
#include "map_statistics/map_statistics.h"

namespace camkernels {

struct CamStatisticsForward {
  CamForward cam;
  void* total;  // (batch,), sum of the map before its ReLU
  void* statistics[kStatistics];
};

struct CamStatisticsBackward {
  CamBackward cam;  // maps is always given; grad_maps.data is null where it has no cotangent
  bool relu;
  const void* statistics[kStatistics];
  const void* grads[kStatistics];
};

CAMKERNELS_DECLARE_KERNEL(cam_statistics_fwd, CamStatisticsForward)
CAMKERNELS_DECLARE_KERNEL(cam_statistics_bwd, CamStatisticsBackward)
CAMKERNELS_DECLARE_CUDA_KERNEL(cam_statistics_fwd, CamStatisticsForward)
CAMKERNELS_DECLARE_CUDA_KERNEL(cam_statistics_bwd, CamStatisticsBackward)

}  // namespace camkernels
