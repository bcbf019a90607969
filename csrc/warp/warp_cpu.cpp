#include "common/parallel.h"
#include "common/rows.h"
#include "warp/warp.h"

namespace camkernels {
namespace CAMKERNELS_ISA {

// out[0, count) = or += weight source, a row of any stride.
template <class A, class T>
static void take_row(const T* row, int64_t stride, A weight, bool first, int64_t count, A* out) {
  constexpr int N = Lanes<A>::count;
  int64_t j = 0;
  if (stride == 1) {
    for (; j + N <= count; j += N) {
      const Vec<A> value = weight * load<A>(row + j);
      store<A>(out + j, first ? value : load<A>(out + j) + value);
    }
  }
  for (; j < count; ++j) {
    const A value = weight * element<A>(row + j * stride);
    out[j] = first ? value : out[j] + value;
  }
}

template <class A, class T>
static const T* plane_of(const View& view, int64_t b, int64_t c) {
  return static_cast<const T*>(view.data) + b * view.stride_b + c * view.stride_k;
}

template <class A, class T>
static void forward(const WarpArguments& args) {
  const Warp& warp = args.warp;
  const int64_t height = warp.rows.size, width = warp.columns.size;
#pragma omp parallel for schedule(static) num_threads(args.threads) if (args.threads > 1)
  for (int64_t plane = 0; plane < args.batch * args.channels; ++plane) {
    const int64_t b = plane / args.channels;
    T* out = static_cast<T*>(args.output) + plane * height * width;
    if (!box_is_valid(warp, b)) {
      fill_row((A)__builtin_nan(""), height * width, out);
      continue;
    }
    char* memory = args.scratch + thread_index() * args.scratch_bytes;
    const ColumnTaps<A> columns(warp, b, memory);
    A* mixed = reinterpret_cast<A*>(memory + ColumnTaps<A>::scratch(width));
    A* made = mixed + warp.columns.source;
    const T* source = plane_of<A, T>(args.input, b, plane % args.channels);
    const int64_t first = columns.first, count = columns.last - columns.first + 1;
    for (int64_t i = 0; i < height; ++i) {
      const Taps<A> taps = row_taps<A>(warp, b, i);
      for (int k = 0; k < taps.count; ++k) {
        const T* row = source + taps.index[k] * args.input.stride_h + first * args.input.stride_w;
        take_row<A, T>(row, args.input.stride_w, taps.weight[k], k == 0, count, mixed + first);
      }
      columns.gather(mixed, made);
      write_row(made, width, out + i * width);
    }
  }
}

template <class A, class T>
static void backward(const WarpArguments& args) {
  const Warp& warp = args.warp;
  const int64_t height = warp.rows.size, width = warp.columns.size;
  const int64_t pixels = warp.rows.source * warp.columns.source;
#pragma omp parallel for schedule(static) num_threads(args.threads) if (args.threads > 1)
  for (int64_t plane = 0; plane < args.batch * args.channels; ++plane) {
    const int64_t b = plane / args.channels;
    T* out = static_cast<T*>(args.output) + plane * pixels;
    if (!box_is_valid(warp, b)) {
      fill_row((A)__builtin_nan(""), pixels, out);
      continue;
    }
    char* memory = args.scratch + thread_index() * args.scratch_bytes;
    const ColumnTaps<A> columns(warp, b, memory);
    A* mixed = reinterpret_cast<A*>(memory + ColumnTaps<A>::scratch(width));
    A* row = mixed + warp.columns.source;
    A* sums = row + width;
    for (int64_t p = 0; p < pixels; ++p) sums[p] = 0;
    const T* grad = plane_of<A, T>(args.input, b, plane % args.channels);
    const int64_t first = columns.first, count = columns.last - columns.first + 1;
    for (int64_t i = 0; i < height; ++i) {
      read_row(grad + i * args.input.stride_h, args.input.stride_w, width, row);
      for (int64_t j = 0; j < count; ++j) mixed[first + j] = 0;
      columns.scatter(row, mixed);
      const Taps<A> taps = row_taps<A>(warp, b, i);
      for (int k = 0; k < taps.count; ++k) {
        add_row(mixed + first, taps.weight[k], count,
                sums + taps.index[k] * warp.columns.source + first);
      }
    }
    write_row(sums, pixels, out);
  }
}

void warp_fwd(const WarpArguments& args) {
  if (args.input.dtype == kFloat64) {
    forward<double, double>(args);
  } else {
    CAMKERNELS_SWITCH(float, args.input.dtype, forward<float, T>(args));
  }
}

void warp_bwd(const WarpArguments& args) {
  if (args.input.dtype == kFloat64) {
    backward<double, double>(args);
  } else {
    CAMKERNELS_SWITCH(float, args.input.dtype, backward<float, T>(args));
  }
}

}  // namespace CAMKERNELS_ISA
}  // namespace camkernels
