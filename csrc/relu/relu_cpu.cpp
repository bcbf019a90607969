#include "common/parallel.h"
#include "common/vec.h"
#include "relu/relu.h"

namespace camkernels {
namespace CAMKERNELS_ISA {

// Values are compared as integers of their size: of the signed integers above that of -infinity
// all but 0 are positive numbers or NaN. What is open at NaN keeps NaN visible; denormals are kept
// whatever the processor is told of them, and no 16-bit type needs widening.
template <int kBytes>
struct Word;
template <>
struct Word<2> {
  typedef int16_t type;
  typedef int16_t vector __attribute__((vector_size(CAMKERNELS_VECTOR_BYTES)));
};
template <>
struct Word<4> {
  typedef int32_t type;
  typedef int32_t vector __attribute__((vector_size(CAMKERNELS_VECTOR_BYTES)));
};
template <>
struct Word<8> {
  typedef int64_t type;
  typedef int64_t vector __attribute__((vector_size(CAMKERNELS_VECTOR_BYTES)));
};

template <int kBytes, int64_t kMinusInfinity>
struct Format {
  typedef typename Word<kBytes>::type Int;
  typedef typename Word<kBytes>::vector Ints;
  static constexpr int lanes = CAMKERNELS_VECTOR_BYTES / kBytes;
  static constexpr Int minus_infinity = (Int)kMinusInfinity;
};
typedef Format<4, (int32_t)0xff800000> Float32;
typedef Format<2, (int16_t)0xff80> BFloat16;
typedef Format<2, (int16_t)0xfc00> Float16;
typedef Format<8, (int64_t)0xfff0000000000000> Float64;

// All ones where a value is positive or NaN.
template <class F>
CAMKERNELS_INLINE typename F::Ints open(typename F::Ints value) {
  return (typename F::Ints)((value > F::minus_infinity) & (value != 0));
}

template <class F>
CAMKERNELS_INLINE typename F::Int open_one(typename F::Int value) {
  return value > F::minus_infinity && value != 0 ? (typename F::Int) - 1 : (typename F::Int)0;
}

template <class F>
CAMKERNELS_INLINE typename F::Ints load_ints(const typename F::Int* source) {
  typename F::Ints value;
  __builtin_memcpy(&value, source, sizeof(value));
  return value;
}

template <class F, bool kStreaming>
CAMKERNELS_INLINE void store_ints(typename F::Int* target, typename F::Ints value) {
  if constexpr (kStreaming) {
    stream<float>(reinterpret_cast<float*>(target), bit_cast<Vec<float>>(value));
  } else {
    __builtin_memcpy(target, &value, sizeof(value));
  }
}

// One bit per lane of a vector of zeros and ones, the first lane lowest.
template <class F>
CAMKERNELS_INLINE uint64_t bits_of(typename F::Ints mask) {
#if defined(CAMKERNELS_ISA_AVX512)
  const __m512i m = (__m512i)mask;
  if constexpr (sizeof(typename F::Int) == 2) return _mm512_movepi16_mask(m);
  if constexpr (sizeof(typename F::Int) == 4) return _mm512_movepi32_mask(m);
  if constexpr (sizeof(typename F::Int) == 8) return _mm512_movepi64_mask(m);
#elif defined(CAMKERNELS_ISA_AVX2)
  const __m256i m = (__m256i)mask;
  if constexpr (sizeof(typename F::Int) == 2) {
    const __m128i low = _mm256_castsi256_si128(m), high = _mm256_extracti128_si256(m, 1);
    return (uint32_t)_mm_movemask_epi8(_mm_packs_epi16(low, high));
  }
  if constexpr (sizeof(typename F::Int) == 4) return (uint32_t)_mm256_movemask_ps((__m256)m);
  if constexpr (sizeof(typename F::Int) == 8) return (uint32_t)_mm256_movemask_pd((__m256d)m);
#elif defined(__SSE2__)
  const __m128i m = (__m128i)mask;
  if constexpr (sizeof(typename F::Int) == 2) {
    return (uint32_t)_mm_movemask_epi8(_mm_packs_epi16(m, _mm_setzero_si128()));
  }
  if constexpr (sizeof(typename F::Int) == 4) return (uint32_t)_mm_movemask_ps((__m128)m);
  if constexpr (sizeof(typename F::Int) == 8) return (uint32_t)_mm_movemask_pd((__m128d)m);
#else
  uint64_t bits = 0;
  for (int i = 0; i < F::lanes; ++i) bits |= (uint64_t)(mask[i] & 1) << i;
  return bits;
#endif
}

// The way back: a lane of ones for each bit.
template <class F>
CAMKERNELS_INLINE typename F::Ints lanes_of(uint64_t bits) {
  typedef typename F::Int Int;
  typedef typename F::Ints Ints;
#if defined(CAMKERNELS_ISA_AVX512)
  if constexpr (sizeof(Int) == 2) return (Ints)_mm512_movm_epi16((__mmask32)bits);
  if constexpr (sizeof(Int) == 4) return (Ints)_mm512_movm_epi32((__mmask16)bits);
  if constexpr (sizeof(Int) == 8) return (Ints)_mm512_movm_epi64((__mmask8)bits);
#else
  Ints lane;
  for (int i = 0; i < F::lanes; ++i) lane[i] = (Int)(1 << i);
  return (Ints)((((Int)bits - Ints{}) & lane) != 0);
#endif
}

// Elements of one step: a word of the mask.
constexpr int64_t kStep = 64;

template <class F, bool kMask, bool kStreaming>
static void forward_steps(const ReluForward& args, int64_t begin, int64_t end) {
  typedef typename F::Int Int;
  const Int* input = static_cast<const Int*>(args.input);
  Int* output = static_cast<Int*>(args.output);
  for (int64_t step = begin; step < end; ++step) {
    uint64_t word = 0;
#pragma GCC unroll 4
    for (int i = 0; i < kStep; i += F::lanes) {
      const typename F::Ints value = load_ints<F>(input + step * kStep + i), mask = open<F>(value);
      store_ints<F, kStreaming>(output + step * kStep + i, value & mask);
      if constexpr (kMask) word |= bits_of<F>(mask) << i;
    }
    if constexpr (kMask) __builtin_memcpy(args.mask + step * 8, &word, 8);
  }
  if constexpr (kStreaming) stream_fence();
}

template <class F>
static void forward_rest(const ReluForward& args) {
  typedef typename F::Int Int;
  const Int* input = static_cast<const Int*>(args.input);
  Int* output = static_cast<Int*>(args.output);
  const int64_t begin = args.count / kStep * kStep;
  uint64_t word = 0;
  for (int64_t i = begin; i < args.count; ++i) {
    const Int mask = open_one<F>(input[i]);
    output[i] = input[i] & mask;
    word |= (uint64_t)(mask & 1) << (i - begin);
  }
  if (args.mask == nullptr) return;
  for (int64_t i = begin; i < args.count; i += 8) args.mask[i / 8] = (uint8_t)(word >> (i - begin));
}

template <class F, bool kMask, bool kGuided, bool kStreaming>
static void backward_steps(const ReluBackward& args, int64_t begin, int64_t end) {
  typedef typename F::Int Int;
  const Int* grad = static_cast<const Int*>(args.grad);
  const Int* output = static_cast<const Int*>(args.output);
  Int* grad_input = static_cast<Int*>(args.grad_input);
  for (int64_t step = begin; step < end; ++step) {
    uint64_t word = 0;
    if constexpr (kMask) __builtin_memcpy(&word, args.mask + step * 8, 8);
#pragma GCC unroll 4
    for (int i = 0; i < kStep; i += F::lanes) {
      const int64_t at = step * kStep + i;
      typename F::Ints value = load_ints<F>(grad + at);
      if constexpr (kGuided) value &= open<F>(value);
      if constexpr (kMask) {
        value &= lanes_of<F>(word >> i);
      } else {
        value &= open<F>(load_ints<F>(output + at));
      }
      store_ints<F, kStreaming>(grad_input + at, value);
    }
  }
  if constexpr (kStreaming) stream_fence();
}

template <class F>
static void backward_rest(const ReluBackward& args) {
  typedef typename F::Int Int;
  const Int* grad = static_cast<const Int*>(args.grad);
  const Int* output = static_cast<const Int*>(args.output);
  Int* grad_input = static_cast<Int*>(args.grad_input);
  for (int64_t i = args.count / kStep * kStep; i < args.count; ++i) {
    bool passes = args.mask != nullptr ? args.mask[i / 8] >> (i % 8) & 1 : open_one<F>(output[i]);
    if (args.guided && !open_one<F>(grad[i])) passes = false;
    grad_input[i] = passes ? grad[i] : (Int)0;
  }
}

// steps(begin, end) by all threads, each a range of whole words of the mask.
template <class Steps>
static void split(int64_t count, int threads, const Steps& steps) {
  const int64_t all = count / kStep;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int part = 0; part < threads; ++part) {
    steps(all * part / threads, all * (part + 1) / threads);
  }
}

template <class F, bool kMask, bool kStreaming>
static void forward(const ReluForward& args) {
  split(args.count, args.threads,
        [&](int64_t begin, int64_t end) { forward_steps<F, kMask, kStreaming>(args, begin, end); });
  forward_rest<F>(args);
}

template <class F, bool kMask, bool kGuided>
static void backward(const ReluBackward& args) {
  split(args.count, args.threads, [&](int64_t begin, int64_t end) {
    args.streaming ? backward_steps<F, kMask, kGuided, true>(args, begin, end)
                   : backward_steps<F, kMask, kGuided, false>(args, begin, end);
  });
  backward_rest<F>(args);
}

template <class F>
static void forward_of(const ReluForward& args) {
  if (args.mask != nullptr) {
    args.streaming ? forward<F, true, true>(args) : forward<F, true, false>(args);
  } else {
    args.streaming ? forward<F, false, true>(args) : forward<F, false, false>(args);
  }
}

template <class F>
static void backward_of(const ReluBackward& args) {
  if (args.mask != nullptr) {
    args.guided ? backward<F, true, true>(args) : backward<F, true, false>(args);
  } else {
    args.guided ? backward<F, false, true>(args) : backward<F, false, false>(args);
  }
}

void relu_fwd(const ReluForward& args) {
  switch (args.dtype) {
    case kBFloat16:
      return forward_of<BFloat16>(args);
    case kFloat16:
      return forward_of<Float16>(args);
    case kFloat64:
      return forward_of<Float64>(args);
    default:
      return forward_of<Float32>(args);
  }
}

void relu_bwd(const ReluBackward& args) {
  switch (args.dtype) {
    case kBFloat16:
      return backward_of<BFloat16>(args);
    case kFloat16:
      return backward_of<Float16>(args);
    case kFloat64:
      return backward_of<Float64>(args);
    default:
      return backward_of<Float32>(args);
  }
}

}  // namespace CAMKERNELS_ISA
}  // namespace camkernels
