// Where the pixels of a warped picture come from. camkernels/ops/warp/reference.py says what.
#pragma once

#include <cstdint>

#include "common/vec.h"

namespace camkernels {

// One axis: pixels of the source, of the picture that boxes are counted in, of the output.
struct WarpAxis {
  int64_t source, via, size;
};

struct Warp {
  WarpAxis rows, columns;
  const int64_t* boxes;  // (batch, 4): top, left, height, width
  const uint8_t* flips;  // (batch,)
};

namespace CAMKERNELS_ISA {

// The pixels of the source that one output pixel is made of along an axis; up to `count`.
template <class A>
struct Taps {
  int count;
  int64_t index[4];
  A weight[4];
};

// The two pixels that a position lies between, kept within first to last, and the second's share.
struct Pair {
  int64_t one, other;
  double share;
};

static inline Pair pair_of(double position, double first, double last) {
  position = position > first ? position : first;
  position = position < last ? position : last;
  const int64_t below = (int64_t)position;  // not negative
  const int64_t end = (int64_t)last;
  return {below, below + 1 < end ? below + 1 : end, position - (double)below};
}

template <class A>
static inline void add_tap(Taps<A>* taps, int64_t index, double weight) {
  if (weight == 0) return;
  taps->index[taps->count] = index;
  taps->weight[taps->count++] = (A)weight;
}

// Of output pixel i, with the box from `begin` on, `length` pixels long.
template <class A>
static inline Taps<A> taps_of(const WarpAxis& axis, int64_t begin, int64_t length, bool flip,
                              int64_t i) {
  if (flip) i = axis.size - 1 - i;
  const double step = (double)length / (double)axis.size;
  const double position = (double)begin + ((double)i + 0.5) * step - 0.5;
  const Pair outer = pair_of(position, (double)begin, (double)(begin + length - 1));
  const double scale = (double)axis.source / (double)axis.via;
  Taps<A> taps{};
  for (int which = 0; which < 2; ++which) {
    const double pixel = (double)(which ? outer.other : outer.one);
    const double weight = which ? outer.share : 1 - outer.share;
    const Pair inner = pair_of((pixel + 0.5) * scale - 0.5, 0, (double)(axis.source - 1));
    add_tap(&taps, inner.one, weight * (1 - inner.share));
    add_tap(&taps, inner.other, weight * inner.share);
  }
  return taps;
}

static inline bool box_is_valid(const Warp& warp, int64_t b) {
  const int64_t *box = warp.boxes + 4 * b, top = box[0], left = box[1], height = box[2],
                width = box[3];
  return top >= 0 && left >= 0 && height > 0 && width > 0 && height <= warp.rows.via - top &&
         width <= warp.columns.via - left;
}

template <class A>
static inline Taps<A> row_taps(const Warp& warp, int64_t b, int64_t i) {
  return taps_of<A>(warp.rows, warp.boxes[4 * b], warp.boxes[4 * b + 2], false, i);
}

// Taps of all columns of a sample, four a column, unused ones of weight 0, and the columns of the
// source that they lie between.
template <class A>
struct ColumnTaps {
  int32_t* index;  // (4, size)
  A* weight;       // (4, size)
  int64_t size, first, last;
  int count;

  static int64_t scratch(int64_t size) { return 4 * size * (int64_t)(sizeof(int32_t) + sizeof(A)); }

  // `memory` holds scratch(size) bytes, aligned to those of A.
  ColumnTaps(const Warp& warp, int64_t b, char* memory) {
    size = warp.columns.size;
    weight = reinterpret_cast<A*>(memory);
    index = reinterpret_cast<int32_t*>(weight + 4 * size);
    first = warp.columns.source;
    last = -1;
    count = 0;
    const int64_t left = warp.boxes[4 * b + 1], width = warp.boxes[4 * b + 3];
    for (int64_t j = 0; j < size; ++j) {
      const Taps<A> taps = taps_of<A>(warp.columns, left, width, warp.flips[b] != 0, j);
      for (int k = 0; k < 4; ++k) {
        const bool used = k < taps.count;
        const int64_t column = taps.index[used ? k : 0];
        index[k * size + j] = (int32_t)column;
        weight[k * size + j] = used ? taps.weight[k] : (A)0;
        first = column < first ? column : first;
        last = column > last ? column : last;
      }
      count = taps.count > count ? taps.count : count;
    }
  }

  // out[j] = sum_k weight source[index]: a row of pixels.
  void gather(const A* source, A* out) const {
    for (int64_t j = 0; j < size; ++j) out[j] = weight[j] * source[index[j]];
    for (int k = 1; k < count; ++k) {
      const A* w = weight + k * size;
      const int32_t* at = index + k * size;
      for (int64_t j = 0; j < size; ++j) out[j] += w[j] * source[at[j]];
    }
  }

  // The other way round; `to` holds zeros, or what came before.
  void scatter(const A* grad, A* to) const {
    for (int64_t j = 0; j < size; ++j) {
      for (int k = 0; k < count; ++k) to[index[k * size + j]] += weight[k * size + j] * grad[j];
    }
  }
};

// out += weight row, over `count` elements.
template <class A>
static CAMKERNELS_INLINE void add_row(const A* row, A weight, int64_t count, A* out) {
  for (int64_t j = 0; j < count; ++j) out[j] += weight * row[j];
}

}  // namespace CAMKERNELS_ISA
}  // namespace camkernels
