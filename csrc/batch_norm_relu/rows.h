// What the kernels share: values per channel, the gate of the ReLU, and the walk over the rows.
#pragma once

#include "batch_norm_relu/batch_norm_relu.h"
#include "batch_norm_relu/lanes.h"

namespace camkernels {
namespace CAMKERNELS_ISA {

// --- values per channel -------------------------------------------------------------------------

// Of a plane: the same in all lanes.
template <class A, int kCount>
struct PlaneValues {
  Vec<A> values[kCount];
  CAMKERNELS_INLINE Vec<A> get(int which, int64_t) const { return values[which]; }
};

// Of a pixel: a vector per vector of channels, from scratch.
template <class A>
struct PixelValues {
  const A* base;
  int64_t stride;
  CAMKERNELS_INLINE Vec<A> get(int which, int64_t i) const {
    return load<A>(base + which * stride + i);
  }
};

// The first values of every kernel but bn_stats.
enum { kMean, kScale, kShift, kOwn };

// NaN of any payload becomes the one that narrow_fast() keeps.
template <class A>
CAMKERNELS_INLINE A plain_nan(A value) {
  return value == value ? value : (A)__builtin_nan("");
}

template <class A>
CAMKERNELS_INLINE double at_channel(const void* values, int64_t c, double absent) {
  return values == nullptr ? absent : (double)static_cast<const A*>(values)[c];
}

// gamma rstd.
template <class A>
CAMKERNELS_INLINE double scale_of(const BatchNorm& args, int64_t c) {
  return at_channel<A>(args.gamma, c, 1) * at_channel<A>(args.rstd, c, 1);
}

template <class A>
CAMKERNELS_INLINE void first_values(const BatchNorm& args, int64_t c, A* values) {
  values[kMean] = (A)at_channel<A>(args.mean, c, 0);
  values[kScale] = (A)scale_of<A>(args, c);
  values[kShift] = (A)at_channel<A>(args.beta, c, 0);
}

// gamma zhat + beta from d = z - mean. Exact where mean is large: no product with it is rounded.
template <class A, class Values>
CAMKERNELS_INLINE Vec<A> affine(const Values& values, Vec<A> d, int64_t i) {
  return fused<A>(d, values.get(kScale, i), values.get(kShift, i));
}

// Where 1[u > 0] comes from. A template parameter of the kernels: tests of it inside the loops
// slow them down.
enum Gate { kNoRelu, kRecomputed, kMasked };

static inline Gate gate_of(const BatchNorm& args) {
  return !args.relu ? kNoRelu : args.mask == nullptr ? kRecomputed : kMasked;
}

// 1[u > 0] g of `count` elements from element i of a row on. NaN counts as positive.
template <class A, Gate kGate, class Values>
CAMKERNELS_INLINE Vec<A> gated(const uint8_t* mask, bool guided, const Values& values, Vec<A> g,
                               Vec<A> d, int64_t i, int64_t count) {
  if constexpr (kGate == kNoRelu) return g;
  if (guided) g = g < 0 ? Vec<A>{} : g;
  if constexpr (kGate == kMasked) {
    return lanes_of<A>(load_bits<A>(mask, i, count)) ? g : Vec<A>{};
  }
  return affine<A>(values, d, i) <= 0 ? Vec<A>{} : g;
}

// --- the walk -----------------------------------------------------------------------------------

// A stretch of a row: `length` elements from element `begin` on.
struct Stretch {
  int64_t row, begin, length;
};

static inline Stretch stretch_of(const BatchNorm& args, int64_t task) {
  const int64_t each = args.stretches(), begin = task % each * args.block;
  const int64_t left = args.pixels - begin;
  return {task / each, begin, left < args.block ? left : args.block};
}

// Kernel::values of every channel into scratch, one row per value; to be run by all threads.
template <class A, class Kernel>
static void spread_values(const Kernel& kernel, A* scratch) {
  const int64_t channels = kernel.args.channels, padded = kernel.args.padded();
#pragma omp for schedule(static)
  for (int64_t c = 0; c < padded; ++c) {
    A values[Kernel::kValues] = {};
    if (c < channels) kernel.values(c, values);
    for (int k = 0; k < Kernel::kValues; ++k) scratch[k * padded + c] = plain_nan(values[k]);
  }
}

template <class A, class Kernel>
CAMKERNELS_INLINE PlaneValues<A, Kernel::kValues> plane_values(const Kernel& kernel, int64_t row) {
  A scalars[Kernel::kValues];
  kernel.values(row % kernel.args.channels, scalars);
  PlaneValues<A, Kernel::kValues> values;
  for (int k = 0; k < Kernel::kValues; ++k) values.values[k] = splat(plain_nan(scalars[k]));
  return values;
}

// Kernel::row over everything.
template <class A, class Kernel>
static void map_rows(const Kernel& kernel) {
  const BatchNorm& args = kernel.args;
  const int64_t tasks = args.tasks(), rows = args.rows();
  A* scratch = static_cast<A*>(args.scratch);
#pragma omp parallel num_threads(args.threads) if (args.threads > 1)
  {
    if (args.channels_last) spread_values<A>(kernel, scratch);
#pragma omp for schedule(static) nowait
    for (int64_t task = 0; task < tasks; ++task) {
      if (args.channels_last) {
        const PixelValues<A> values{scratch, args.padded()};
        const int64_t begin = task * args.block;
        const int64_t end = begin + args.block < rows ? begin + args.block : rows;
        for (int64_t row = begin; row < end; ++row) {
          kernel.row(values, Stretch{row, 0, args.channels});
        }
      } else {
        const Stretch stretch = stretch_of(args, task);
        kernel.row(plane_values<A>(kernel, stretch.row), stretch);
      }
    }
    if (args.streaming) stream_fence();
  }
}

// --- reductions ---------------------------------------------------------------------------------

// Kernel::add over one stretch of a plane; two running sums shorten the chains.
template <class A, class Kernel>
static void sum_stretch(const Kernel& kernel, int64_t task, A* partial) {
  constexpr int N = Lanes<A>::count, K = Kernel::kSums;
  const Stretch s = stretch_of(kernel.args, task);
  const auto values = plane_values<A>(kernel, s.row);
  Vec<A> even[K] = {}, odd[K] = {};
  int64_t i = 0;
  for (; i + 2 * N <= s.length; i += 2 * N) {
    kernel.add(Whole{}, values, s.row, s.begin + i, N, even);
    kernel.add(Whole{}, values, s.row, s.begin + i + N, N, odd);
  }
  for (; i < s.length; i += N) {
    const int64_t left = s.length - i;
    if (left >= N) {
      kernel.add(Whole{}, values, s.row, s.begin + i, N, even);
    } else {
      kernel.add(Part{}, values, s.row, s.begin + i, left, odd);
    }
  }
  for (int k = 0; k < K; ++k) partial[k] = sum_lanes<A>(even[k] + odd[k]);
}

// Bytes of pixels that are summed channel by channel, so that the sums stay in registers: half of
// the first-level cache, the other half being what comes next, which is fetched in the order of
// memory meanwhile. Pixel by pixel, each access to a tensor would come with several to sums; pixels
// side by side alone would be read in an order that nothing fetches ahead.
constexpr int64_t kTile = 1 << 14;

static inline int64_t tile_pixels(int64_t bytes_of_pixel) {
  return bytes_of_pixel * 2 > kTile ? 2 : kTile / bytes_of_pixel;
}

// Kernel::add over `count` pixels from pixel `row` on.
template <class A, class Kernel>
CAMKERNELS_INLINE void add_tile(const Kernel& kernel, const PixelValues<A>& values, int64_t row,
                                int64_t count, A* partial) {
  constexpr int K = Kernel::kSums;
  const int64_t end = row + count;
  int64_t ahead = end * kernel.args.channels;
  each_vector<A>(kernel.args.channels, [&](auto kind, int64_t i, int64_t lanes) {
    Vec<A> even[K] = {}, odd[K] = {};
    const auto add = [&](int64_t pixel, Vec<A>* sums) {
      kernel.fetch(ahead);
      ahead += Lanes<A>::count;
      kernel.add(kind, values, pixel, i, lanes, sums);
    };
    int64_t pixel = row;
    for (; pixel + 2 <= end; pixel += 2) {
      add(pixel, even);
      add(pixel + 1, odd);
    }
    if (pixel < end) add(pixel, even);
    for (int k = 0; k < K; ++k) {
      A* target = partial + k * values.stride + i;
      store<A>(target, load<A>(target) + (even[k] + odd[k]));
    }
  });
}

template <class A, class Kernel>
static void sum_pixels(const Kernel& kernel, int64_t task, const PixelValues<A>& values,
                       A* partial) {
  const BatchNorm& args = kernel.args;
  const int64_t rows = args.rows(), begin = task * args.block;
  const int64_t end = begin + args.block < rows ? begin + args.block : rows;
  const int64_t tile = tile_pixels(args.channels * Kernel::kBytes);
  for (int64_t i = 0; i < Kernel::kSums * values.stride; ++i) partial[i] = 0;
  for (int64_t row = begin; row < end; row += tile) {
    add_tile<A>(kernel, values, row, end - row < tile ? end - row : tile, partial);
  }
}

// Sums over all, into args.results, by Kernel::finish from totals in float64.
template <class A, class Kernel>
static void reduce_rows(const Kernel& kernel) {
  constexpr int K = Kernel::kSums;
  const BatchNorm& args = kernel.args;
  const int64_t tasks = args.tasks(), channels = args.channels, padded = args.padded();
  A* scratch = static_cast<A*>(args.scratch);
  A* partial = args.channels_last ? scratch + Kernel::kValues * padded : scratch;
#pragma omp parallel num_threads(args.threads) if (args.threads > 1)
  {
    if (args.channels_last) spread_values<A>(kernel, scratch);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; ++task) {
      if (args.channels_last) {
        sum_pixels<A>(kernel, task, {scratch, padded}, partial + task * K * padded);
      } else {
        sum_stretch<A>(kernel, task, partial + task * K);
      }
    }
    if (args.channels_last) {
#pragma omp for schedule(static) nowait
      for (int64_t c = 0; c < padded; c += 16) {
        double totals[K][16] = {};
        for (int64_t task = 0; task < tasks; ++task) {
          const A* from = partial + task * K * padded + c;
          for (int k = 0; k < K; ++k) {
            for (int j = 0; j < 16; ++j) totals[k][j] += (double)from[k * padded + j];
          }
        }
        for (int64_t j = 0; j < 16 && c + j < channels; ++j) {
          for (int k = 0; k < K; ++k) kernel.finish(k, c + j, totals[k][j]);
        }
      }
    } else {
      const int64_t each = args.stretches();
#pragma omp for schedule(static) nowait
      for (int64_t c = 0; c < channels; ++c) {
        double totals[K] = {};
        for (int64_t b = 0; b < args.batch; ++b) {
          const A* from = partial + (b * channels + c) * each * K;
          for (int64_t i = 0; i < each * K; ++i) totals[i % K] += (double)from[i];
        }
        for (int k = 0; k < K; ++k) kernel.finish(k, c, totals[k]);
      }
    }
  }
}

}  // namespace CAMKERNELS_ISA
}  // namespace camkernels
