// What C++ and CUDA share of the statistics of one map: the area of its ellipse, and the
// coefficients of its gradient.
#pragma once

#include "map_statistics/map_statistics.h"

namespace camkernels {
namespace CAMKERNELS_ISA {

template <class A>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float epsilon = 1.1920928955078125e-7f, tiny = 1.17549435082228751e-38f;
};
template <>
struct Limits<double> {
  static constexpr double epsilon = 2.220446049250313e-16, tiny = 2.2250738585072014e-308;
};

template <class A>
CAMKERNELS_HD static inline A ellipse_area(A yy, A yx, A xx, int64_t height, int64_t width) {
  const double tolerance = 64 * (double)Limits<A>::epsilon;
  const double product = (double)yy * xx, determinant = product - (double)yx * yx;
  const double low_y = tolerance * (double)height, low_x = tolerance * (double)width;
  const bool degenerate =
      determinant <= tolerance * product || yy <= low_y * low_y || xx <= low_x * low_x;
  return degenerate ? (A)0 : (A)__builtin_sqrt(determinant);
}

// The gradient of one map as a polynomial in the pixel's offset from the centroid, its value and
// its logarithm; see the reference.
template <class A>
struct Slope {
  bool live, all_pixels, uses_log, uses_deviation;  // live: there is a part that goes with 1 / S
  A live_mean, mean, entropy, row, column;
  A to_log;                                           // -grad of the entropy
  A constant, to_value, dy, dx, dy_dy, dy_dx, dx_dx;  // times 1 / S
  A plain, deviation;                                 // times 1
};

template <class A>
CAMKERNELS_HD static inline Slope<A> slope_of(int64_t b, int64_t pixels,
                                              const void* const* statistics,
                                              const void* const* grads) {
  const A* known[kStatistics];
  const A* to[kStatistics];
  for (int i = 0; i < kStatistics; ++i) {
    known[i] = static_cast<const A*>(statistics[i]) + b * statistic_size(i);
    to[i] = grads[i] == nullptr ? nullptr : static_cast<const A*>(grads[i]) + b * statistic_size(i);
  }
  Slope<A> s = {};
  const A area = *known[1], dispersion = *known[2];
  const A yy = known[6][0], yx = known[6][1], xx = known[6][3];
  s.entropy = *known[0];
  s.mean = *known[3];
  const bool dead = s.mean == 0 && *known[4] == 0;
  s.live_mean = dead ? (A)1 : s.mean;
  constexpr int kLive[] = {0, 1, 2, 5, 6};
  for (const int i : kLive) s.live = s.live || (!dead && to[i] != nullptr);
  // Where nothing depends on the position, a centroid that is NaN must not reach the gradient.
  if ((to[1] != nullptr && area != 0) || to[5] != nullptr || to[6] != nullptr) {
    s.row = known[5][0];
    s.column = known[5][1];
  }
  if (to[0] != nullptr) {
    s.uses_log = true;
    s.all_pixels = s.entropy != s.entropy;
    s.to_log = -*to[0];
  }
  if (to[1] != nullptr && area != 0) {
    const A half = *to[1] / (2 * area);
    s.dy_dy += half * xx;
    s.dx_dx += half * yy;
    s.dy_dx -= 2 * half * yx;
    s.constant -= *to[1] * area;
  }
  if (to[2] != nullptr) {
    s.to_value = 2 * *to[2];
    s.constant -= 2 * *to[2] * (1 + dispersion);
  }
  if (to[3] != nullptr) s.plain = *to[3] / (A)pixels;
  s.uses_deviation = to[4] != nullptr && !dead;
  if (s.uses_deviation) s.deviation = 2 * *to[4] / (A)pixels;
  if (to[5] != nullptr) {
    s.dy = to[5][0];
    s.dx = to[5][1];
  }
  if (to[6] != nullptr) {
    const A cross = to[6][1] + to[6][2];
    s.dy_dy += to[6][0];
    s.dy_dx += cross;
    s.dx_dx += to[6][3];
    s.constant -= to[6][0] * yy + cross * yx + to[6][3] * xx;
  }
  return s;
}

}  // namespace CAMKERNELS_ISA
}  // namespace camkernels
