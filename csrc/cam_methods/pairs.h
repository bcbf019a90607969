// Activations and gradients side by side, as vectors of pixels of one channel, or of channels of
// one pixel: whichever lies side by side in memory.
#pragma once

#include "cam_methods/cam_methods.h"
#include "common/plane.h"
#include "common/vec.h"

namespace camkernels {
namespace CAMKERNELS_ISA {

// `n` elements `stride` apart, zeros behind them.
template <class A, class T>
static CAMKERNELS_INLINE Vec<A> take(const T* from, int64_t stride, int64_t n) {
  constexpr int N = Lanes<A>::count;
  if (stride == 1) return n == N ? load<A>(from) : load_partial<A>(from, n);
  A values[N] = {};
  for (int64_t i = 0; i < n; ++i) values[i] = element<A>(from + i * stride);
  return load<A>(values);
}

template <class A, class T>
static CAMKERNELS_INLINE void put(T* to, int64_t stride, Vec<A> value, int64_t n) {
  constexpr int N = Lanes<A>::count;
  if (stride == 1 && n == N) {
    store<A>(to, value);
  } else if (stride == 1) {
    store_partial<A>(to, value, n);
  } else {
    A values[N];
    store<A>(values, value);
    for (int64_t i = 0; i < n; ++i) store_partial<A>(to + i * stride, splat(values[i]), 1);
  }
}

template <class A, class T>
struct Pairs {
  const T *a, *g;  // of the sample
  const View &a_view, &g_view;
  int64_t rows, length, channels, pixels;
  bool by_channels;

  Pairs(const Sizes& sizes, const View& activations, const View& gradients, int64_t b)
      : a(static_cast<const T*>(activations.data) + b * activations.stride_b),
        g(static_cast<const T*>(gradients.data) + b * gradients.stride_b),
        a_view(activations),
        g_view(gradients),
        rows(sizes.height),
        length(sizes.width),
        channels(sizes.channels),
        pixels(sizes.height * sizes.width) {
    const bool flat =
        a_view.stride_h == length * a_view.stride_w && g_view.stride_h == length * g_view.stride_w;
    if (flat) {
      length *= rows;
      rows = 1;
    }
    by_channels = a_view.stride_k == 1 && g_view.stride_k == 1 && pixels > 1;
  }

  // f(a, g, first pixel, how many) over the pixels of channel k.
  template <class F>
  CAMKERNELS_INLINE void each_of_plane(int64_t k, const F& f) const {
    constexpr int N = Lanes<A>::count;
    for (int64_t i = 0; i < rows; ++i) {
      const T* values = a + k * a_view.stride_k + i * a_view.stride_h;
      const T* slopes = g + k * g_view.stride_k + i * g_view.stride_h;
      for (int64_t j = 0; j < length; j += N) {
        const int64_t n = length - j < N ? length - j : N;
        f(take<A>(values + j * a_view.stride_w, a_view.stride_w, n),
          take<A>(slopes + j * g_view.stride_w, g_view.stride_w, n), i * length + j, n);
      }
    }
  }

  // f(a, g, pixel) over the pixels, for n channels from k on.
  template <class F>
  CAMKERNELS_INLINE void each_of_channels(int64_t k, int64_t n, const F& f) const {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < length; ++j) {
        f(take<A>(a + k + i * a_view.stride_h + j * a_view.stride_w, 1, n),
          take<A>(g + k + i * g_view.stride_h + j * g_view.stride_w, 1, n), i * length + j);
      }
    }
  }
};

// Where a cotangent of one sample goes.
template <class A, class T>
struct Target {
  T* out;
  int64_t stride_k, stride_p;

  Target(const Cotangent& to, int64_t b, int64_t channels, int64_t pixels)
      : out(to.data == nullptr ? nullptr : static_cast<T*>(to.data) + b * channels * pixels),
        stride_k(to.channels_last ? 1 : pixels),
        stride_p(to.channels_last ? channels : 1) {}
  CAMKERNELS_INLINE void pixels(int64_t k, int64_t p, Vec<A> value, int64_t n) const {
    if (out != nullptr) put<A>(out + k * stride_k + p * stride_p, stride_p, value, n);
  }
  CAMKERNELS_INLINE void channels(int64_t k, int64_t p, Vec<A> value, int64_t n) const {
    if (out != nullptr) put<A>(out + k * stride_k + p * stride_p, stride_k, value, n);
  }
};

}  // namespace CAMKERNELS_ISA
}  // namespace camkernels
