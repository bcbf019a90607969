#include "gradient_error/error_loops.h"
#include "gradient_error/gradient_error.h"

namespace camkernels {
namespace CAMKERNELS_ISA {

// From so many samples per thread on, each thread has samples of its own.
constexpr int64_t kSamplesPerThread = 4;

static int64_t blocks_of(int64_t entries) { return (entries + kErrorBlock - 1) / kErrorBlock; }

template <class A>
static A* statistics_of(const GradientErrorForward& args, int64_t b) {
  return static_cast<A*>(args.statistics) + b * kErrorStatistics;
}

// visit(d, g), which adds to `sums`, over block `block` of sample b.
template <class A, class Visit, class... Sums>
static CAMKERNELS_INLINE void each_of_block(const GradientErrorForward& args, int64_t b,
                                            int64_t block, const Visit& visit, Sums&... sums) {
  A one[kChunk], other[kChunk];
  const int64_t begin = block * kErrorBlock;
  const int64_t end = begin + kErrorBlock < args.entries ? begin + kErrorBlock : args.entries;
  for (int64_t first = begin; first < end; first += kChunk) {
    const int64_t count = end - first < kChunk ? end - first : kChunk;
    each<A>(widened(args.delta, b, first, count, one), widened(args.guided, b, first, count, other),
            count, visit, sums...);
  }
}

// Partial sums of the first pass: the mean, or the norms.
template <class A>
static void first_pass(const GradientErrorForward& args, int64_t b, int64_t block, double* sums) {
  Sum<A> d_sum, g_sum;
  if (args.error == kCenteredSigmoid) {
    each_of_block<A>(args, b, block, [&](Vec<A> d, Vec<A>) { d_sum.add(d); }, d_sum);
  } else {
    const auto norms = [&](Vec<A> d, Vec<A> g) {
      d_sum.add(magnitude<A>(d));
      g_sum.add(magnitude<A>(g));
    };
    each_of_block<A>(args, b, block, norms, d_sum, g_sum);
  }
  sums[0] = d_sum.total();
  sums[1] = g_sum.total();
}

template <class A>
static void join_first(const GradientErrorForward& args, int64_t b, const double* sums) {
  A* statistics = statistics_of<A>(args, b);
  if (args.error == kCenteredSigmoid) {
    statistics[0] = (A)(sums[0] / (double)args.entries);
  } else {
    statistics[1] = (A)sums[0];
    statistics[2] = (A)sums[1];
  }
}

// Partial sums of the last pass.
template <class A>
static void last_pass(const GradientErrorForward& args, int64_t b, int64_t block, double* sums) {
  const A* known = statistics_of<A>(args, b);
  Sum<A> one, two, three;
  switch (args.error) {
    case kSigmoid: {
      const auto visit = [&](Vec<A> d, Vec<A> g) {
        Vec<A> value, slope;
        sigmoid<A>(d, &value, &slope);
        one.add(g * value + (d - d));  // the sigmoid of infinity is finite
      };
      each_of_block<A>(args, b, block, visit, one);
      break;
    }
    case kCenteredSigmoid: {
      const A mean = known[0];
      const auto visit = [&](Vec<A> d, Vec<A> g) {
        Vec<A> value, slope;
        sigmoid<A>(d - mean, &value, &slope);
        one.add(g * value);
        two.add(g * slope);
      };
      each_of_block<A>(args, b, block, visit, one, two);
      break;
    }
    case kCosine: {
      const auto visit = [&](Vec<A> d, Vec<A> g) {
        one.add(d, g);
        two.add(d, d);
        three.add(g, g);
      };
      each_of_block<A>(args, b, block, visit);
      break;
    }
    case kHistogram: {
      const A d_norm = known[1], g_norm = known[2];
      const auto visit = [&](Vec<A> d, Vec<A> g) {
        const Vec<A> ours = magnitude<A>(d) / d_norm, theirs = magnitude<A>(g) / g_norm;
        one.add(ours < theirs ? ours : theirs);
        two.add(ours <= theirs ? ours : Vec<A>{});
      };
      each_of_block<A>(args, b, block, visit, one, two);
      break;
    }
    default: {
      const auto visit = [&](Vec<A> d, Vec<A> g) {
        const Vec<A> ours = magnitude<A>(d), theirs = magnitude<A>(g);
        one.add(ours < theirs ? ours : theirs);
      };
      each_of_block<A>(args, b, block, visit, one);
    }
  }
  sums[0] = one.total();
  sums[1] = two.total();
  sums[2] = three.total();
}

template <class A>
static void join_last(const GradientErrorForward& args, int64_t b, const double* sums) {
  A* known = statistics_of<A>(args, b);
  A* error = static_cast<A*>(args.errors) + b;
  if (args.error == kSigmoid || args.error == kCenteredSigmoid) {
    *error = (A)-sums[0];
    if (args.error == kSigmoid) known[0] = known[1] = 0;
    if (args.error == kCenteredSigmoid) {
      known[1] = (A)(sums[1] / (double)args.entries);
      *error += known[0] - known[0];  // a mean out of range leaves all others at one end
    }
    known[2] = 0;
    return;
  }
  if (args.error == kCosine) {
    known[1] = (A)__builtin_sqrt(sums[1]);
    known[2] = (A)__builtin_sqrt(sums[2]);
  }
  if (known[1] < kTiny<A> || known[2] < kTiny<A>) {
    *error = known[0] = known[1] = known[2] = 0;
    return;
  }
  const A both = known[1] + known[2], visible = both - both;  // NaN where either is not finite
  if (args.error == kCosine) {
    known[0] = (A)(sums[0] / (__builtin_sqrt(sums[1]) * __builtin_sqrt(sums[2]))) + visible;
    *error = -known[0];
  } else if (args.error == kHistogram) {
    known[0] = (A)sums[1] + visible;
    *error = (A)-sums[0] + visible;
  } else {
    known[0] = (A)sums[0] / known[1] + visible;  // exactly 1 where all of d is smaller
    *error = -known[0] / known[2];
  }
}

// The partial sums of a sample, added in order.
template <class Join>
static void join_blocks(const GradientErrorForward& args, int64_t b, const Join& join) {
  const int64_t blocks = blocks_of(args.entries);
  double sums[kErrorSums] = {};
  for (int64_t block = 0; block < blocks; ++block) {
    const double* partial = args.partial + (b * blocks + block) * kErrorSums;
    for (int i = 0; i < kErrorSums; ++i) sums[i] += partial[i];
  }
  join(args, b, sums);
}

// One pass by all threads of the team, over blocks.
template <class Pass, class Join>
static void run_together(const GradientErrorForward& args, const Pass& pass, const Join& join) {
  const int64_t blocks = blocks_of(args.entries), tasks = args.batch * blocks;
#pragma omp for schedule(static)
  for (int64_t task = 0; task < tasks; ++task) {
    pass(args, task / blocks, task % blocks, args.partial + task * kErrorSums);
  }
#pragma omp for schedule(static)
  for (int64_t b = 0; b < args.batch; ++b) join_blocks(args, b, join);
}

// One pass over one sample by one thread.
template <class Pass, class Join>
static void run_alone(const GradientErrorForward& args, int64_t b, const Pass& pass,
                      const Join& join) {
  const int64_t blocks = blocks_of(args.entries);
  for (int64_t block = 0; block < blocks; ++block) {
    pass(args, b, block, args.partial + (b * blocks + block) * kErrorSums);
  }
  join_blocks(args, b, join);
}

template <class A>
static void forward(const GradientErrorForward& args) {
  const bool two_passes = args.error != kSigmoid && args.error != kCosine;
  if (args.batch >= kSamplesPerThread * args.threads) {
    // The second pass finds in a cache what the first has read.
#pragma omp parallel for schedule(static) num_threads(args.threads) if (args.threads > 1)
    for (int64_t b = 0; b < args.batch; ++b) {
      if (two_passes) run_alone(args, b, first_pass<A>, join_first<A>);
      run_alone(args, b, last_pass<A>, join_last<A>);
    }
    return;
  }
#pragma omp parallel num_threads(args.threads) if (args.threads > 1)
  {
    if (two_passes) run_together(args, first_pass<A>, join_first<A>);
    run_together(args, last_pass<A>, join_last<A>);
  }
}

// write(d, g) for `count` entries, to `out`; `streaming` stores past the caches.
template <class A, class T, class Write>
static CAMKERNELS_INLINE void map(const A* d, const A* g, int64_t count, T* out, bool streaming,
                                  const Write& write) {
  constexpr int N = Lanes<A>::count;
  const auto some = [&](int64_t i, int64_t n) {
    store_partial<A>(out + i, write(load_partial<A>(d + i, n), load_partial<A>(g + i, n)), n);
  };
  int64_t i = 0;
  if (streaming && count >= 2 * N) {
    i = (int64_t)(-(uint64_t)out % (N * sizeof(T)) / sizeof(T));
    if (i > 0) some(0, i);
    for (; i + N <= count; i += N) stream<A>(out + i, write(load<A>(d + i), load<A>(g + i)));
  }
  for (; i + N <= count; i += N) store<A>(out + i, write(load<A>(d + i), load<A>(g + i)));
  if (i < count) some(i, count - i);
}

template <class A, class T>
static void backward_of(const GradientErrorBackward& args, int64_t b, const A* d, const A* g,
                        int64_t count, T* out) {
  const A* known = static_cast<const A*>(args.statistics) + b * kErrorStatistics;
  const A e = -static_cast<const A*>(args.grad_errors)[b];
  const A first = known[0], d_norm = known[1], g_norm = known[2];
  if (args.error == kSigmoid || args.error == kCenteredSigmoid) {
    map(d, g, count, out, args.streaming, [&](Vec<A> x, Vec<A> y) {
      Vec<A> value, slope;
      sigmoid<A>(x - first, &value, &slope);
      return (Vec<A>)(e * (y * slope - d_norm));
    });
  } else if (d_norm == 0 || g_norm == 0) {
    map(d, g, count, out, args.streaming, [](Vec<A>, Vec<A>) { return Vec<A>{}; });
  } else if (args.error == kCosine) {
    map(d, g, count, out, args.streaming, [&](Vec<A> x, Vec<A> y) {
      return (Vec<A>)(e * (y / g_norm - first * (x / d_norm)) / d_norm);
    });
  } else {
    const bool normalized = args.error == kHistogram;
    const A d_unit = normalized ? d_norm : (A)1, g_unit = normalized ? g_norm : (A)1;
    const A divisor = normalized ? (A)1 : g_norm;
    map(d, g, count, out, args.streaming, [&](Vec<A> x, Vec<A> y) {
      const Vec<A> sign = x > 0 ? splat((A)1) : (x < 0 ? splat((A)-1) : x);  // NaN stays
      const Mask<A> ours = magnitude<A>(x) / d_unit <= magnitude<A>(y) / g_unit;
      const Vec<A> difference = (ours ? splat((A)1) : Vec<A>{}) - first;
      return (Vec<A>)(e * sign * difference / divisor / d_norm);
    });
  }
}

template <class A>
static void backward(const GradientErrorBackward& args) {
  const int64_t blocks = blocks_of(args.entries), tasks = args.batch * blocks;
#pragma omp parallel for schedule(static) num_threads(args.threads) if (args.threads > 1)
  for (int64_t task = 0; task < tasks; ++task) {
    A one[kChunk], other[kChunk];
    const int64_t b = task / blocks, begin = task % blocks * kErrorBlock;
    const int64_t end = begin + kErrorBlock < args.entries ? begin + kErrorBlock : args.entries;
    for (int64_t first = begin; first < end; first += kChunk) {
      const int64_t count = end - first < kChunk ? end - first : kChunk;
      const A* d = widened(args.delta, b, first, count, one);
      const A* g = widened(args.guided, b, first, count, other);
      CAMKERNELS_SWITCH(
          A, args.delta.dtype,
          backward_of<A, T>(args, b, d, g, count,
                            static_cast<T*>(args.grad_delta) + b * args.entries + first));
    }
    if (args.streaming) stream_fence();
  }
}

void gradient_error_fwd(const GradientErrorForward& args) {
  args.delta.dtype == kFloat64 ? forward<double>(args) : forward<float>(args);
}

void gradient_error_bwd(const GradientErrorBackward& args) {
  args.delta.dtype == kFloat64 ? backward<double>(args) : backward<float>(args);
}

}  // namespace CAMKERNELS_ISA
}  // namespace camkernels
