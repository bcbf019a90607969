// Where the pixels of a warped picture come from, in CUDA. camkernels/ops/warp/reference.py says
// what. A position is a fraction of two integers, so its floor is exact and the share is rounded
// once; integers are 32 bit (camkernels/ops/_gpu.py checks the sizes).
#pragma once

#include <cstdint>

#include "common/launch.cuh"

namespace camkernels {
namespace cuda {

// One axis: pixels of the source, of the picture that boxes are counted in, of the output.
struct DeviceAxis {
  int source, via, size;
};

// Crop along an axis, from `begin` on, `length` pixels long.
struct Crop {
  int begin, length;
  bool flip;
};

struct DeviceTaps {
  int index[4];
  float weight[4];
};

// The two pixels that numerator / denominator, kept within 0 to last, lies between, and the
// second's share.
__device__ inline void pair_of(int numerator, int denominator, int last, int* one, int* other,
                               float* share) {
  const int most = last * denominator;
  numerator = numerator < 0 ? 0 : numerator > most ? most : numerator;
  *one = numerator / denominator;
  *share = (float)(numerator - *one * denominator) / (float)denominator;
  *other = *one + 1 < last ? *one + 1 : last;
}

// Of output `i`, which must exist.
__device__ inline DeviceTaps taps_of(const DeviceAxis& axis, const Crop& crop, int i) {
  if (crop.flip) i = axis.size - 1 - i;
  int outer[2];
  float share;
  pair_of((2 * i + 1) * crop.length - axis.size, 2 * axis.size, crop.length - 1, &outer[0],
          &outer[1], &share);
  DeviceTaps taps;
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    const float weight = which ? share : 1 - share;
    float part;
    pair_of((2 * (outer[which] + crop.begin) + 1) * axis.source - axis.via, 2 * axis.via,
            axis.source - 1, &taps.index[2 * which], &taps.index[2 * which + 1], &part);
    taps.weight[2 * which] = weight * (1 - part);
    taps.weight[2 * which + 1] = weight * part;
  }
  return taps;
}

struct DeviceBox {
  Crop rows, columns;
  bool valid;
};

// Box (top, left, height, width) and flip of a sample. What is compared cannot overflow, as
// top + height could.
__device__ inline DeviceBox box_of(const int64_t* box, bool flip, int via_y, int via_x) {
  const bool valid = box[0] >= 0 && box[1] >= 0 && box[2] > 0 && box[3] > 0 &&
                     box[2] <= via_y - box[0] && box[3] <= via_x - box[1];
  if (!valid) return {{0, 1, false}, {0, 1, false}, false};
  return {{(int)box[0], (int)box[2], false}, {(int)box[1], (int)box[3], flip}, true};
}

}  // namespace cuda
}  // namespace camkernels
