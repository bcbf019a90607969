#include "common/parallel.h"
#include "common/vec.h"
#include "max_pool/max_pool.h"

namespace camkernels {
namespace CAMKERNELS_ISA {

CAMKERNELS_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
CAMKERNELS_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// --- where windows lie --------------------------------------------------------------------------

CAMKERNELS_INLINE int64_t start(const PoolAxis& axis, int64_t o) {
  return o * axis.stride - axis.padding;
}

// Of the taps of window o, [first_tap, end_tap) are inside.
CAMKERNELS_INLINE int64_t first_tap(const PoolAxis& axis, int64_t o) {
  const int64_t outside = -start(axis, o);
  return outside > 0 ? (outside + axis.dilation - 1) / axis.dilation : 0;
}

CAMKERNELS_INLINE int64_t end_tap(const PoolAxis& axis, int64_t o) {
  const int64_t room = axis.input - 1 - start(axis, o);
  return room >= (axis.kernel - 1) * axis.dilation ? axis.kernel : room / axis.dilation + 1;
}

// The windows that have all their taps inside.
struct Interior {
  int64_t begin, end;
};

static Interior interior_of(const PoolAxis& axis) {
  const int64_t begin = least(axis.output, (axis.padding + axis.stride - 1) / axis.stride);
  const int64_t last = axis.input - 1 + axis.padding - (axis.kernel - 1) * axis.dilation;
  return {begin, last < 0 ? begin : most(begin, least(axis.output, last / axis.stride + 1))};
}

// Pixel i is q stride + r - padding; it is tap t of window q - quotient[t] where r is remainder[t].
struct Taps {
  int64_t quotient[kPoolTaps], remainder[kPoolTaps];
};

static Taps taps_of(const PoolAxis& axis) {
  Taps taps;
  for (int64_t t = 0; t < axis.kernel; ++t) {
    taps.quotient[t] = t * axis.dilation / axis.stride;
    taps.remainder[t] = t * axis.dilation % axis.stride;
  }
  return taps;
}

// --- a run of lanes -----------------------------------------------------------------------------

// `count` elements, a whole vector of them or fewer, kStride (0: `stride`) apart.
template <class A, int kStride, bool kWhole, class T>
CAMKERNELS_INLINE Vec<A> read(const T* source, int64_t stride, int64_t count) {
  constexpr int N = Lanes<A>::count;
  if constexpr (kStride == 1) {
    if constexpr (kWhole) return load<A>(source);
    return load_partial<A>(source, count);
  }
#if defined(__GNUC__) && !defined(__clang__)
  if constexpr (kStride == 2 && kWhole) {
    // The second vector begins one early, so that nothing is read behind the last element.
    Mask<A> lanes;
    for (int i = 0; i < N; ++i) lanes[i] = 2 * i < N ? 2 * i : 2 * i + 1;
    return __builtin_shuffle(load<A>(source), load<A>(source + N - 1), lanes);
  }
#endif
  T buffer[N] = {};
  for (int64_t i = 0; i < (kWhole ? N : count); ++i) buffer[i] = source[i * stride];
  return load<A>(buffer);
}

template <class A, bool kWhole, class T>
CAMKERNELS_INLINE void write(T* target, Vec<A> value, int64_t count) {
  if constexpr (kWhole) {
    store<A>(target, value);
  } else {
    store_partial<A>(target, value, count);
  }
}

template <class A>
struct Bytes {
  typedef uint8_t type __attribute__((vector_size(Lanes<A>::count)));
};

template <class A, bool kWhole>
CAMKERNELS_INLINE Mask<A> read_codes(const uint8_t* source, int64_t count) {
  typename Bytes<A>::type bytes = {};
  if constexpr (kWhole) {
    __builtin_memcpy(&bytes, source, sizeof(bytes));
  } else {
    for (int64_t i = 0; i < count; ++i) bytes[i] = source[i];
  }
  return __builtin_convertvector(bytes, Mask<A>);
}

template <class A, bool kWhole>
CAMKERNELS_INLINE void write_codes(uint8_t* target, Mask<A> codes, int64_t count) {
  const typename Bytes<A>::type bytes = __builtin_convertvector(codes, typename Bytes<A>::type);
  if constexpr (kWhole) {
    __builtin_memcpy(target, &bytes, sizeof(bytes));
  } else {
    for (int64_t i = 0; i < count; ++i) target[i] = bytes[i];
  }
}

struct Whole {
  static constexpr bool value = true;
};
struct Part {
  static constexpr bool value = false;
};

// body(kind, i, count) over [0, length) by vectors. The last one overlaps the one before, so that
// only what is shorter than a vector is a part of one.
template <class A, class Body>
CAMKERNELS_INLINE void each_vector(int64_t length, const Body& body) {
  constexpr int64_t N = Lanes<A>::count;
  if (length < N) {
    if (length > 0) body(Part{}, (int64_t)0, length);
    return;
  }
  for (int64_t i = 0; i < length; i += N) body(Whole{}, least(i, length - N), N);
}

// --- forward ------------------------------------------------------------------------------------

// The taps of a window that are inside, and the distance of neighbours among them.
struct Inside {
  int64_t u_begin, u_end, v_begin, v_end, down, across, width;
};

// Maxima of `count` windows side by side; `input` is where tap (0, 0) of the first one lies. The
// last NaN is the maximum, as in PyTorch; where all is -infinity the first tap stays.
template <class A, int kStride, bool kWhole, class T>
CAMKERNELS_INLINE void maxima(const Inside& taps, const T* input, int64_t stride, int64_t count,
                              T* output, uint8_t* positions) {
  Vec<A> best = splat((A)-__builtin_inf());
  Mask<A> codes = Mask<A>{} + (int)(taps.u_begin * taps.width + taps.v_begin);
  for (int64_t u = taps.u_begin; u < taps.u_end; ++u) {
    for (int64_t v = taps.v_begin; v < taps.v_end; ++v) {
      const T* source = input + u * taps.down + v * taps.across;
      const Vec<A> value = read<A, kStride, kWhole>(source, stride, count);
      const Mask<A> better = (value > best) | (value != value);
      best = better ? value : best;
      codes = better ? Mask<A>{} + (int)(u * taps.width + v) : codes;
    }
  }
  write<A, kWhole>(output, best, count);
  write_codes<A, kWhole>(positions, codes, count);
}

template <class A, int kStride, class T>
static void forward_planes(const MaxPool& args) {
  const PoolAxis &rows = args.rows, &columns = args.columns;
  const Interior interior = interior_of(columns);
  const int64_t lines = args.batch * args.channels * rows.output;
#pragma omp parallel for schedule(static) num_threads(args.threads) if (args.threads > 1)
  for (int64_t line = 0; line < lines; ++line) {
    const int64_t plane = line / rows.output, row = line % rows.output;
    const int64_t top = plane * rows.input + start(rows, row);
    // Where the first window begins, and what the others are counted from.
    const int64_t from = top * columns.input - columns.padding;
    const T* input = static_cast<const T*>(args.input);
    T* output = static_cast<T*>(args.output) + line * columns.output;
    uint8_t* positions = args.positions + line * columns.output;
    Inside taps{
        first_tap(rows, row), end_tap(rows, row), 0, columns.kernel, rows.dilation * columns.input,
        columns.dilation,     columns.kernel};
    each_vector<A>(interior.end - interior.begin, [&](auto kind, int64_t i, int64_t count) {
      const int64_t column = interior.begin + i;
      maxima<A, kStride, decltype(kind)::value>(taps, input + from + column * columns.stride,
                                                columns.stride, count, output + column,
                                                positions + column);
    });
    for (int64_t column = 0; column < columns.output; ++column) {
      if (column == interior.begin) column = interior.end;
      if (column >= columns.output) break;
      taps.v_begin = first_tap(columns, column), taps.v_end = end_tap(columns, column);
      maxima<A, 1, false>(taps, input + from + column * columns.stride, 1, 1, output + column,
                          positions + column);
    }
  }
}

template <class A, class T>
static void forward_channels(const MaxPool& args) {
  const PoolAxis &rows = args.rows, &columns = args.columns;
  const int64_t lines = args.batch * rows.output, channels = args.channels;
#pragma omp parallel for schedule(static) num_threads(args.threads) if (args.threads > 1)
  for (int64_t line = 0; line < lines; ++line) {
    const int64_t sample = line / rows.output, row = line % rows.output;
    const int64_t top = sample * rows.input + start(rows, row);
    Inside taps{first_tap(rows, row),
                end_tap(rows, row),
                0,
                0,
                rows.dilation * columns.input * channels,
                columns.dilation * channels,
                columns.kernel};
    for (int64_t column = 0; column < columns.output; ++column) {
      taps.v_begin = first_tap(columns, column), taps.v_end = end_tap(columns, column);
      const int64_t from = (top * columns.input + start(columns, column)) * channels;
      const int64_t at = (line * columns.output + column) * channels;
      each_vector<A>(channels, [&](auto kind, int64_t c, int64_t count) {
        maxima<A, 1, decltype(kind)::value>(taps, static_cast<const T*>(args.input) + from + c, 1,
                                            count, static_cast<T*>(args.output) + at + c,
                                            args.positions + at + c);
      });
    }
  }
}

// --- gather: values are moved, none is computed -------------------------------------------------

// Offsets of the taps from where a window begins; `pixel` is the distance of neighbouring columns.
struct Offsets {
  int64_t of[kPoolTaps];
};

static Offsets offsets_of(const MaxPool& args, int64_t pixel) {
  const PoolAxis &rows = args.rows, &columns = args.columns;
  Offsets offsets = {};
  for (int64_t u = 0; u < rows.kernel; ++u) {
    for (int64_t v = 0; v < columns.kernel; ++v) {
      offsets.of[u * columns.kernel + v] =
          (u * rows.dilation * columns.input + v * columns.dilation) * pixel;
    }
  }
  return offsets;
}

// W is an integer as wide as an element.
template <class W>
static void gather_words(const MaxPool& args) {
  const PoolAxis &rows = args.rows, &columns = args.columns;
  const int64_t planes = args.channels_last ? args.batch : args.batch * args.channels;
  const int64_t pixel = args.channels_last ? args.channels : 1;
  const Offsets offsets = offsets_of(args, pixel);
  const int64_t lines = planes * rows.output;
#pragma omp parallel for schedule(static) num_threads(args.threads) if (args.threads > 1)
  for (int64_t line = 0; line < lines; ++line) {
    const int64_t plane = line / rows.output, row = line % rows.output;
    const int64_t top = plane * rows.input + start(rows, row);
    const W* input = static_cast<const W*>(args.input);
    const uint8_t* positions = args.positions + line * columns.output * pixel;
    W* output = static_cast<W*>(args.output) + line * columns.output * pixel;
    for (int64_t column = 0; column < columns.output; ++column) {
      const int64_t from = (top * columns.input + start(columns, column)) * pixel;
      for (int64_t c = 0, at = column * pixel; c < pixel; ++c, ++at) {
        output[at] = input[from + c + offsets.of[positions[at]]];
      }
    }
  }
}

// --- scatter ------------------------------------------------------------------------------------

// One plane into its sums. Planes are whole tasks, so that sums have one order.
template <class A, class T>
static void add_plane(const MaxPool& args, const Offsets& offsets, const T* grad,
                      const uint8_t* positions, A* sums) {
  const PoolAxis &rows = args.rows, &columns = args.columns;
  for (int64_t i = 0; i < rows.input * columns.input; ++i) sums[i] = 0;
  for (int64_t row = 0; row < rows.output; ++row) {
    const int64_t top = start(rows, row) * columns.input;
    for (int64_t column = 0, at = row * columns.output; column < columns.output; ++column, ++at) {
      sums[top + start(columns, column) + offsets.of[positions[at]]] += element<A>(grad + at);
    }
  }
}

template <class A, class T>
static void scatter_planes(const MaxPool& args) {
  const int64_t pixels = args.rows.input * args.columns.input;
  const int64_t pooled = args.rows.output * args.columns.output;
  const int64_t planes = args.batch * args.channels;
  const Offsets offsets = offsets_of(args, 1);
#pragma omp parallel for schedule(static) num_threads(args.threads) if (args.threads > 1)
  for (int64_t plane = 0; plane < planes; ++plane) {
    const T* grad = static_cast<const T*>(args.input) + plane * pooled;
    const uint8_t* positions = args.positions + plane * pooled;
    T* output = static_cast<T*>(args.output) + plane * pixels;
    if constexpr (sizeof(T) == sizeof(A)) {
      add_plane<A>(args, offsets, grad, positions, output);
    } else {
      A* sums = args.scratch + thread_index() * pixels;
      add_plane<A>(args, offsets, grad, positions, sums);
      each_vector<A>(pixels, [&](auto kind, int64_t i, int64_t count) {
        constexpr bool kWhole = decltype(kind)::value;
        write<A, kWhole>(output + i, read<A, 1, kWhole>(sums + i, 1, count), count);
      });
    }
  }
}

// The windows that cover a pixel: where they are, and which of their taps it is.
struct Covering {
  int64_t at[kPoolTaps];
  int code[kPoolTaps];
  int count;
};

// Of one pixel `count` channels: a sum over the windows whose maximum it is.
template <class A, bool kWhole, class T>
CAMKERNELS_INLINE void sum_windows(const Covering& windows, const T* grad, const uint8_t* positions,
                                   int64_t count, T* output) {
  Vec<A> sum = {};
  for (int i = 0; i < windows.count; ++i) {
    const int64_t at = windows.at[i];
    const Mask<A> chosen = read_codes<A, kWhole>(positions + at, count) == windows.code[i];
    sum += chosen ? read<A, 1, kWhole>(grad + at, 1, count) : Vec<A>{};
  }
  write<A, kWhole>(output, sum, count);
}

template <class A, class T>
static void scatter_channels(const MaxPool& args) {
  const PoolAxis &rows = args.rows, &columns = args.columns;
  const int64_t lines = args.batch * rows.input, channels = args.channels;
  const Taps row_taps = taps_of(rows), column_taps = taps_of(columns);
#pragma omp parallel for schedule(static) num_threads(args.threads) if (args.threads > 1)
  for (int64_t line = 0; line < lines; ++line) {
    const int64_t sample = line / rows.input, row = line % rows.input;
    const int64_t row_q = (row + rows.padding) / rows.stride;
    const int64_t row_r = (row + rows.padding) % rows.stride;
    int64_t q = columns.padding / columns.stride, r = columns.padding % columns.stride;
    Covering windows;
    for (int64_t column = 0; column < columns.input; ++column) {
      windows.count = 0;
      for (int64_t u = 0; u < rows.kernel; ++u) {
        const int64_t y = row_q - row_taps.quotient[u];
        if (row_taps.remainder[u] != row_r || y < 0 || y >= rows.output) continue;
        for (int64_t v = 0; v < columns.kernel; ++v) {
          const int64_t x = q - column_taps.quotient[v];
          if (column_taps.remainder[v] != r || x < 0 || x >= columns.output) continue;
          windows.at[windows.count] = ((sample * rows.output + y) * columns.output + x) * channels;
          windows.code[windows.count++] = (int)(u * columns.kernel + v);
        }
      }
      T* output = static_cast<T*>(args.output) + (line * columns.input + column) * channels;
      each_vector<A>(channels, [&](auto kind, int64_t c, int64_t count) {
        sum_windows<A, decltype(kind)::value>(windows, static_cast<const T*>(args.input) + c,
                                              args.positions + c, count, output + c);
      });
      if (++r == columns.stride) r = 0, ++q;
    }
  }
}

// --- what runs ----------------------------------------------------------------------------------

template <class A, class T>
static void forward(const MaxPool& args) {
  if (args.channels_last) return forward_channels<A, T>(args);
  if (args.columns.stride == 1) return forward_planes<A, 1, T>(args);
  if (args.columns.stride == 2) return forward_planes<A, 2, T>(args);
  forward_planes<A, 0, T>(args);
}

template <class A, class T>
static void scatter(const MaxPool& args) {
  args.channels_last ? scatter_channels<A, T>(args) : scatter_planes<A, T>(args);
}

void max_pool_fwd(const MaxPool& args) {
  if (args.dtype == kFloat64) return forward<double, double>(args);
  CAMKERNELS_SWITCH(float, args.dtype, forward<float, T>(args));
}

void max_pool_gather(const MaxPool& args) {
  if (args.dtype == kFloat64) return gather_words<uint64_t>(args);
  if (args.dtype == kFloat32) return gather_words<uint32_t>(args);
  gather_words<uint16_t>(args);
}

void max_pool_scatter(const MaxPool& args) {
  if (args.dtype == kFloat64) return scatter<double, double>(args);
  CAMKERNELS_SWITCH(float, args.dtype, scatter<float, T>(args));
}

}  // namespace CAMKERNELS_ISA
}  // namespace camkernels
