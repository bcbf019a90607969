#include "common/parallel.h"
#include "map_statistics/map_statistics.h"
#include "map_statistics/statistics_loops.h"

namespace camkernels {
namespace CAMKERNELS_ISA {

// One map, contiguous, in the type of the sums; negative values to 0 where `clamp`.
template <class A, class T>
static void gather_map(const Sizes& sizes, const View& view, int64_t b, bool clamp, A* out) {
  constexpr int N = Lanes<A>::count;
  const T* map = static_cast<const T*>(view.data) + b * view.stride_b;
  for (int64_t i = 0; i < sizes.height; ++i) {
    const T* row = map + i * view.stride_h;
    A* to = out + i * sizes.width;
    int64_t j = 0;
    if (view.stride_w == 1) {
      for (; j + N <= sizes.width; j += N) store<A>(to + j, load<A>(row + j));
    }
    for (; j < sizes.width; ++j) to[j] = element<A>(row + j * view.stride_w);
  }
  if (!clamp) return;
  for (int64_t p = 0; p < sizes.pixels(); ++p) out[p] = out[p] < 0 ? (A)0 : out[p];
}

template <class A>
static void forward(const StatisticsForward& args) {
  const int64_t pixels = args.sizes.pixels();
#pragma omp parallel for schedule(static) num_threads(args.threads) if (args.threads > 1)
  for (int64_t b = 0; b < args.sizes.batch; ++b) {
    A* map = static_cast<A*>(args.scratch) + thread_index() * pixels;
    CAMKERNELS_SWITCH(A, args.maps.dtype,
                      gather_map<A, T>(args.sizes, args.maps, b, args.clamp, map));
    statistics_of(map, args.sizes.height, args.sizes.width, b, args.statistics);
  }
}

template <class A, class T>
static void write_map(const A* map, const A* gradient, bool clamp, int64_t pixels, T* out) {
  constexpr int N = Lanes<A>::count;
  for (int64_t p = 0; p < pixels; p += N) {
    const int64_t n = pixels - p < N ? pixels - p : N;
    Vec<A> value = load_partial<A>(gradient + p, n);
    if (clamp) value = load_partial<A>(map + p, n) <= 0 ? Vec<A>{} : value;
    store_partial<A>(out + p, value, n);
  }
}

template <class A>
static void backward(const StatisticsBackward& args) {
  const int64_t pixels = args.sizes.pixels();
#pragma omp parallel for schedule(static) num_threads(args.threads) if (args.threads > 1)
  for (int64_t b = 0; b < args.sizes.batch; ++b) {
    A* map = static_cast<A*>(args.scratch) + 2 * thread_index() * pixels;
    A* gradient = map + pixels;
    CAMKERNELS_SWITCH(A, args.maps.dtype,
                      gather_map<A, T>(args.sizes, args.maps, b, args.clamp, map));
    statistics_gradient(map, args.sizes.height, args.sizes.width, b, args.statistics, args.grads,
                        false, gradient);
    CAMKERNELS_SWITCH(A, args.maps.dtype,
                      write_map<A, T>(map, gradient, args.clamp, pixels,
                                      static_cast<T*>(args.grad_maps) + b * pixels));
  }
}

void map_statistics_fwd(const StatisticsForward& args) {
  args.maps.dtype == kFloat64 ? forward<double>(args) : forward<float>(args);
}

void map_statistics_bwd(const StatisticsBackward& args) {
  args.maps.dtype == kFloat64 ? backward<double>(args) : backward<float>(args);
}

}  // namespace CAMKERNELS_ISA
}  // namespace camkernels
