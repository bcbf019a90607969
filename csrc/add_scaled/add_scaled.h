// Sums of weight gradients in float32 from those in 16 bits. camkernels/ops/conv2d/filters.py says
// what for.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/view.h"

namespace camkernels {

// out = value + scale other, a factor per row; everything is dense, rows one behind the other.
struct AddScaled {
  const void* value;  // null: zero
  const void* other;
  const float* scale;  // null: one
  float* out;
  int64_t rows, length;
  int dtype;  // of value and other: 16 bits
  int threads;
};

CAMKERNELS_DECLARE_KERNEL(add_scaled, AddScaled)

}  // namespace camkernels
