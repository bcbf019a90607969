// Mean and sum of squared deviations per channel, in one pass over memory. A task sums deviations
// from a guess, the mean of its first values. Where that guess was so far off that the squares
// cancel (or nothing is finite), it passes once more over its values, which the cache still holds.
#include <type_traits>

#include "batch_norm_relu/rows.h"

namespace camkernels {
namespace CAMKERNELS_ISA {

// What a task leaves in scratch. Kept apart from the guess, its error does not round a mean that is
// large against the deviations.
enum { kGuess, kError, kSquare, kParts };

// Whether deviations with the sums `error` and `square` over `count` values kept the digits of the
// squares; not where they are NaN. V is one value or a vector of channels.
template <class V, class A>
static CAMKERNELS_INLINE auto kept(V error, V square, A count) {
  return square <= 16 * (square - error * (error / count));
}

template <class A, class T>
static A mean_of(const T* z, int64_t length) {
  Vec<A> sum = {};
  each_vector<A>(length,
                 [&](auto kind, int64_t i, int64_t count) { sum += read<A>(kind, z + i, count); });
  return sum_lanes<A>(sum) / (A)length;
}

// Deviations of a stretch of a plane from parts[kGuess].
template <class A, class T>
static CAMKERNELS_INLINE void deviate(const T* z, int64_t length, A* parts) {
  constexpr int N = Lanes<A>::count;
  const Vec<A> guess = splat(parts[kGuess]);
  Vec<A> errors[4] = {}, squares[4] = {};
  const auto add = [&](Vec<A> d, int j) {
    errors[j] += d;
    squares[j] += d * d;
  };
  const int64_t whole = length / (4 * N) * 4 * N;
  for (int64_t i = 0; i < whole; i += 4 * N) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) add(load<A>(z + i + j * N) - guess, j);
  }
  each_vector<A>(length - whole, [&](auto kind, int64_t i, int64_t count) {
    const Vec<A> d = read<A>(kind, z + whole + i, count) - guess;
    add(lane_index<A>() < splat((A)count) ? d : Vec<A>{}, 0);
  });
  parts[kError] = sum_lanes<A>((errors[0] + errors[1]) + (errors[2] + errors[3]));
  parts[kSquare] = sum_lanes<A>((squares[0] + squares[1]) + (squares[2] + squares[3]));
}

template <class A, class T>
static void stretch_statistics(const BatchNorm& args, int64_t task, A* parts) {
  constexpr int64_t kFirst = 4 * Lanes<A>::count;
  const Stretch s = stretch_of(args, task);
  const T* z = static_cast<const T*>(args.z) + s.row * args.pixels + s.begin;
  parts[kGuess] = mean_of<A>(z, s.length < kFirst ? s.length : kFirst);
  deviate(z, s.length, parts);
  if (kept(parts[kError], parts[kSquare], (A)s.length)) return;
  parts[kGuess] = mean_of<A>(z, s.length);
  deviate(z, s.length, parts);
}

template <class A>
struct ChannelParts {
  A* base;
  int64_t stride;
  CAMKERNELS_INLINE A* at(int part, int64_t c) const { return base + part * stride + c; }
};

// Deviations of one vector of channels over `count` pixels from the mean of them all.
template <class A, class T, class Kind>
static void repeat_channels(Kind kind, const T* z, int64_t stride, int64_t count, int64_t lanes,
                            const ChannelParts<A>& parts, int64_t c) {
  Vec<A> sum = {}, error = {}, square = {};
  for (int64_t row = 0; row < count; ++row) sum += read<A>(kind, z + row * stride + c, lanes);
  const Vec<A> guess = sum / (A)count;
  for (int64_t row = 0; row < count; ++row) {
    const Vec<A> d = read<A>(kind, z + row * stride + c, lanes) - guess;
    error += d;
    square += d * d;
  }
  store<A>(parts.at(kGuess, c), guess);
  store<A>(parts.at(kError, c), error);
  store<A>(parts.at(kSquare, c), square);
}

// Adds the deviations of `count` pixels, and fetches as many that follow, in the order of memory.
template <class A, class T>
static CAMKERNELS_INLINE void tile_statistics(const T* z, int64_t channels, int64_t count,
                                              const ChannelParts<A>& parts) {
  const T* ahead = z + count * channels;
  each_vector<A>(channels, [&](auto kind, int64_t c, int64_t lanes) {
    const Vec<A> guess = load<A>(parts.at(kGuess, c));
    Vec<A> errors[2] = {load<A>(parts.at(kError, c)), {}};
    Vec<A> squares[2] = {load<A>(parts.at(kSquare, c)), {}};
    const auto add = [&](int64_t row, int j) {
      __builtin_prefetch(ahead);
      ahead += Lanes<A>::count;
      const Vec<A> d = read<A>(kind, z + row * channels + c, lanes) - guess;
      errors[j] += d;
      squares[j] += d * d;
    };
    int64_t row = 0;
    for (; row + 2 <= count; row += 2) {
      add(row, 0);
      add(row + 1, 1);
    }
    if (row < count) add(row, 0);
    store<A>(parts.at(kError, c), errors[0] + errors[1]);
    store<A>(parts.at(kSquare, c), squares[0] + squares[1]);
  });
}

// One block of pixels.
template <class A, class T>
static void pixel_statistics(const BatchNorm& args, int64_t task, const ChannelParts<A>& parts) {
  const int64_t channels = args.channels, begin = task * args.block, left = args.rows() - begin;
  const int64_t count = left < args.block ? left : args.block, first = count < 8 ? count : 8;
  const T* z = static_cast<const T*>(args.z) + begin * channels;
  each_vector<A>(channels, [&](auto kind, int64_t c, int64_t lanes) {
    Vec<A> sum = {};
    for (int64_t row = 0; row < first; ++row) sum += read<A>(kind, z + row * channels + c, lanes);
    store<A>(parts.at(kGuess, c), sum / (A)first);
    store<A>(parts.at(kError, c), Vec<A>{});
    store<A>(parts.at(kSquare, c), Vec<A>{});
  });
  const int64_t rows = tile_pixels(channels * (int64_t)sizeof(T));
  for (int64_t row = 0; row < count; row += rows) {
    tile_statistics<A>(z + row * channels, channels, count - row < rows ? count - row : rows,
                       parts);
  }
  each_vector<A>(channels, [&](auto kind, int64_t c, int64_t lanes) {
    const Vec<A> error = load<A>(parts.at(kError, c)), square = load<A>(parts.at(kSquare, c));
    if (bits_of<A>(~kept(error, square, (A)count)) != 0) {
      repeat_channels<A>(kind, z, channels, count, lanes, parts, c);
    }
  });
}

// Neighbouring parts in float64: one, or as many as a vector has.
template <class V, class A>
static CAMKERNELS_INLINE V wide(const A* parts) {
  if constexpr (sizeof(V) == sizeof(double)) {
    return (V)*parts;
  } else {
    typedef A Narrow __attribute__((vector_size(sizeof(V) / sizeof(double) * sizeof(A))));
    Narrow narrow;
    __builtin_memcpy(&narrow, parts, sizeof(narrow));
    return __builtin_convertvector(narrow, V);
  }
}

// Mean over all tasks, and the squares about it (Chan, Golub, LeVeque), of kCount neighbouring
// channels from channel c on. Parts: count(task), and at(part, task), kCount neighbouring values.
// By vectors: a task of many channels has few pixels, and its parts are many beside them.
template <class A, int kCount, class Parts>
static CAMKERNELS_INLINE void merge(const BatchNorm& args, int64_t c, int64_t tasks,
                                    const Parts& parts) {
  using V = typename std::conditional<kCount == 1, double, Vec<double>>::type;
  constexpr int kLanes = sizeof(V) / sizeof(double), kVectors = kCount / kLanes;
  double total = 0;
  V mean[kVectors] = {}, squares[kVectors] = {};
  const auto own_mean = [&](int64_t t, int j, double inverse) {
    const V error = wide<V>(parts.at(kError, t) + j * kLanes) * inverse;
    return wide<V>(parts.at(kGuess, t) + j * kLanes) + (error == error ? error : V{});  // Inf stays
  };
  for (int64_t t = 0; t < tasks; ++t) {
    const double count = (double)parts.count(t), inverse = 1 / count;
    total += count;
    for (int j = 0; j < kVectors; ++j) mean[j] += count * own_mean(t, j, inverse);
  }
  for (int j = 0; j < kVectors; ++j) mean[j] = total == 0 ? V{} : mean[j] / total;
  for (int64_t t = 0; t < tasks; ++t) {
    const double count = (double)parts.count(t), inverse = 1 / count;
    for (int j = 0; j < kVectors; ++j) {
      const V error = wide<V>(parts.at(kError, t) + j * kLanes);
      const V apart = own_mean(t, j, inverse) - mean[j];
      const V own = wide<V>(parts.at(kSquare, t) + j * kLanes) - error * (error * inverse);
      squares[j] += (own < 0 ? V{} : own) + count * apart * apart;
    }
  }
  double means[kCount], sums[kCount];
  __builtin_memcpy(means, mean, sizeof(means));
  __builtin_memcpy(sums, squares, sizeof(sums));
  A* results = static_cast<A*>(args.results);
  for (int64_t j = 0; j < kCount && c + j < args.channels; ++j) {
    results[c + j] = (A)means[j];
    results[args.channels + c + j] = (A)sums[j];
  }
}

// The parts of 16 channels of channels_last z.
template <class A>
struct PixelTasks {
  const BatchNorm& args;
  const A* scratch;
  int64_t c;
  int64_t count(int64_t t) const {
    const int64_t left = args.rows() - t * args.block;
    return left < args.block ? left : args.block;
  }
  const A* at(int part, int64_t t) const {
    return scratch + (t * kParts + part) * args.padded() + c;
  }
};

// The parts of one channel of contiguous z.
template <class A>
struct PlaneTasks {
  const BatchNorm& args;
  const A* scratch;
  int64_t c;
  int64_t count(int64_t t) const { return stretch_of(args, t % args.stretches()).length; }
  const A* at(int part, int64_t t) const {
    const int64_t each = args.stretches();
    return scratch + ((t / each * args.channels + c) * each + t % each) * kParts + part;
  }
};

template <class A, class T>
static void statistics(const BatchNorm& args) {
  const int64_t tasks = args.tasks(), padded = args.padded();
  A* scratch = static_cast<A*>(args.scratch);
#pragma omp parallel num_threads(args.threads) if (args.threads > 1)
  {
    if (args.channels_last) {
#pragma omp for schedule(static)
      for (int64_t task = 0; task < tasks; ++task) {
        pixel_statistics<A, T>(args, task, {scratch + task * kParts * padded, padded});
      }
#pragma omp for schedule(static) nowait
      for (int64_t c = 0; c < padded; c += 16) {
        merge<A, 16>(args, c, tasks, PixelTasks<A>{args, scratch, c});
      }
    } else {
#pragma omp for schedule(static)
      for (int64_t task = 0; task < tasks; ++task) {
        stretch_statistics<A, T>(args, task, scratch + task * kParts);
      }
#pragma omp for schedule(static) nowait
      for (int64_t c = 0; c < args.channels; ++c) {
        merge<A, 1>(args, c, args.batch * args.stretches(), PlaneTasks<A>{args, scratch, c});
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
