// The pixels of one channel as rows: as few as the strides allow.
#pragma once

#include "common/isa.h"
#include "common/view.h"

namespace camkernels {
namespace CAMKERNELS_ISA {

struct Plane {
  int64_t rows, length, row_stride, pixel_stride;
};

// A contiguous plane, and one expanded with stride 0, becomes a single row.
static inline Plane plane_of(const Sizes& sizes, const View& view) {
  Plane plane{sizes.height, sizes.width, view.stride_h, view.stride_w};
  if (plane.length == 1) plane = {1, plane.rows, 0, plane.row_stride};
  if (plane.rows == 1 || plane.row_stride == plane.length * plane.pixel_stride) {
    plane = {1, plane.rows * plane.length, 0, plane.pixel_stride};
  }
  return plane;
}

enum Layout { kPixels, kChannels, kAnyStrides };

// Which dimension lies side by side in memory: the pixels of a row, or the channels of a pixel.
static inline Layout layout_of(const Plane& plane, const View& view) {
  const bool pixels = plane.length == 1 || plane.pixel_stride == 1;
  const bool single = plane.rows * plane.length == 1;
  if (view.stride_k == 1 && (single || !pixels)) return kChannels;
  return pixels ? kPixels : kAnyStrides;
}

}  // namespace CAMKERNELS_ISA
}  // namespace camkernels
