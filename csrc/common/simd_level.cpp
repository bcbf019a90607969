#include "common/simd_level.h"

#include <cstring>

namespace camkernels {

static const char* const kNames[] = {"baseline", "avx2", "avx512"};

const char* simd_name(int level) { return kNames[level]; }

int simd_level_of(const char* name) {
  for (int level = 0; level < 3; ++level) {
    if (std::strcmp(name, kNames[level]) == 0) return level;
  }
  return -1;
}

int widest_simd_level() {
  int level = kBaseline;
#ifdef CAMKERNELS_HAS_AVX2
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    level = kAvx2;
  }
#ifdef CAMKERNELS_HAS_AVX512
  if (level == kAvx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    level = kAvx512;
  }
#endif
#endif
  return level;
}

}  // namespace camkernels
