// Statistics of one map that lies contiguous in the type of the sums, and their gradient.
#pragma once

#include "common/vec.h"
#include "map_statistics/map_statistics.h"
#include "map_statistics/slope.h"

namespace camkernels {
namespace CAMKERNELS_ISA {

// Lanes below `count` keep their value, the others become 0.
template <class A>
static CAMKERNELS_INLINE Vec<A> keep_lanes(Vec<A> value, int64_t count) {
  return lane_index<A>() < splat((A)count) ? value : Vec<A>{};
}

struct Range {
  double largest;  // magnitude
  bool nan, negative;
};

template <class A>
static Range range_of(const A* map, int64_t pixels) {
  constexpr int N = Lanes<A>::count;
  Vec<A> high = {}, low = {}, sum = {};
  auto add = [&](Vec<A> v) {
    high = v > high ? v : high;
    low = v < low ? v : low;
    sum += v - v;  // NaN where a value is NaN or infinite
  };
  int64_t p = 0;
  for (; p + N <= pixels; p += N) add(load<A>(map + p));
  if (p < pixels) add(load_partial<A>(map + p, pixels - p));
  A largest = 0, smallest = 0;
  for (int i = 0; i < N; ++i) {
    largest = high[i] > largest ? high[i] : largest;
    smallest = low[i] < smallest ? low[i] : smallest;
  }
  const A special = sum_lanes<A>(sum);
  return {largest > -smallest ? largest : -smallest, special != special, smallest < 0};
}

// First and second moments of u = M / scale over the map.
struct Moments {
  double sum, row, column;             // sum u, u y, u x
  double square, entropy, yy, yx, xx;  // about the mean and the centroid
};

template <class A>
static void first_moments(const A* map, int64_t height, int64_t width, A scale, Moments* m) {
  constexpr int N = Lanes<A>::count;
  for (int64_t i = 0; i < height; ++i) {
    const A* row = map + i * width;
    Vec<A> sum = {}, column = {}, x = lane_index<A>();
    int64_t j = 0;
    for (; j + N <= width; j += N, x += (A)N) {
      const Vec<A> u = load<A>(row + j) / scale;
      sum += u;
      column += u * x;
    }
    if (j < width) {
      const Vec<A> u = load_partial<A>(row + j, width - j) / scale;
      sum += u;
      column += u * x;
    }
    const double total = sum_lanes<A>(sum);
    m->sum += total;
    m->row += total * (double)i;
    m->column += sum_lanes<A>(column);
  }
}

template <class A>
static void second_moments(const A* map, int64_t height, int64_t width, A scale, A mean, A row,
                           A column, Moments* m) {
  constexpr int N = Lanes<A>::count;
  const A inverse_sum = (A)(1 / m->sum);
  for (int64_t i = 0; i < height; ++i) {
    const A* values = map + i * width;
    Vec<A> square = {}, entropy = {}, sum = {}, first = {}, second = {};
    Vec<A> dx = lane_index<A>() - column;
    auto add = [&](Vec<A> u, Vec<A> deviation) {
      square += deviation * deviation;
      const Vec<A> p = u * inverse_sum;
      entropy += p * log_positive(p > 0 ? p : splat((A)1));
      sum += p;
      first += p * dx;
      second += p * dx * dx;
    };
    int64_t j = 0;
    for (; j + N <= width; j += N, dx += (A)N) {
      const Vec<A> u = load<A>(values + j) / scale;
      add(u, u - mean);
    }
    if (j < width) {
      const Vec<A> u = load_partial<A>(values + j, width - j) / scale;
      add(u, keep_lanes<A>(u - mean, width - j));
    }
    const double dy = (double)i - (double)row;
    m->square += sum_lanes<A>(square);
    m->entropy -= sum_lanes<A>(entropy);
    m->yy += sum_lanes<A>(sum) * dy * dy;
    m->yx += sum_lanes<A>(first) * dy;
    m->xx += sum_lanes<A>(second);
  }
}

// Writes the seven statistics of one contiguous map.
template <class A>
static void statistics_of(const A* map, int64_t height, int64_t width, int64_t b,
                          void* const* statistics) {
  const int64_t pixels = height * width;
  A* out[kStatistics];
  for (int i = 0; i < kStatistics; ++i) {
    out[i] = static_cast<A*>(statistics[i]) + b * statistic_size(i);
    for (int64_t j = 0; j < statistic_size(i); ++j) out[i][j] = 0;
  }
  const Range range = range_of(map, pixels);
  const A nan = (A)__builtin_nan("");
  const bool dead = !range.nan && range.largest < Limits<A>::tiny;
  if (range.nan || range.negative) {  // p, and all that is made of it
    *out[0] = *out[1] = out[5][0] = out[5][1] = nan;
    for (int j = 0; j < 4; ++j) out[6][j] = nan;
  }
  if (range.nan) {
    *out[2] = *out[3] = *out[4] = nan;
    return;
  }
  if (dead) return;
  const A scale = (A)range.largest;
  Moments m = {};
  first_moments(map, height, width, scale, &m);
  const A mean = (A)(m.sum / (double)pixels);
  const A row = (A)(m.row / m.sum), column = (A)(m.column / m.sum);
  second_moments(map, height, width, scale, mean, row, column, &m);
  const A variance = (A)(m.square / (double)pixels);
  *out[2] = variance / (mean * mean);
  *out[3] = mean * scale;
  *out[4] = variance * (scale * scale);
  if (range.negative) return;
  *out[0] = (A)m.entropy;
  out[5][0] = row;
  out[5][1] = column;
  out[6][0] = (A)m.yy;
  out[6][1] = out[6][2] = (A)m.yx;
  out[6][3] = (A)m.xx;
  *out[1] = ellipse_area(out[6][0], out[6][1], out[6][3], height, width);
}

template <class A>
static CAMKERNELS_INLINE Vec<A> slope_at(const Slope<A>& s, Vec<A> map, A dy, Vec<A> dx, A pixels) {
  Vec<A> gradient = {};
  if (s.uses_deviation) gradient = s.deviation * (map - s.mean);
  if (s.live) {  // a signed map may have a mean of 0
    const Vec<A> value = map / s.live_mean;
    Vec<A> live = s.constant + s.dy * dy + s.dy_dy * (dy * dy) + s.to_value * value +
                  dx * (s.dx + s.dy_dx * dy + s.dx_dx * dx);
    if (s.uses_log) {
      const Mask<A> positive = map > 0;
      const Vec<A> log_p = log_positive(positive ? value / pixels : splat((A)1));
      const Mask<A> counted = s.all_pixels ? ~Mask<A>{} : positive;
      live += s.to_log * (counted ? log_p + s.entropy : Vec<A>{});
    }
    gradient += live / s.live_mean / pixels;
  }
  return gradient + s.plain;
}

// out_p (+)= d statistics / d map_p; `add` adds to what out holds.
template <class A>
static void statistics_gradient(const A* map, int64_t height, int64_t width, int64_t b,
                                const void* const* statistics, const void* const* grads, bool add,
                                A* out) {
  constexpr int N = Lanes<A>::count;
  const A pixels = (A)(height * width);
  const Slope<A> slope = slope_of<A>(b, height * width, statistics, grads);
  for (int64_t i = 0; i < height; ++i) {
    const A dy = (A)i - slope.row;
    Vec<A> dx = lane_index<A>() - slope.column;
    for (int64_t j = 0; j < width; j += N, dx += (A)N) {
      const int64_t p = i * width + j, n = width - j < N ? width - j : N;
      if (n == N) {
        const Vec<A> gradient = slope_at(slope, load<A>(map + p), dy, dx, pixels);
        store<A>(out + p, add ? load<A>(out + p) + gradient : gradient);
      } else {
        const Vec<A> gradient = slope_at(slope, load_partial<A>(map + p, n), dy, dx, pixels);
        store_partial<A>(out + p, add ? load_partial<A>(out + p, n) + gradient : gradient, n);
      }
    }
  }
}

}  // namespace CAMKERNELS_ISA
}  // namespace camkernels
