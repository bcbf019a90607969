// A low-resolution map enlarged along its rows, and the cotangent of that: what makes rows of the
// enlarged map, and takes their cotangents, without storing it.
#pragma once

#include "common/rows.h"
#include "warp/taps.h"

namespace camkernels {
namespace CAMKERNELS_ISA {

template <class A>
struct Stretched {
  const Warp& warp;
  int64_t b;  // row of warp.boxes
  ColumnTaps<A> columns;
  A *values, *grads;  // (h, W)

  static int64_t elements(const Warp& warp) {
    return warp.rows.source * (2 * warp.columns.size + warp.columns.source);
  }

  Stretched(const Warp& of, int64_t sample, char* taps, A* memory)
      : warp(of), b(sample), columns(of, sample, taps), values(memory) {
    grads = values + warp.rows.source * columns.size;
  }

  // memory behind grads: a row of the map in the type of the sums.
  void read(const View& view, int64_t sample) {
    A* row = grads + warp.rows.source * columns.size;
    for (int64_t i = 0; i < warp.rows.source; ++i) {
      CAMKERNELS_SWITCH(A, view.dtype, {
        const T* from = static_cast<const T*>(view.data) + sample * view.stride_b;
        read_row(from + i * view.stride_h, view.stride_w, warp.columns.source, row);
      });
      columns.gather(row, values + i * columns.size);
    }
    for (int64_t p = 0; p < warp.rows.source * columns.size; ++p) grads[p] = 0;
  }

  void row(int64_t r, A* out) const {
    const Taps<A> taps = row_taps<A>(warp, b, r);
    for (int64_t j = 0; j < columns.size; ++j) out[j] = 0;
    for (int k = 0; k < taps.count; ++k) {
      add_row(values + taps.index[k] * columns.size, taps.weight[k], columns.size, out);
    }
  }

  void add(int64_t r, const A* grad) {
    const Taps<A> taps = row_taps<A>(warp, b, r);
    for (int k = 0; k < taps.count; ++k) {
      add_row(grad, taps.weight[k], columns.size, grads + taps.index[k] * columns.size);
    }
  }

  // Row i of the cotangent of the map, into `out`, which holds zeros.
  void write_row(int64_t i, A* out) const { columns.scatter(grads + i * columns.size, out); }
};

}  // namespace CAMKERNELS_ISA
}  // namespace camkernels
