// Entropy, area, dispersion, mean, variance, centroid and covariance of maps, and the way back.
// Formulas and conventions: camkernels/ops/map_statistics/reference.py.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/view.h"

namespace camkernels {

// Per sample: entropy, area, dispersion, mean, variance (1 value each), centroid (2),
// covariance (4).
constexpr int kStatistics = 7;
CAMKERNELS_HD constexpr int64_t statistic_size(int i) { return i < 5 ? 1 : i == 5 ? 2 : 4; }

struct StatisticsForward {
  Sizes sizes;  // channels unused
  View maps;    // stride_k unused
  bool clamp;
  void* statistics[kStatistics];
  void* scratch;  // (threads, pixels)
  int threads;
};

struct StatisticsBackward {
  Sizes sizes;
  View maps;
  bool clamp;
  const void* statistics[kStatistics];
  const void* grads[kStatistics];  // null where a cotangent is not given
  void* grad_maps;                 // (batch, pixels), dtype of the maps
  void* scratch;                   // (threads, 2, pixels)
  int threads;
};

CAMKERNELS_DECLARE_KERNEL(map_statistics_fwd, StatisticsForward)
CAMKERNELS_DECLARE_KERNEL(map_statistics_bwd, StatisticsBackward)
CAMKERNELS_DECLARE_CUDA_KERNEL(map_statistics_fwd, StatisticsForward)
CAMKERNELS_DECLARE_CUDA_KERNEL(map_statistics_bwd, StatisticsBackward)

}  // namespace camkernels
