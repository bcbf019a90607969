#include "common/parallel.h"
#include "lp_norm/lp_norm.h"
#include "warp/stretched.h"

namespace camkernels {
namespace CAMKERNELS_ISA {

template <class A>
static CAMKERNELS_INLINE A magnitude(A value) {
  return value < 0 ? -value : value;
}

// The rows that the norm of one sample is taken over, and where their cotangents go.
template <class A>
struct Rows {
  const LpNorm& args;
  int64_t b;
  Stretched<A> map;
  A *row, *grad;

  // Scratch: taps, the stretched map, a row of values, a row of cotangents, a row of the map.
  Rows(const LpNorm& of, int64_t sample, char* memory)
      : args(of),
        b(sample),
        map(of.warp, 0, memory, reinterpret_cast<A*>(memory + taps_bytes(of))) {
    row = reinterpret_cast<A*>(memory + taps_bytes(of)) + Stretched<A>::elements(of.warp);
    grad = row + of.warp.columns.size;
    if (of.enlarges) map.read(of.values, b);
  }

  static int64_t taps_bytes(const LpNorm& args) {
    return ColumnTaps<A>::scratch(args.warp.columns.size);
  }

  const A* read(int64_t r) const {
    if (args.enlarges) {
      map.row(r, row);
      return row;
    }
    CAMKERNELS_SWITCH(A, args.values.dtype, {
      const T* from = static_cast<const T*>(args.values.data) + b * args.values.stride_b +
                      r * args.values.stride_h;
      read_row(from, args.values.stride_w, args.sizes.width, row);
    });
    return row;
  }

  void put(int64_t r, const A* values) const {
    const int64_t width = args.sizes.width;
    CAMKERNELS_SWITCH(A, args.values.dtype, {
      T* to = static_cast<T*>(args.out) + (b * args.sizes.height + r) * width;
      write_row(values, width, to);
    });
  }

  void write(int64_t r) {
    if (args.enlarges) {
      map.add(r, grad);
    } else {
      put(r, grad);
    }
  }

  void finish() const {
    if (!args.enlarges) return;
    A* to = grad + args.warp.columns.size;  // a row of the map
    for (int64_t i = 0; i < args.sizes.height; ++i) {
      for (int64_t j = 0; j < args.sizes.width; ++j) to[j] = 0;
      map.write_row(i, to);
      put(i, to);
    }
  }
};

template <class A>
static A norm_of(const LpNorm& args, const Rows<A>& rows) {
  const int64_t height = args.warp.rows.size, width = args.warp.columns.size;
  double largest = 0, sum = 0;
  const bool plain = args.p == 0 || args.p == 1;
  for (int64_t r = 0; r < height; ++r) {
    const A* row = rows.read(r);
    for (int64_t j = 0; j < width; ++j) {
      const double value = (double)magnitude(row[j]);
      largest = value > largest || value != value ? value : largest;  // NaN stays
      sum += args.p == 0 ? (value != 0 ? 1.0 : 0.0) + (value - value) : value;
    }
  }
  if (plain) return (A)sum;
  if (args.p == __builtin_inf() || largest == 0) return (A)largest;
  double total = 0;
  for (int64_t r = 0; r < height; ++r) {
    const A* row = rows.read(r);
    for (int64_t j = 0; j < width; ++j) {
      const double ratio = (double)magnitude(row[j]) / largest;
      total += args.p == 2 ? ratio * ratio : (ratio == 0 ? 0 : __builtin_pow(ratio, args.p));
    }
  }
  const double root = args.p == 2 ? __builtin_sqrt(total) : __builtin_pow(total, 1 / args.p);
  return (A)(largest * root);
}

template <class A>
static double ties_of(const LpNorm& args, const Rows<A>& rows, A norm) {
  double ties = 0;
  for (int64_t r = 0; r < args.warp.rows.size; ++r) {
    const A* row = rows.read(r);
    for (int64_t j = 0; j < args.warp.columns.size; ++j) ties += magnitude(row[j]) == norm;
  }
  return ties > 1 ? ties : 1;
}

template <class A>
static void backward_of(const LpNorm& args, Rows<A>* rows, A norm, A given) {
  const int64_t height = args.warp.rows.size, width = args.warp.columns.size;
  const bool largest = args.p == __builtin_inf();
  const A factor = args.p == 0 || norm == 0 ? (A)0 : given;
  const A share = largest && norm != 0 ? (A)(factor / ties_of(args, *rows, norm)) : factor;
  for (int64_t r = 0; r < height; ++r) {
    const A* row = rows->read(r);
    for (int64_t j = 0; j < width; ++j) {
      const A value = row[j], sign = value > 0 ? (A)1 : (value < 0 ? (A)-1 : value);
      A found = share * sign;
      if (args.p == 0 || norm == 0) {
        found = 0;
      } else if (largest) {
        found = magnitude(value) == norm ? found : value - value;
      } else if (args.p == 2) {
        found = factor * (value / norm);
      } else if (args.p != 1 && value != 0) {
        found *= (A)__builtin_pow((double)magnitude(value) / (double)norm, args.p - 1);
      }
      rows->grad[j] = found;
    }
    rows->write(r);
  }
  rows->finish();
}

template <class A>
static void run(const LpNorm& args) {
#pragma omp parallel for schedule(static) num_threads(args.threads) if (args.threads > 1)
  for (int64_t b = 0; b < args.sizes.batch; ++b) {
    Rows<A> rows(args, b, args.scratch + thread_index() * args.scratch_bytes);
    A* norm = static_cast<A*>(args.norms) + b;
    if (args.grad_norms == nullptr) {
      *norm = norm_of(args, rows);
    } else {
      backward_of(args, &rows, *norm, static_cast<const A*>(args.grad_norms)[b]);
    }
  }
}

void lp_norm(const LpNorm& args) {
  args.values.dtype == kFloat64 ? run<double>(args) : run<float>(args);
}

}  // namespace CAMKERNELS_ISA
}  // namespace camkernels
