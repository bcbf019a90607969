#include "common/parallel.h"
#include "common/rows.h"
#include "ssim/ssim.h"

namespace camkernels {
namespace CAMKERNELS_ISA {

template <class A>
static void read(const View& view, int64_t b, int64_t c, int64_t r, int64_t width, A* out) {
  CAMKERNELS_SWITCH(A, view.dtype, {
    const T* plane = static_cast<const T*>(view.data) + b * view.stride_b + c * view.stride_k;
    read_row(plane + r * view.stride_h, view.stride_w, width, out);
  });
}

template <class A>
static void write(const A* row, int64_t count, int dtype, int64_t offset, void* out) {
  if (out == nullptr) return;
  CAMKERNELS_SWITCH(A, dtype, write_row(row, count, static_cast<T*>(out) + offset));
}

template <class A>
static void run(const SsimArguments& args) {
  const Sizes& sizes = args.sizes;
  const SsimPlan<A> plan(args.window, sizes.height, sizes.width);
  const bool backward = args.grad != nullptr;
  const double count = (double)plan.windows_y * (double)plan.windows_x * (double)sizes.channels;
#pragma omp parallel for schedule(static) num_threads(args.threads) if (args.threads > 1)
  for (int64_t plane = 0; plane < sizes.batch * sizes.channels; ++plane) {
    const int64_t b = plane / sizes.channels, c = plane % sizes.channels;
    A* memory = static_cast<A*>(args.scratch) + thread_index() * args.scratch_elements;
    const SsimScratch<A> scratch(plan, args.window, backward, memory);
    const A scale = backward ? (A)((double)static_cast<const A*>(args.grad)[b] / count) : (A)0;
    const double sum = sweep<A>(
        plan, args.window, scratch, backward, scale,
        [&](int64_t r, A* x, A* y) {
          read<A>(args.x, b, c, r, sizes.width, x);
          read<A>(args.y, b, c, r, sizes.width, y);
        },
        [&](int64_t r, const A* to_x, const A* to_y) {
          const int64_t offset = (plane * sizes.height + r) * sizes.width;
          write<A>(to_x, sizes.width, args.x.dtype, offset, args.grad_x);
          write<A>(to_y, sizes.width, args.y.dtype, offset, args.grad_y);
        });
    if (!backward) args.sums[plane] = sum;
  }
  if (backward) return;
  for (int64_t b = 0; b < sizes.batch; ++b) {
    double total = 0;
    for (int64_t c = 0; c < sizes.channels; ++c) total += args.sums[b * sizes.channels + c];
    static_cast<A*>(args.values)[b] = (A)(total / count);
  }
}

void ssim(const SsimArguments& args) {
  args.x.dtype == kFloat64 ? run<double>(args) : run<float>(args);
}

}  // namespace CAMKERNELS_ISA
}  // namespace camkernels
