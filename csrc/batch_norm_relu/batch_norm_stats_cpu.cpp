// Mean and sum of squared deviations per channel. Each task passes twice over what is in the cache
// by then: the mean first, then deviations from it, so that a large mean costs no digits.
#include "batch_norm_relu/rows.h"
#include "common/parallel.h"

namespace camkernels {
namespace CAMKERNELS_ISA {

// Mean and squares of one task, corrected for the rounding of the mean itself (error = the sum of
// the deviations from it). An infinite mean stays.
template <class A>
static CAMKERNELS_INLINE void correct(A error, int64_t count, A* mean, A* squares) {
  const A moved = error / (A)count;
  *squares -= error * moved;
  if (moved == moved) *mean += moved;
}

template <class A, class T>
static void stretch_statistics(const BatchNorm& args, int64_t task, A* partial) {
  constexpr int N = Lanes<A>::count;
  const Stretch s = stretch_of(args, task);
  const T* z = static_cast<const T*>(args.z) + s.row * args.pixels + s.begin;
  const int64_t whole = s.length / (4 * N) * 4 * N;
  Vec<A> sums[4] = {}, errors[4] = {}, squares[4] = {};
  for (int64_t i = 0; i < whole; i += 4 * N) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sums[j] += load<A>(z + i + j * N);
  }
  each_vector<A>(s.length - whole, [&](auto kind, int64_t i, int64_t count) {
    sums[0] += read<A>(kind, z + whole + i, count);
  });
  A mean = sum_lanes<A>((sums[0] + sums[1]) + (sums[2] + sums[3])) / (A)s.length;
  const auto deviate = [&](Vec<A> d, int j) {
    errors[j] += d;
    squares[j] += d * d;
  };
  for (int64_t i = 0; i < whole; i += 4 * N) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) deviate(load<A>(z + i + j * N) - mean, j);
  }
  each_vector<A>(s.length - whole, [&](auto kind, int64_t i, int64_t count) {
    const Vec<A> d = read<A>(kind, z + whole + i, count) - mean;
    deviate(lane_index<A>() < splat((A)count) ? d : Vec<A>{}, 0);
  });
  const A error = sum_lanes<A>((errors[0] + errors[1]) + (errors[2] + errors[3]));
  A square = sum_lanes<A>((squares[0] + squares[1]) + (squares[2] + squares[3]));
  correct(error, s.length, &mean, &square);
  partial[0] = mean;
  partial[1] = square;
}

// add(i, kind, count, v) for each vector of channels, v the kRows vectors of neighbouring pixels.
template <int kRows, class A, class T, class Add>
static CAMKERNELS_INLINE void add_pixels(const T* z, int64_t channels, const Add& add) {
  each_vector<A>(channels, [&](auto kind, int64_t i, int64_t count) {
    Vec<A> v[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) v[r] = read<A>(kind, z + r * channels + i, count);
    add(i, v);
  });
}

// The three passes' worth of sums of one block of pixels; `errors` is (padded) scratch.
template <class A, class T>
static void pixel_statistics(const BatchNorm& args, int64_t task, A* means, A* squares, A* errors) {
  const int64_t channels = args.channels, begin = task * args.block, left = args.rows() - begin;
  const int64_t count = left < args.block ? left : args.block;
  const T* z = static_cast<const T*>(args.z) + begin * channels;
  for (int64_t c = 0; c < args.padded(); ++c) means[c] = squares[c] = errors[c] = 0;
  const auto add_mean = [&](int64_t i, auto& v) {
    Vec<A> sum = v[0];
    constexpr int kRows = sizeof(v) / sizeof(v[0]);
#pragma GCC unroll 8
    for (int r = 1; r < kRows; ++r) sum += v[r];
    store<A>(means + i, load<A>(means + i) + sum);
  };
  const auto add_square = [&](int64_t i, auto& v) {
    const Vec<A> mean = load<A>(means + i);
    Vec<A> error = {}, square = {};
    constexpr int kRows = sizeof(v) / sizeof(v[0]);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec<A> d = v[r] - mean;
      error += d;
      square += d * d;
    }
    store<A>(errors + i, load<A>(errors + i) + error);
    store<A>(squares + i, load<A>(squares + i) + square);
  };
  const auto pass = [&](const auto& add) {
    int64_t row = 0;
    for (; row + 8 <= count; row += 8) add_pixels<8, A>(z + row * channels, channels, add);
    for (; row < count; ++row) add_pixels<1, A>(z + row * channels, channels, add);
  };
  pass(add_mean);
  for (int64_t c = 0; c < channels; ++c) means[c] /= (A)count;
  pass(add_square);
  for (int64_t c = 0; c < channels; ++c) correct(errors[c], count, means + c, squares + c);
}

// The mean of all tasks' means, and their squares about it (Chan, Golub, LeVeque), for kCount
// neighbouring channels; part(t, j, &count, &mean, &squares).
template <class A, int kCount, class Part>
static CAMKERNELS_INLINE void merge(const BatchNorm& args, int64_t c, int64_t parts,
                                    const Part& part) {
  double total = 0, mean[kCount] = {}, squares[kCount] = {};
  for (int64_t t = 0; t < parts; ++t) {
    const double count = (double)part.count(t);
    const A* means = part.means(t);
    total += count;
    for (int j = 0; j < kCount; ++j) mean[j] += count * (double)means[j];
  }
  for (int j = 0; j < kCount; ++j) mean[j] = total == 0 ? 0 : mean[j] / total;
  for (int64_t t = 0; t < parts; ++t) {
    const double count = (double)part.count(t);
    const A *means = part.means(t), *own = part.squares(t);
    for (int j = 0; j < kCount; ++j) {
      const double apart = (double)means[j] - mean[j];
      squares[j] += (double)own[j] + count * apart * apart;
    }
  }
  A* results = static_cast<A*>(args.results);
  for (int64_t j = 0; j < kCount && c + j < args.channels; ++j) {
    results[c + j] = (A)mean[j];
    results[args.channels + c + j] = (A)squares[j];
  }
}

// Means and squares as the tasks left them in scratch.
template <class A>
struct PixelParts {
  const BatchNorm& args;
  const A* partial;
  int64_t c;
  int64_t count(int64_t t) const {
    const int64_t left = args.rows() - t * args.block;
    return left < args.block ? left : args.block;
  }
  const A* means(int64_t t) const { return partial + t * 2 * args.padded() + c; }
  const A* squares(int64_t t) const { return means(t) + args.padded(); }
};

template <class A>
struct PlaneParts {
  const BatchNorm& args;
  const A* partial;
  int64_t c;
  int64_t task(int64_t t) const {
    const int64_t each = args.stretches();
    return (t / each * args.channels + c) * each + t % each;
  }
  int64_t count(int64_t t) const { return stretch_of(args, t % args.stretches()).length; }
  const A* means(int64_t t) const { return partial + 2 * task(t); }
  const A* squares(int64_t t) const { return means(t) + 1; }
};

template <class A, class T>
static void statistics(const BatchNorm& args) {
  const int64_t tasks = args.tasks(), padded = args.padded();
  A* scratch = static_cast<A*>(args.scratch);
#pragma omp parallel num_threads(args.threads) if (args.threads > 1)
  {
    if (args.channels_last) {
      A* partial = scratch + args.threads * padded;
#pragma omp for schedule(static)
      for (int64_t task = 0; task < tasks; ++task) {
        A* means = partial + task * 2 * padded;
        pixel_statistics<A, T>(args, task, means, means + padded,
                               scratch + thread_index() * padded);
      }
#pragma omp for schedule(static) nowait
      for (int64_t c = 0; c < padded; c += 16) {
        merge<A, 16>(args, c, tasks, PixelParts<A>{args, partial, c});
      }
    } else {
#pragma omp for schedule(static)
      for (int64_t task = 0; task < tasks; ++task) {
        stretch_statistics<A, T>(args, task, scratch + 2 * task);
      }
#pragma omp for schedule(static) nowait
      for (int64_t c = 0; c < args.channels; ++c) {
        merge<A, 1>(args, c, args.batch * args.stretches(), PlaneParts<A>{args, scratch, c});
      }
    }
  }
}

void bn_stats(const BatchNorm& args) {
  if (args.dtype == kFloat64) return statistics<double, double>(args);
  CAMKERNELS_SWITCH(float, args.dtype, (statistics<float, T>(args)));
}

}  // namespace CAMKERNELS_ISA
}  // namespace camkernels
