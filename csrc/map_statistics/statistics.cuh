// Statistics of one map by the threads of a block, and the gradient at a pixel.
// Formulas and conventions: camkernels/ops/map_statistics/reference.py.
#pragma once

#include "common/block.cuh"
#include "map_statistics/slope.h"

namespace camkernels {
namespace cuda {

constexpr int kStatisticsValues = 4;  // most that one pass reduces
constexpr int kStatisticsFloats = reduction_floats(kStatisticsValues);

// This thread's runs of N pixels: visit(p, y, x) with the first pixel, p = y width + x. N divides
// the pixels of the map. Rows and columns go along with p: no division per pixel.
template <int N, class Visit>
__device__ inline void walk(int pixels, int width, Visit visit) {
  const int step_y = N * kThreads / width, step_x = N * kThreads % width;
  int p = (int)threadIdx.x * N, y = p / width, x = p % width;
  for (; p < pixels; p += N * kThreads) {
    visit(p, y, x);
    y += step_y;
    x += step_x;
    if (x >= width) {
      x -= width;
      ++y;
    }
  }
}

// `map.each(visit)` calls visit(value, y, x) for each pixel of this thread. Four passes, of which
// all but the first read from the cache: scale; sum; moments about the mean and entropy; covariance
// about the centroid (centred sums: nothing cancels). Thread 0 writes.
template <class Map>
__device__ inline void block_statistics(const Map& map, int height, int width, int64_t b,
                                        void* const (&statistics)[kStatistics],
                                        Shared<float> scratch) {
  const float count = (float)(height * width), nan = __int_as_float(0x7fffffff);

  float range[2] = {0, 0};  // largest magnitude; 1 where a value is negative
  map.each([&](float m, int, int) {
    // A maximum may pass over NaN; an infinite scale turns the whole map into NaN below.
    const float magnitude = m != m ? __int_as_float(0x7f800000) : fabsf(m);
    range[0] = fmaxf(range[0], magnitude);
    if (m < 0) range[1] = 1;
  });
  reduce_block(range, scratch, Largest());
  const bool dead = range[0] < Limits<float>::tiny;
  const float scale = dead ? 1.0f : range[0], valid = range[1] > 0 ? nan : 1.0f;
  auto scaled = [&](float m) { return dead ? 0.0f : m / scale; };

  float total[1] = {0};
  map.each([&](float m, int, int) { total[0] += scaled(m); });
  reduce_block(total, scratch, Sum());
  const float mean = total[0] / count, divisor = dead ? 1.0f : total[0];

  float moments[4] = {0, 0, 0, 0};  // squares, rows, columns, entropy
  map.each([&](float m, int y, int x) {
    const float u = scaled(m), share = u / divisor * valid;
    moments[0] += (u - mean) * (u - mean);
    moments[1] += share * (float)y;
    moments[2] += share * (float)x;
    moments[3] -= share * logf(share == 0 ? 1.0f : share);
  });
  reduce_block(moments, scratch, Sum());
  const float variance = moments[0] / count, row = moments[1], column = moments[2];

  float centred[3] = {0, 0, 0};  // yy, yx, xx
  map.each([&](float m, int y, int x) {
    const float share = scaled(m) / divisor * valid;
    const float dy = (float)y - row, dx = (float)x - column;
    centred[0] += share * dy * dy;
    centred[1] += share * dy * dx;
    centred[2] += share * dx * dx;
  });
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
