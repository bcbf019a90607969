// The instruction set that runs: the widest that was compiled in and that the processor has.
#pragma once

namespace camkernels {

enum SimdLevel : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

// Name of a level, as CAMKERNELS_SIMD spells it.
const char* simd_name(int level);

// The widest level that works here.
int widest_simd_level();

// Level of a name, or -1 for an unknown name.
int simd_level_of(const char* name);

}  // namespace camkernels
