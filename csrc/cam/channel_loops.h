// Loops over a block of channels of one sample: what cam and cam_statistics are made of.
#pragma once

#include "cam/cam.h"
#include "common/plane.h"
#include "common/vec.h"

namespace camkernels {
namespace CAMKERNELS_ISA {

template <class A, class T>
static CAMKERNELS_INLINE const T* sample_of(const View& view, int64_t b, int64_t k) {
  return static_cast<const T*>(view.data) + b * view.stride_b + k * view.stride_k;
}

// sum_p d_p a_p over one row; with kOnes d is 1.
template <class A, class T, bool kOnes>
static CAMKERNELS_INLINE A dot_row(const T* a, const A* d, int64_t length) {
  constexpr int N = Lanes<A>::count;
  Vec<A> sums[4] = {};
  auto add = [&](Vec<A>& sum, Vec<A> value, const A* weight) {
    if constexpr (kOnes) {
      sum += value;
    } else {
      sum += value * load<A>(weight);
    }
  };
  int64_t i = 0;
  for (; i + 4 * N <= length; i += 4 * N) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) add(sums[j], load<A>(a + i + j * N), d + i + j * N);
  }
  for (; i + N <= length; i += N) add(sums[0], load<A>(a + i), d + i);
  if (i < length) {
    const Vec<A> value = load_partial<A>(a + i, length - i);
    sums[1] += kOnes ? value : value * load_partial<A>(d + i, length - i);
  }
  return sum_lanes<A>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// out_k = scale sum_p d_p a_kp for `count` channels; with kOnes d is 1.
template <class A, class T, bool kOnes>
static void reduce_pixels(const Plane& plane, const View& view, const T* a, const A* d,
                          int64_t count, A divisor, A* out) {
  const Layout layout = layout_of(plane, view);
  if (kOnes && plane.rows == 1 && plane.pixel_stride == 0) {  // expanded: the mean is the value
    for (int64_t k = 0; k < count; ++k) {
      const A pixels = (A)plane.length;
      out[k] = element<A>(a + k * view.stride_k) * (pixels / divisor);
    }
    return;
  }
  if (layout == kChannels) {
    constexpr int N = Lanes<A>::count;
    for (int64_t k = 0; k < count; ++k) out[k] = 0;
    for (int64_t row = 0; row < plane.rows; ++row) {
      const T* at = a + row * plane.row_stride;
      const A* weight = kOnes ? d : d + row * plane.length;
      int64_t p = 0;
      // Eight pixels are added before they meet the running sum: fewer roundings and loads.
      for (; p + 8 <= plane.length; p += 8) {
        const T* pixel = at + p * plane.pixel_stride;
        int64_t k = 0;
        for (; k + N <= count; k += N) {
          Vec<A> v[8];
#pragma GCC unroll 8
          for (int j = 0; j < 8; ++j) {
            v[j] = load<A>(pixel + j * plane.pixel_stride + k);
            if (!kOnes) v[j] *= weight[p + j];
          }
          const Vec<A> sum = ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
          store<A>(out + k, load<A>(out + k) + sum);
        }
        for (; k < count; ++k) {
          A sum = 0;
          for (int j = 0; j < 8; ++j) {
            const A value = element<A>(pixel + j * plane.pixel_stride + k);
            sum += kOnes ? value : value * weight[p + j];
          }
          out[k] += sum;
        }
      }
      for (; p < plane.length; ++p) {
        const T* pixel = at + p * plane.pixel_stride;
        const A w = kOnes ? (A)1 : weight[p];
        int64_t k = 0;
        for (; k + N <= count; k += N) {
          Vec<A> value = load<A>(pixel + k);
          if (!kOnes) value *= w;
          store<A>(out + k, load<A>(out + k) + value);
        }
        for (; k < count; ++k) {
          const A value = element<A>(pixel + k);
          out[k] += kOnes ? value : value * w;
        }
      }
    }
    for (int64_t k = 0; k < count; ++k) out[k] /= divisor;
    return;
  }
  for (int64_t k = 0; k < count; ++k) {
    const T* channel = a + k * view.stride_k;
    double sum = 0;  // across rows and in the strided loop, where lanes do not shorten the chain
    for (int64_t row = 0; row < plane.rows; ++row) {
      const T* at = channel + row * plane.row_stride;
      const A* weight = kOnes ? d : d + row * plane.length;
      if (layout == kPixels) {
        sum += dot_row<A, T, kOnes>(at, weight, plane.length);
      } else {
        for (int64_t p = 0; p < plane.length; ++p) {
          const A value = element<A>(at + p * plane.pixel_stride);
          sum += kOnes ? value : value * weight[p];
        }
      }
    }
    out[k] = (A)(sum / divisor);
  }
}

// map_i += sum_c alpha_c a_ci for kCount rows of one block of pixels.
template <class A, class T, int kCount>
static CAMKERNELS_INLINE void add_rows(const T* a, int64_t stride_k, const A* alpha, A* map,
                                       int64_t length) {
  constexpr int N = Lanes<A>::count;
  Vec<A> w[kCount];
#pragma GCC unroll 8
  for (int c = 0; c < kCount; ++c) w[c] = splat(alpha[c]);
  int64_t i = 0;
  for (; i + N <= length; i += N) {
    Vec<A> even = load<A>(map + i), odd = {};
#pragma GCC unroll 8
    for (int c = 0; c < kCount; ++c) {
      (c % 2 ? odd : even) += w[c] * load<A>(a + c * stride_k + i);
    }
    store<A>(map + i, even + odd);
  }
  if (i < length) {
    Vec<A> sum = load_partial<A>(map + i, length - i);
#pragma GCC unroll 8
    for (int c = 0; c < kCount; ++c) {
      sum += w[c] * load_partial<A>(a + c * stride_k + i, length - i);
    }
    store_partial<A>(map + i, sum, length - i);
  }
}

// sum_k alpha_k a_k over the channels of kCount neighbouring pixels.
template <class A, class T, int kCount>
static CAMKERNELS_INLINE void sum_channels(const T* a, int64_t pixel_stride, const A* alpha,
                                           int64_t count, A* out) {
  constexpr int N = Lanes<A>::count;
  Vec<A> even[kCount] = {}, odd[kCount] = {};
  int64_t k = 0;
  for (; k + 2 * N <= count; k += 2 * N) {
    const Vec<A> w0 = load<A>(alpha + k), w1 = load<A>(alpha + k + N);
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) {
      even[j] += w0 * load<A>(a + j * pixel_stride + k);
      odd[j] += w1 * load<A>(a + j * pixel_stride + k + N);
    }
  }
  for (; k < count; k += N) {
    const int64_t n = count - k < N ? count - k : N;
    const Vec<A> w = load_partial<A>(alpha + k, n);
    for (int j = 0; j < kCount; ++j) {
      even[j] += w * load_partial<A>(a + j * pixel_stride + k, n);
    }
  }
  for (int j = 0; j < kCount; ++j) out[j] = sum_lanes<A>(even[j] + odd[j]);
}

// map = sum_k alpha_k A_k over `count` channels.
template <class A, class T>
static void accumulate_map(const Plane& plane, const View& view, const T* a, const A* alpha,
                           int64_t count, A* map) {
  const Layout layout = layout_of(plane, view);
  if (layout == kChannels) {
    for (int64_t row = 0; row < plane.rows; ++row) {
      const T* at = a + row * plane.row_stride;
      A* out = map + row * plane.length;
      int64_t p = 0;
      for (; p + 4 <= plane.length; p += 4) {
        sum_channels<A, T, 4>(at + p * plane.pixel_stride, plane.pixel_stride, alpha, count,
                              out + p);
      }
      for (; p < plane.length; ++p) {
        sum_channels<A, T, 1>(at + p * plane.pixel_stride, 0, alpha, count, out + p);
      }
    }
    return;
  }
  // Sums grow in a buffer of this thread's own: neighbouring maps share cache lines, and two
  // threads that add to them channel by channel would take the lines from each other all the time.
  constexpr int64_t kSegment = 4096;  // of the map: stays in the first-level cache
  alignas(64) A out[kSegment];
  for (int64_t row = 0; row < plane.rows; ++row) {
    for (int64_t begin = 0; begin < plane.length; begin += kSegment) {
      const int64_t length = plane.length - begin < kSegment ? plane.length - begin : kSegment;
      const T* at = a + row * plane.row_stride + begin * plane.pixel_stride;
      for (int64_t p = 0; p < length; ++p) out[p] = 0;
      int64_t k = 0;
      if (layout == kPixels) {
        for (; k + 8 <= count; k += 8) {
          add_rows<A, T, 8>(at + k * view.stride_k, view.stride_k, alpha + k, out, length);
        }
        for (; k < count; ++k) {
          add_rows<A, T, 1>(at + k * view.stride_k, view.stride_k, alpha + k, out, length);
        }
      } else {
        for (; k < count; ++k) {
          const T* channel = at + k * view.stride_k;
          for (int64_t p = 0; p < length; ++p) {
            out[p] += alpha[k] * element<A>(channel + p * plane.pixel_stride);
          }
        }
      }
      A* target = map + row * plane.length + begin;
      for (int64_t p = 0; p < length; ++p) target[p] = out[p];
    }
  }
}

// out_i = scale x_i; `streaming` stores whole lines past the caches.
template <class A, class T>
static CAMKERNELS_INLINE void scale_row(T* out, const A* x, A scale, int64_t length,
                                        bool streaming) {
  constexpr int N = Lanes<A>::count;
  const Vec<A> factor = splat(scale);
  int64_t i = 0;
  if (streaming && length >= 4 * N) {
    const uint64_t misaligned = (uint64_t)out % (N * sizeof(T));
    if (misaligned % sizeof(T) == 0) {
      if (misaligned != 0) {
        i = (int64_t)((N * sizeof(T) - misaligned) / sizeof(T));
        store_partial<A>(out, factor * load_partial<A>(x, i), i);
      }
      for (; i + N <= length; i += N) stream<A>(out + i, factor * load<A>(x + i));
    }
  }
  for (; i + N <= length; i += N) store<A>(out + i, factor * load<A>(x + i));
  if (i < length) {
    store_partial<A>(out + i, factor * load_partial<A>(x + i, length - i), length - i);
  }
}

// Forward of one block of channels of one sample: alpha where it is wanted, and a partial map.
template <class A>
static void forward_block(const CamForward& args, int64_t b, int64_t block) {
  const int64_t K = args.sizes.channels, P = args.sizes.pixels();
  const int64_t blocks = (K + args.block - 1) / args.block;
  const int64_t k = block * args.block;
  const int64_t count = K - k < args.block ? K - k : args.block;
  A* alpha = static_cast<A*>(args.alpha) + b * K + k;
  A* map = static_cast<A*>(args.partial) + (b * blocks + block) * P;
  if (args.gradients.data != nullptr) {
    const Plane plane = plane_of(args.sizes, args.gradients);
    CAMKERNELS_SWITCH(
        A, args.gradients.dtype,
        (reduce_pixels<A, T, true>(plane, args.gradients, sample_of<A, T>(args.gradients, b, k),
                                   nullptr, count, (A)P, alpha)));
  }
  const Plane plane = plane_of(args.sizes, args.activations);
  CAMKERNELS_SWITCH(
      A, args.activations.dtype,
      (accumulate_map<A, T>(plane, args.activations, sample_of<A, T>(args.activations, b, k), alpha,
                            count, map)));
}

// Adds the partial maps of one sample, always in the same order, into its map.
template <class A>
static A* join_blocks(const CamForward& args, int64_t b) {
  const int64_t P = args.sizes.pixels();
  const int64_t blocks = (args.sizes.channels + args.block - 1) / args.block;
  A* map = static_cast<A*>(args.maps) + b * P;
  const A* partial = static_cast<const A*>(args.partial) + b * blocks * P;
  if (partial == map) return map;
  for (int64_t p = 0; p < P; ++p) {
    A sum = partial[p];
    for (int64_t i = 1; i < blocks; ++i) sum += partial[i * P + p];
    map[p] = sum;
  }
  return map;
}

// Keeps NaN, as torch's relu does.
template <class A>
static void relu_row(A* values, int64_t length) {
  for (int64_t p = 0; p < length; ++p) values[p] = values[p] < 0 ? (A)0 : values[p];
}

// grad_activations = alpha D for one block of channels.
template <class A, class T>
static void write_block(const CamBackward& args, int64_t b, int64_t k, int64_t count,
                        const A* masked) {
  const int64_t K = args.sizes.channels, P = args.sizes.pixels();
  const A* alpha = static_cast<const A*>(args.alpha) + b * K + k;
  T* out = static_cast<T*>(args.grad_activations) + b * K * P;
  if (args.channels_last) {
    for (int64_t p = 0; p < P; ++p) {
      scale_row<A, T>(out + p * K + k, alpha, masked[p], count, args.streaming);
    }
  } else {
    for (int64_t c = 0; c < count; ++c) {
      scale_row<A, T>(out + (k + c) * P, masked, alpha[c], P, args.streaming);
    }
  }
  if (args.streaming) stream_fence();
}

// Backward of one block of channels of one sample, from D in args.masked.
template <class A>
static void backward_block(const CamBackward& args, int64_t b, int64_t block) {
  const int64_t K = args.sizes.channels, P = args.sizes.pixels();
  const int64_t k = block * args.block;
  const int64_t count = K - k < args.block ? K - k : args.block;
  const A* masked = static_cast<const A*>(args.masked) + b * P;
  if (args.activations.data != nullptr) {
    const Plane plane = plane_of(args.sizes, args.activations);
    A* grad_alpha = static_cast<A*>(args.grad_alpha) + b * K + k;
    CAMKERNELS_SWITCH(
        A, args.activations.dtype,
        reduce_pixels<A, T, false>(plane, args.activations, sample_of<A, T>(args.activations, b, k),
                                   masked, count, (A)1, grad_alpha));
  }
  if (args.alpha != nullptr) {
    CAMKERNELS_SWITCH(A, args.grad_dtype, write_block<A, T>(args, b, k, count, masked));
  }
}

}  // namespace CAMKERNELS_ISA
}  // namespace camkernels
