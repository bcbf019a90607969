// The best box at every threshold. camkernels/ops/best_box_ious/reference.py says what.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace camkernels {

struct BestBoxIous {
  int64_t batch, height, width, thresholds;
  const int32_t* levels;  // (batch, height, width), contiguous, each 0 to thresholds
  const double* boxes;    // (batch, 4) top, left, height, width
  int32_t* numbers;       // scratch of each thread: 7 per pixel, and thresholds + 2
  double* scores;         // scratch of each thread: 1 per pixel
  double* ious;           // (batch, thresholds), zeros
  int threads;
};

CAMKERNELS_DECLARE_KERNEL(best_box_ious, BestBoxIous)

}  // namespace camkernels
