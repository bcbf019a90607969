#include "batch_norm_relu/batch_norm_relu.h"
#include "batch_norm_relu/rows.h"

namespace camkernels {
namespace CAMKERNELS_ISA {

template <class T>
static CAMKERNELS_INLINE const T* of(const void* tensor, int64_t offset) {
  return tensor == nullptr ? nullptr : static_cast<const T*>(tensor) + offset;
}

template <class T>
static CAMKERNELS_INLINE T* of(void* tensor, int64_t offset) {
  return tensor == nullptr ? nullptr : static_cast<T*>(tensor) + offset;
}

// Row of a mask; null stays null.
static CAMKERNELS_INLINE const uint8_t* mask_of(const BatchNorm& args, int64_t row) {
  return args.mask == nullptr ? nullptr : args.mask + row * args.mask_row();
}

template <class A, class T>
struct Forward {
  static constexpr int kValues = kOwn;
  const BatchNorm& args;

  void values(int64_t c, A* values) const { first_values<A>(args, c, values); }

  template <class Values>
  CAMKERNELS_INLINE void row(const Values& values, const Stretch& s) const {
    const int64_t offset = s.row * args.row_length() + s.begin;
    const T *z = of<T>(args.z, offset), *residual = of<T>(args.residual, offset);
    T* out = of<T>(args.out, offset);
    uint8_t* bits =
        args.out_mask == nullptr ? nullptr : args.out_mask + s.row * args.mask_row() + s.begin / 8;
    const bool relu = args.relu, streaming = args.streaming;
    each_vector<A>(s.length, [&](auto kind, int64_t i, int64_t count) {
      Vec<A> u = affine<A>(values, read<A>(kind, z + i, count) - values.get(kMean, i), i);
      if (residual != nullptr) u += read<A>(kind, residual + i, count);
      const Mask<A> closed = u <= 0;
      if (bits != nullptr) store_bits<A>(bits, i, count, bits_of<A>(~closed));
      if (relu) u = closed ? Vec<A>{} : u;
      write<A>(kind, out + i, u, count, streaming);
    });
  }
};

template <class A, class T, Gate kGate>
struct BackwardSums {
  static constexpr int kValues = kOwn, kSums = 2, kBytes = 2 * sizeof(T);
  const BatchNorm& args;

  void values(int64_t c, A* values) const { first_values<A>(args, c, values); }

  CAMKERNELS_INLINE void fetch(int64_t offset) const {
    __builtin_prefetch(static_cast<const T*>(args.z) + offset);
    __builtin_prefetch(static_cast<const T*>(args.grad) + offset);
  }

  template <class Kind, class Values>
  CAMKERNELS_INLINE void add(Kind kind, const Values& values, int64_t row, int64_t i, int64_t count,
                             Vec<A>* sums) const {
    const int64_t offset = row * args.row_length() + i;
    const Vec<A> d = read<A>(kind, of<T>(args.z, offset), count) - values.get(kMean, i);
    Vec<A> g = read<A>(kind, of<T>(args.grad, offset), count);
    g = gated<A, kGate>(mask_of(args, row), args.guided, values, g, d, i, count);
    sums[0] += g;
    sums[1] += g * d;
  }

  void finish(int k, int64_t c, double total) const {
    const double factor = k == 0 ? 1 : at_channel<A>(args.rstd, c, 1);
    static_cast<A*>(args.results)[k * args.channels + c] = (A)(total * factor);
  }
};

template <class A, class T, Gate kGate>
struct Backward {
  enum { kLevel = kOwn, kSlope, kFactor, kValues };
  const BatchNorm& args;

  // g' = g_u - level - slope (z - mean)
  void values(int64_t c, A* values) const {
    first_values<A>(args, c, values);
    const A* sums = static_cast<const A*>(args.sums);
    values[kLevel] = (A)(sums[c] * args.inv_count);
    values[kSlope] = (A)(sums[args.channels + c] * args.inv_count * at_channel<A>(args.rstd, c, 1));
    values[kFactor] = args.scaled ? values[kScale] : (A)1;
  }

  template <class Values>
  CAMKERNELS_INLINE void row(const Values& values, const Stretch& s) const {
    const int64_t offset = s.row * args.row_length() + s.begin;
    const T* z = of<T>(args.z, offset);
    const T* grad = of<T>(args.grad, offset);  // may be one of the results
    const T* addend = of<T>(args.addend, offset);
    T *out = of<T>(args.out, offset), *to_residual = of<T>(args.second_out, offset);
    const uint8_t* mask = mask_of(args, s.row);
    const bool streaming = args.streaming, scaled = args.scaled, guided = args.guided;
    each_vector<A>(s.length, [&](auto kind, int64_t i, int64_t count) {
      const Vec<A> d = read<A>(kind, z + i, count) - values.get(kMean, i);
      Vec<A> g = read<A>(kind, grad + i, count);
      g = gated<A, kGate>(mask, guided, values, g, d, s.begin + i, count);
      if (to_residual != nullptr) {
        write<A>(kind, to_residual + i, g, count, streaming && to_residual != grad);
      }
      g -= values.get(kLevel, i) + values.get(kSlope, i) * d;
      if (scaled) g *= values.get(kFactor, i);
      if (addend != nullptr) g += read<A>(kind, addend + i, count);
      write<A>(kind, out + i, g, count, streaming && out != grad);
    });
  }
};

template <class A, class T>
struct SecondSums {
  static constexpr int kValues = 1, kSums = 3, kBytes = 3 * sizeof(T);
  const BatchNorm& args;

  void values(int64_t c, A* values) const { values[kMean] = (A)at_channel<A>(args.mean, c, 0); }

  CAMKERNELS_INLINE void fetch(int64_t offset) const {
    __builtin_prefetch(static_cast<const T*>(args.grad_grad) + offset);
    __builtin_prefetch(static_cast<const T*>(args.z) + offset);
    __builtin_prefetch(static_cast<const T*>(args.grad_prime) + offset);
  }

  template <class Kind, class Values>
  CAMKERNELS_INLINE void add(Kind kind, const Values& values, int64_t row, int64_t i, int64_t count,
                             Vec<A>* sums) const {
    const int64_t offset = row * args.row_length() + i;
    const Vec<A> h = read<A>(kind, of<T>(args.grad_grad, offset), count);
    sums[0] += h;
    sums[1] += h * (read<A>(kind, of<T>(args.z, offset), count) - values.get(kMean, i));
    sums[2] += h * read<A>(kind, of<T>(args.grad_prime, offset), count);
  }

  void finish(int k, int64_t c, double total) const {
    const double factor = k == 1 ? at_channel<A>(args.rstd, c, 1) : 1;
    static_cast<A*>(args.results)[k * args.channels + c] = (A)(total * factor);
  }
};

template <class A, class T, Gate kGate>
struct Second {
  enum { kLevel = kOwn, kSlope, kConstant, kLinear, kToPrime, kOfPrime, kOfZ, kValues };
  const BatchNorm& args;

  // h'     = h - level - slope d,  d = z - mean
  // of g:    1[u > 0] (scale h' + h_s + linear d + constant)
  // of z:    to_prime h' + of_prime g' + of_z d
  void values(int64_t c, A* values) const {
    first_values<A>(args, c, values);
    const A* grad_sums = static_cast<const A*>(args.grad_sums);
    const int64_t channels = args.channels;
    const double rstd = at_channel<A>(args.rstd, c, 1), inv = args.inv_count;
    const double c_gamma = at_channel<A>(args.c_gamma, c, 0) * rstd;
    const double factor = -scale_of<A>(args, c) * rstd * inv;
    values[kLevel] = (A)(grad_sums[c] * inv);
    values[kSlope] = (A)(grad_sums[channels + c] * inv * rstd);
    values[kConstant] = (A)at_channel<A>(args.c_beta, c, 0);
    values[kLinear] = (A)c_gamma;
    values[kToPrime] = (A)(factor * static_cast<const A*>(args.sums)[channels + c]);
    values[kOfPrime] = (A)(factor * grad_sums[channels + c] + c_gamma);
    values[kOfZ] = (A)(factor * grad_sums[2 * channels + c] * rstd);
  }

  template <class Values>
  CAMKERNELS_INLINE void row(const Values& values, const Stretch& s) const {
    const int64_t offset = s.row * args.row_length() + s.begin;
    const T* z = of<T>(args.z, offset);
    const T* prime = of<T>(args.grad_prime, offset);     // may be to_z
    const T* grad_grad = of<T>(args.grad_grad, offset);  // may be to_grad
    const T* to_residual = of<T>(args.grad_grad_residual, offset);
    T *to_grad = of<T>(args.out, offset), *to_z = of<T>(args.second_out, offset);
    const uint8_t* mask = mask_of(args, s.row);
    const bool streaming = args.streaming,
               extra = args.c_gamma != nullptr || args.c_beta != nullptr;
    each_vector<A>(s.length, [&](auto kind, int64_t i, int64_t count) {
      const Vec<A> d = read<A>(kind, z + i, count) - values.get(kMean, i);
      const Vec<A> g = read<A>(kind, prime + i, count);
      Vec<A> h = read<A>(kind, grad_grad + i, count);
      h -= values.get(kLevel, i) + values.get(kSlope, i) * d;
      Vec<A> first = values.get(kScale, i) * h;
      if (to_residual != nullptr) first += read<A>(kind, to_residual + i, count);
      if (extra) first += values.get(kLinear, i) * d + values.get(kConstant, i);
      first = gated<A, kGate>(mask, false, values, first, d, s.begin + i, count);
      const Vec<A> second =
          values.get(kToPrime, i) * h + values.get(kOfPrime, i) * g + values.get(kOfZ, i) * d;
      write<A>(kind, to_grad + i, first, count, streaming && to_grad != grad_grad);
      write<A>(kind, to_z + i, second, count, streaming && to_z != prime);
    });
  }
};

// Runs `statement` with T and A for the dtype.
#define FOR_DTYPE(...)                            \
  if (args.dtype == kFloat64) {                   \
    typedef double A;                             \
    CAMKERNELS_SWITCH(A, args.dtype, __VA_ARGS__) \
  } else {                                        \
    typedef float A;                              \
    CAMKERNELS_SWITCH(A, args.dtype, __VA_ARGS__) \
  }

#define FOR_GATE(walk, Kernel)                  \
  switch (gate_of(args)) {                      \
    case kNoRelu:                               \
      walk<A>(Kernel<A, T, kNoRelu>{args});     \
      break;                                    \
    case kRecomputed:                           \
      walk<A>(Kernel<A, T, kRecomputed>{args}); \
      break;                                    \
    case kMasked:                               \
      walk<A>(Kernel<A, T, kMasked>{args});     \
  }

void bn_fwd(const BatchNorm& args) { FOR_DTYPE((map_rows<A>(Forward<A, T>{args}))) }

void bn_bwd_reduce(const BatchNorm& args) { FOR_DTYPE(FOR_GATE(reduce_rows, BackwardSums)) }

void bn_bwd(const BatchNorm& args) { FOR_DTYPE(FOR_GATE(map_rows, Backward)) }

void bn_bwd_bwd_reduce(const BatchNorm& args) {
  FOR_DTYPE((reduce_rows<A>(SecondSums<A, T>{args})))
}

void bn_bwd_bwd(const BatchNorm& args) { FOR_DTYPE(FOR_GATE(map_rows, Second)) }

}  // namespace CAMKERNELS_ISA
}  // namespace camkernels
