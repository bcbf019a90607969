#include "common/vec.h"
#include "min_max/min_max.h"

namespace camkernels {
namespace CAMKERNELS_ISA {

template <class A>
static constexpr A kTiny = sizeof(A) == 8 ? (A)2.2250738585072014e-308 : (A)1.17549435e-38f;

template <class A, class T>
static A pixel(const MinMax& args, int64_t b, int64_t i, int64_t j) {
  const View& maps = args.maps;
  return element<A>(static_cast<const T*>(maps.data) + b * maps.stride_b + i * maps.stride_h +
                    j * maps.stride_w);
}

template <class A, class T>
static void forward(const MinMax& args) {
  const int64_t height = args.sizes.height, width = args.sizes.width;
#pragma omp parallel for schedule(static) num_threads(args.threads) if (args.threads > 1)
  for (int64_t b = 0; b < args.sizes.batch; ++b) {
    A low = pixel<A, T>(args, b, 0, 0), high = low;
    for (int64_t i = 0; i < height; ++i) {
      for (int64_t j = 0; j < width; ++j) {
        const A value = pixel<A, T>(args, b, i, j);
        low = value < low || value != value ? value : low;  // NaN stays
        high = value > high || value != value ? value : high;
      }
    }
    A* extremes = static_cast<A*>(args.extremes) + 2 * b;
    extremes[0] = low;
    extremes[1] = high;
    const A span = high - low, visible = span - span;
    const bool constant = span <= kTiny<A>;
    A* out = static_cast<A*>(args.out) + b * height * width;
    for (int64_t i = 0; i < height; ++i) {
      for (int64_t j = 0; j < width; ++j) {
        const A value = constant ? (A)0 : (pixel<A, T>(args, b, i, j) - low) / span + visible;
        out[i * width + j] = value;
      }
    }
  }
}

template <class A, class T>
static void backward(const MinMax& args) {
  const int64_t height = args.sizes.height, width = args.sizes.width;
#pragma omp parallel for schedule(static) num_threads(args.threads) if (args.threads > 1)
  for (int64_t b = 0; b < args.sizes.batch; ++b) {
    const A* extremes = static_cast<const A*>(args.extremes) + 2 * b;
    const A low = extremes[0], high = extremes[1], span = high - low;
    const bool constant = span <= kTiny<A>;
    const A* grad = static_cast<const A*>(args.grad) + b * args.grad_b;
    double to_low = 0, to_high = 0, lows = 0, highs = 0;
    for (int64_t i = 0; !constant && i < height; ++i) {
      for (int64_t j = 0; j < width; ++j) {
        const A value = pixel<A, T>(args, b, i, j), normal = (value - low) / span;
        const A g = grad[i * args.grad_h + j * args.grad_w];
        to_low += (double)g * (double)(normal - 1);
        to_high -= (double)g * (double)normal;
        lows += value == low;
        highs += value == high;
      }
    }
    const A low_share = (A)(to_low / (lows > 1 ? lows : 1));
    const A high_share = (A)(to_high / (highs > 1 ? highs : 1));
    T* out = static_cast<T*>(args.out) + b * height * width;
    for (int64_t i = 0; i < height; ++i) {
      for (int64_t j = 0; j < width; ++j) {
        A found = 0;
        if (!constant) {
          const A value = pixel<A, T>(args, b, i, j);
          found = grad[i * args.grad_h + j * args.grad_w];
          found += value == low ? low_share : (A)0;
          found += value == high ? high_share : (A)0;
          found = found / span + (to_low - to_low);  // NaN and Inf show everywhere
        }
        store_partial<A>(out + i * width + j, splat(found), 1);
      }
    }
  }
}

void min_max_fwd(const MinMax& args) {
  if (args.maps.dtype == kFloat64) {
    forward<double, double>(args);
  } else {
    CAMKERNELS_SWITCH(float, args.maps.dtype, forward<float, T>(args));
  }
}

void min_max_bwd(const MinMax& args) {
  if (args.maps.dtype == kFloat64) {
    backward<double, double>(args);
  } else {
    CAMKERNELS_SWITCH(float, args.maps.dtype, backward<float, T>(args));
  }
}

}  // namespace CAMKERNELS_ISA
}  // namespace camkernels
