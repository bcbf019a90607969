#include "cam_methods/pairs.h"
#include "common/parallel.h"

namespace camkernels {
namespace CAMKERNELS_ISA {

// Which pixels count in Grad-CAM++, and G / (2 + S G + eps / G^2) there.
template <class A>
struct Share {
  Vec<A> value, below, extra, gradient;
  Mask<A> counted;

  CAMKERNELS_INLINE Share(Vec<A> g, Vec<A> total, A eps) {
    const Vec<A> one = splat((A)1), square = g * g;
    counted = ~(g <= 0);
    if (eps != 0) counted = counted & ~(square <= 0);
    gradient = counted ? g : one;
    extra = eps == 0 ? Vec<A>{} : splat(eps) / (counted ? square : one);
    below = (A)2 + total * gradient + extra;
    value = counted ? gradient / below : Vec<A>{};
  }
  CAMKERNELS_INLINE Vec<A> to_gradient() const {
    return counted ? ((A)2 + (A)3 * extra) / (below * below) : Vec<A>{};
  }
  CAMKERNELS_INLINE Vec<A> to_total() const { return counted ? -value * value : Vec<A>{}; }
};

// What is summed over the pixels of channels: of one (lanes are pixels), or of several (lanes are
// channels). Both hold the sums in every lane that they concern.
template <class A, class T>
struct Sums {
  const CamWeights& args;
  const Pairs<A, T>& pairs;
  int64_t k, n;  // channels; n = 1 where lanes are pixels
  A eps;

  template <class F>
  CAMKERNELS_INLINE void each(const F& f) const {
    if (pairs.by_channels) {
      pairs.each_of_channels(k, n, [&](Vec<A> a, Vec<A> g, int64_t p) { f(a, g, p, n); });
    } else {
      pairs.each_of_plane(k, f);
    }
  }
  CAMKERNELS_INLINE Vec<A> joined(Vec<A> sum) const {
    return pairs.by_channels ? sum : splat(sum_lanes<A>(sum));
  }

  // S and, for XGrad-CAM, sum A G.
  void totals(Vec<A>* total, Vec<A>* product) const {
    Vec<A> s{}, q{};
    each([&](Vec<A> a, Vec<A> g, int64_t, int64_t) {
      s += a;
      q += a * g;
    });
    *total = joined(s);
    *product = joined(q);
  }

  Vec<A> weights() const {
    Vec<A> total, product;
    totals(&total, &product);
    if (args.method == kXGradCam) return product / (total + eps);
    Vec<A> sum{};
    each([&](Vec<A>, Vec<A> g, int64_t, int64_t) { sum += Share<A>(g, total, eps).value; });
    return joined(sum) + (total - total);  // NaN where a value is not finite
  }

  void backward(Vec<A> grad, const Target<A, T>& to_a, const Target<A, T>& to_g) const {
    auto write = [&](const Target<A, T>& to, int64_t p, Vec<A> value, int64_t count) {
      pairs.by_channels ? to.channels(k, p, value, count) : to.pixels(k, p, value, count);
    };
    Vec<A> total, product;
    totals(&total, &product);
    if (args.method == kXGradCam) {
      const Vec<A> below = total + eps, scale = grad / below, shift = product / below;
      each([&](Vec<A> a, Vec<A> g, int64_t p, int64_t count) {
        write(to_a, p, scale * (g - shift), count);
        write(to_g, p, scale * a, count);
      });
      return;
    }
    Vec<A> to_total{};
    each([&](Vec<A>, Vec<A> g, int64_t p, int64_t count) {
      const Share<A> share(g, total, eps);
      to_total += share.to_total();
      write(to_g, p, grad * share.to_gradient(), count);
    });
    const Vec<A> value = grad * joined(to_total);  // of every pixel of the channel
    if (to_a.out == nullptr) return;
    each([&](Vec<A>, Vec<A>, int64_t p, int64_t count) { write(to_a, p, value, count); });
  }
};

template <class A, class T>
static void run(const CamWeights& args) {
  constexpr int N = Lanes<A>::count;
  const int64_t channels = args.sizes.channels, pixels = args.sizes.pixels();
  const int64_t blocks = (channels + N - 1) / N;
#pragma omp parallel for schedule(static) num_threads(args.threads) if (args.threads > 1)
  for (int64_t task = 0; task < args.sizes.batch * blocks; ++task) {
    const int64_t b = task / blocks, begin = task % blocks * N;
    const int64_t count = channels - begin < N ? channels - begin : N;
    const Pairs<A, T> pairs(args.sizes, args.activations, args.gradients, b);
    const Target<A, T> to_a(args.to_activations, b, channels, pixels);
    const Target<A, T> to_g(args.to_gradients, b, channels, pixels);
    const A* grad = static_cast<const A*>(args.grad) + b * channels;
    A* weights = static_cast<A*>(args.weights) + b * channels;
    const int64_t step = pairs.by_channels ? N : 1;
    for (int64_t k = begin; k < begin + count; k += step) {
      const int64_t n = pairs.by_channels ? count : 1;
      const Sums<A, T> sums{args, pairs, k, n, (A)args.eps};
      if (args.grad == nullptr) {
        store_partial<A>(weights + k, sums.weights(), n);
      } else {
        const Vec<A> given = pairs.by_channels ? load_partial<A>(grad + k, n) : splat(grad[k]);
        sums.backward(given, to_a, to_g);
      }
    }
  }
}

void cam_weights(const CamWeights& args) {
  if (args.activations.dtype == kFloat64) {
    run<double, double>(args);
  } else {
    CAMKERNELS_SWITCH(float, args.activations.dtype, run<float, T>(args));
  }
}

}  // namespace CAMKERNELS_ISA
}  // namespace camkernels
