// What a kernel sees of a tensor: pointer, dtype, sizes and strides. Offsets are 64 bit.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace camkernels {

enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// Sizes of activations (batch, channels, height, width).
struct Sizes {
  int64_t batch, channels, height, width;
  CAMKERNELS_HD int64_t pixels() const { return height * width; }
};

// A tensor (batch, channels, height, width) of any strides, counted in elements.
struct View {
  const void* data;
  int dtype;
  int64_t stride_b, stride_k, stride_h, stride_w;
};

}  // namespace camkernels
