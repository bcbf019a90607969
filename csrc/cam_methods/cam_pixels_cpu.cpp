#include "cam_methods/pairs.h"
#include "common/parallel.h"

namespace camkernels {
namespace CAMKERNELS_ISA {

// f(g): its positive part, NaN kept, or itself.
template <class A>
CAMKERNELS_INLINE Vec<A> chosen(Vec<A> g, bool positive) {
  return positive ? (g <= 0 ? Vec<A>{} : g) : g;
}

// The map from channels [begin, end) of a sample.
template <class A, class T>
static void sum_block(const CamPixels& args, int64_t b, int64_t begin, int64_t end, A* map) {
  constexpr int N = Lanes<A>::count;
  const Pairs<A, T> pairs(args.sizes, args.activations, args.gradients, b);
  for (int64_t p = 0; p < pairs.pixels; ++p) map[p] = 0;
  if (pairs.by_channels) {
    for (int64_t k = begin; k < end; k += N) {
      const int64_t n = end - k < N ? end - k : N;
      pairs.each_of_channels(k, n, [&](Vec<A> a, Vec<A> g, int64_t p) {
        map[p] += sum_lanes<A>(chosen<A>(g, args.positive) * a);
      });
    }
    return;
  }
  for (int64_t k = begin; k < end; ++k) {
    pairs.each_of_plane(k, [&](Vec<A> a, Vec<A> g, int64_t p, int64_t n) {
      const Vec<A> value = chosen<A>(g, args.positive) * a;
      if (n == N) {
        store<A>(map + p, load<A>(map + p) + value);
      } else {
        store_partial<A>(map + p, load_partial<A>(map + p, n) + value, n);
      }
    });
  }
}

template <class A, class T>
static void forward(const CamPixels& args) {
  const int64_t channels = args.sizes.channels, pixels = args.sizes.pixels();
  const int64_t blocks = (channels + args.block - 1) / args.block;
  A* partial = static_cast<A*>(args.partial);
#pragma omp parallel num_threads(args.threads) if (args.threads > 1)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < args.sizes.batch * blocks; ++task) {
      const int64_t begin = task % blocks * args.block, end = begin + args.block;
      sum_block<A, T>(args, task / blocks, begin, end < channels ? end : channels,
                      partial + task * pixels);
    }
#pragma omp for schedule(static) nowait
    for (int64_t b = 0; b < args.sizes.batch; ++b) {
      A* map = static_cast<A*>(args.maps) + b * pixels;
      for (int64_t p = 0; p < pixels; ++p) {
        A sum = partial[b * blocks * pixels + p];
        for (int64_t i = 1; i < blocks; ++i) sum += partial[(b * blocks + i) * pixels + p];
        map[p] = args.relu && sum < 0 ? (A)0 : sum;  // keeps NaN, as torch's relu does
      }
    }
  }
}

template <class A, class T>
static void backward(const CamPixels& args) {
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
    const A* grad = static_cast<const A*>(args.grad) + b * pixels;
    auto slope = [&](Vec<A> a, Vec<A> g, Vec<A> d) {
      const Vec<A> value = a * d;
      return args.positive ? (g <= 0 ? Vec<A>{} : value) : value;
    };
    if (pairs.by_channels) {
      pairs.each_of_channels(begin, count, [&](Vec<A> a, Vec<A> g, int64_t p) {
        const Vec<A> d = splat(grad[p]);
        to_a.channels(begin, p, chosen<A>(g, args.positive) * d, count);
        to_g.channels(begin, p, slope(a, g, d), count);
      });
      continue;
    }
    for (int64_t k = begin; k < begin + count; ++k) {
      pairs.each_of_plane(k, [&](Vec<A> a, Vec<A> g, int64_t p, int64_t n) {
        const Vec<A> d = n == N ? load<A>(grad + p) : load_partial<A>(grad + p, n);
        to_a.pixels(k, p, chosen<A>(g, args.positive) * d, n);
        to_g.pixels(k, p, slope(a, g, d), n);
      });
    }
  }
}

template <class A, class T>
static void run(const CamPixels& args) {
  args.grad == nullptr ? forward<A, T>(args) : backward<A, T>(args);
}

void cam_pixels(const CamPixels& args) {
  if (args.activations.dtype == kFloat64) {
    run<double, double>(args);
  } else {
    CAMKERNELS_SWITCH(float, args.activations.dtype, run<float, T>(args));
  }
}

}  // namespace CAMKERNELS_ISA
}  // namespace camkernels
