// Statistics of one map by the threads of a block, and the gradient at a pixel.
// Formulas and conventions: camkernels/ops/map_statistics/reference.py.
#pragma once

#include "common/block.cuh"
#include "map_statistics/slope.h"

namespace camkernels {
namespace cuda {

constexpr int kStatisticsValues = 4;  // most that one pass reduces
constexpr int kStatisticsFloats = reduction_floats(kStatisticsValues);

// `value(p)` is pixel p of the map as float. Four passes, of which all but the first read from the
// cache: scale; sum; moments about the mean and entropy; covariance about the centroid (centred
// sums: nothing cancels). Thread 0 writes.
template <class Value>
__device__ inline void block_statistics(Value value, int height, int width, int64_t b,
                                        void* const (&statistics)[kStatistics],
                                        Shared<float> scratch) {
  const int pixels = height * width, first = threadIdx.x;
  const float count = (float)pixels, nan = __int_as_float(0x7fffffff);

  float range[2] = {0, 0};  // largest magnitude; 1 where a value is negative
  for (int p = first; p < pixels; p += kThreads) {
    const float m = value(p);
    // A maximum may pass over NaN; an infinite scale turns the whole map into NaN below.
    const float magnitude = m != m ? __int_as_float(0x7f800000) : fabsf(m);
    range[0] = fmaxf(range[0], magnitude);
    if (m < 0) range[1] = 1;
  }
  reduce_block(range, scratch, Largest());
  const bool dead = range[0] < Limits<float>::tiny;
  const float scale = dead ? 1.0f : range[0], valid = range[1] > 0 ? nan : 1.0f;
  auto scaled = [&](int p) { return dead ? 0.0f : value(p) / scale; };

  float total[1] = {0};
  for (int p = first; p < pixels; p += kThreads) total[0] += scaled(p);
  reduce_block(total, scratch, Sum());
  const float mean = total[0] / count, divisor = dead ? 1.0f : total[0];

  float moments[4] = {0, 0, 0, 0};  // squares, rows, columns, entropy
  for (int p = first; p < pixels; p += kThreads) {
    const float u = scaled(p), share = u / divisor * valid;
    moments[0] += (u - mean) * (u - mean);
    moments[1] += share * (float)(p / width);
    moments[2] += share * (float)(p % width);
    moments[3] -= share * logf(share == 0 ? 1.0f : share);
  }
  reduce_block(moments, scratch, Sum());
  const float variance = moments[0] / count, row = moments[1], column = moments[2];

  float centred[3] = {0, 0, 0};  // yy, yx, xx
  for (int p = first; p < pixels; p += kThreads) {
    const float share = scaled(p) / divisor * valid;
    const float dy = (float)(p / width) - row, dx = (float)(p % width) - column;
    centred[0] += share * dy * dy;
    centred[1] += share * dy * dx;
    centred[2] += share * dx * dx;
  }
  reduce_block(centred, scratch, Sum());

  if (threadIdx.x != 0) return;
  auto out = [&](int i) { return static_cast<float*>(statistics[i]) + b * statistic_size(i); };
  const float live_mean = dead ? 1.0f : mean;
  out(0)[0] = moments[3];
  out(1)[0] = ellipse_area(centred[0], centred[1], centred[2], height, width);
  out(2)[0] = variance / (live_mean * live_mean);
  out(3)[0] = mean * scale;
  out(4)[0] = variance * scale * scale;
  out(5)[0] = row;
  out(5)[1] = column;
  out(6)[0] = centred[0];
  out(6)[1] = out(6)[2] = centred[1];
  out(6)[3] = centred[2];
}

// Cotangent of a pixel of value `map` in row y and column x.
__device__ inline float slope_at(const Slope<float>& s, float map, int y, int x, float pixels) {
  float gradient = s.plain;
  if (s.uses_deviation) gradient += s.deviation * (map - s.mean);
  if (s.live) {  // a signed map may have a mean of 0
    const float value = map / s.live_mean, dy = (float)y - s.row, dx = (float)x - s.column;
    float live = s.constant + dy * (s.dy + s.dy_dy * dy) + s.to_value * value +
                 dx * (s.dx + s.dy_dx * dy + s.dx_dx * dx);
    if (s.uses_log && (s.all_pixels || map > 0)) {
      live += s.to_log * (logf(map > 0 ? value / pixels : 1.0f) + s.entropy);
    }
    gradient += live / s.live_mean / pixels;
  }
  return gradient;
}

}  // namespace cuda
}  // namespace camkernels
