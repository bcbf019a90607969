#include "common/parallel.h"
#include "common/rows.h"
#include "warp/stretched.h"
#include "warped_ssim/warped_ssim.h"

namespace camkernels {
namespace CAMKERNELS_ISA {

// The cotangent of a map, from that of the enlarged one.
template <class A>
static void write(const Stretched<A>& map, A* out) {
  const int64_t height = map.warp.rows.source, width = map.warp.columns.source;
  for (int64_t p = 0; p < height * width; ++p) out[p] = 0;
  for (int64_t i = 0; i < height; ++i) map.write_row(i, out + i * width);
}

template <class A>
static A* at_sample(void* data, int64_t b, const Warp& warp) {
  return data == nullptr ? nullptr
                         : static_cast<A*>(data) + b * warp.rows.source * warp.columns.source;
}

template <class A>
static void run(const WarpedSsimArguments& args) {
  const int64_t height = args.warp.rows.size, width = args.warp.columns.size;
  const SsimPlan<A> plan(args.window, height, width);
  const bool backward = args.grad != nullptr;
  const double count = (double)plan.windows_y * (double)plan.windows_x;
#pragma omp parallel for schedule(static) num_threads(args.threads) if (args.threads > 1)
  for (int64_t b = 0; b < args.batch; ++b) {
    A* to_maps = at_sample<A>(args.grad_maps, b, args.warp);
    A* to_others = at_sample<A>(args.grad_others, b, args.whole);
    if (!box_is_valid(args.warp, b)) {
      const A nan = (A)__builtin_nan("");
      const Warp &warp = args.warp, &whole = args.whole;
      if (!backward) static_cast<A*>(args.values)[b] = nan;
      if (to_maps) fill_row(nan, warp.rows.source * warp.columns.source, to_maps);
      if (to_others) fill_row(nan, whole.rows.source * whole.columns.source, to_others);
      continue;
    }
    char* memory = args.scratch + thread_index() * args.scratch_bytes;
    const int64_t taps = ColumnTaps<A>::scratch(width);
    A* numbers = reinterpret_cast<A*>(memory + 2 * taps);
    Stretched<A> u(args.warp, b, memory, numbers);
    numbers += Stretched<A>::elements(args.warp);
    Stretched<A> v(args.whole, 0, memory + taps, numbers);
    numbers += Stretched<A>::elements(args.whole);
    u.read(args.maps, b);
    v.read(args.others, b);
    const SsimScratch<A> scratch(plan, args.window, backward, numbers);
    const A scale = backward ? (A)((double)static_cast<const A*>(args.grad)[b] / count) : (A)0;
    const double sum = sweep<A>(
        plan, args.window, scratch, backward, scale,
        [&](int64_t r, A* x, A* y) {
          u.row(r, x);
          v.row(r, y);
        },
        [&](int64_t r, const A* to_x, const A* to_y) {
          if (to_maps != nullptr) u.add(r, to_x);
          if (to_others != nullptr) v.add(r, to_y);
        });
    if (!backward) static_cast<A*>(args.values)[b] = (A)(sum / count);
    if (to_maps != nullptr) write(u, to_maps);
    if (to_others != nullptr) write(v, to_others);
  }
}

void warped_ssim(const WarpedSsimArguments& args) {
  args.maps.dtype == kFloat64 ? run<double>(args) : run<float>(args);
}

}  // namespace CAMKERNELS_ISA
}  // namespace camkernels
