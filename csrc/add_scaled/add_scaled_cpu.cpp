#include "add_scaled/add_scaled.h"
#include "common/vec.h"

namespace camkernels {
namespace CAMKERNELS_ISA {

template <class T>
static void row_sum(const T* value, const T* other, float scale, float* out, int64_t length) {
  constexpr int N = Lanes<float>::count;
  int64_t i = 0;
  for (; i + N <= length; i += N) {
    Vec<float> sum = scale * load<float>(other + i);
    if (value != nullptr) sum += load<float>(value + i);
    store<float>(out + i, sum);
  }
  if (i < length) {
    Vec<float> sum = scale * load_partial<float>(other + i, length - i);
    if (value != nullptr) sum += load_partial<float>(value + i, length - i);
    store_partial<float>(out + i, sum, length - i);
  }
}

template <class T>
static void all_rows(const AddScaled& args) {
  const T *value = static_cast<const T*>(args.value), *other = static_cast<const T*>(args.other);
#pragma omp parallel for schedule(static) num_threads(args.threads) if (args.threads > 1)
  for (int64_t row = 0; row < args.rows; ++row) {
    const int64_t at = row * args.length;
    const float scale = args.scale == nullptr ? 1.0f : args.scale[row];
    row_sum<T>(value == nullptr ? nullptr : value + at, other + at, scale, args.out + at,
               args.length);
  }
}

void add_scaled(const AddScaled& args) {
  args.dtype == kBFloat16 ? all_rows<bfloat16>(args) : all_rows<float16>(args);
}

}  // namespace CAMKERNELS_ISA
}  // namespace camkernels
