// Structural similarity of two pictures, row by row: what the kernels over stored pictures and
// over warped maps share. camkernels/ops/ssim/reference.py says what.
//
// A window needs the last `rows` rows of five quantities (x, y, xx, yy, xy), filtered along the
// row: these are kept in rings, and nothing of the size of the picture is. The way back runs in
// the same sweep: the cotangents of a row of windows are filtered along the row the other way
// round, kept in a ring, and a row of pixels is done when the last window that holds it is.
#pragma once

#include <cstdint>

#include "common/vec.h"

namespace camkernels {

// Weights of the window, C1 and C2, and whether zeros surround the picture ("same").
struct SsimWindow {
  const double* rows;
  const double* columns;
  int row_count, column_count;
  double c1, c2;
  bool same;
};

namespace CAMKERNELS_ISA {

constexpr int kMoments = 5;     // E of x, y, xx, yy, xy
constexpr int kCotangents = 4;  // of mu, nu, E xx (as of E yy), E xy

static inline int64_t whole_vectors(int64_t count) { return (count + 31) / 32 * 32 + 32; }

// Geometry of a picture of height x width, and where its scratch lies.
template <class A>
struct SsimPlan {
  int64_t height, width;  // of the picture
  int64_t top, left;      // zeros around it
  int64_t windows_y, windows_x;
  int64_t row, ring;  // elements of a padded row of pixels, and of a row of windows

  SsimPlan(const SsimWindow& window, int64_t h, int64_t w) : height(h), width(w) {
    top = window.same ? window.row_count / 2 : 0;
    left = window.same ? window.column_count / 2 : 0;
    windows_y = h + 2 * top - window.row_count + 1;
    windows_x = w + 2 * left - window.column_count + 1;
    row = whole_vectors(w + 2 * left);
    ring = whole_vectors(windows_x);
  }
};

// Where all of it lies; camkernels/ops/ssim/cpu.py allocates as much.
template <class A>
struct SsimScratch {
  A *x, *y, *moments, *weights_y, *weights_x, *cotangents, *filtered, *to_x, *to_y;
  int64_t cotangent;  // elements of a padded row of cotangents

  SsimScratch(const SsimPlan<A>& plan, const SsimWindow& window, bool backward, A* memory) {
    const int64_t n = window.row_count;
    const auto take = [&memory](int64_t count) {
      A* from = memory;
      memory += count;
      return from;
    };
    x = take(n * plan.row);
    y = take(n * plan.row);
    moments = take(kMoments * n * plan.ring);
    weights_y = take(n);
    weights_x = take(window.column_count);
    for (int i = 0; i < window.row_count; ++i) weights_y[i] = (A)window.rows[i];
    for (int i = 0; i < window.column_count; ++i) weights_x[i] = (A)window.columns[i];
    cotangent = plan.ring + 2 * window.column_count + 32;
    cotangents = filtered = to_x = to_y = nullptr;
    if (!backward) return;
    cotangents = take(kCotangents * cotangent);
    filtered = take(kCotangents * n * plan.row);
    to_x = take(plan.row);
    to_y = take(plan.row);
    for (int64_t i = 0; i < kCotangents * cotangent; ++i) cotangents[i] = 0;
  }
};

// Filters rows of x and y and of their products: out[q][j] = sum_t g[t] q[j + t].
template <class A>
static void filter_row(const A* x, const A* y, const A* g, int taps, int64_t count, A* out,
                       int64_t stride) {
  constexpr int N = Lanes<A>::count;
  for (int64_t j = 0; j < count; j += N) {  // rows are padded to whole vectors
    Vec<A> mu{}, nu{}, xx{}, yy{}, xy{};
    for (int t = 0; t < taps; ++t) {
      const Vec<A> a = load<A>(x + j + t), b = load<A>(y + j + t);
      const Vec<A> ga = g[t] * a, gb = g[t] * b;
      mu += ga;
      nu += gb;
      xx += ga * a;
      yy += gb * b;
      xy += ga * b;
    }
    store<A>(out + j, mu);
    store<A>(out + stride + j, nu);
    store<A>(out + 2 * stride + j, xx);
    store<A>(out + 3 * stride + j, yy);
    store<A>(out + 4 * stride + j, xy);
  }
}

// S of a vector of windows, and where `cotangents` the derivatives to the moments.
template <class A>
struct Similarity {
  Vec<A> value, to_mu, to_nu, to_square, to_product;

  Similarity(const Vec<A>* m, A c1, A c2) {
    const Vec<A> mu = m[0], nu = m[1], both = mu * nu, squares = mu * mu + nu * nu;
    const Vec<A> a1 = (A)2 * both + c1, a2 = (A)2 * (m[4] - both) + c2;
    const Vec<A> b1 = squares + c1, b2 = (m[2] - mu * mu) + (m[3] - nu * nu) + c2;
    const Vec<A> inverse = (A)1 / (b1 * b2);
    value = a1 * a2 * inverse;
    const Vec<A> difference = (A)2 * (a2 - a1) * inverse;
    const Vec<A> slope = (A)2 * value * (b1 - b2) * inverse;
    to_mu = nu * difference + mu * slope;
    to_nu = mu * difference + nu * slope;
    to_square = -value * b1 * inverse;
    to_product = (A)2 * a1 * inverse;
  }
};

// One row of windows from the ring of filtered rows, whose oldest row is `oldest`: the sum of S,
// and the cotangents times `scale` where scratch has room for them.
template <class A>
static double window_row(const SsimPlan<A>& plan, const SsimWindow& window,
                         const SsimScratch<A>& scratch, int64_t oldest, A scale) {
  constexpr int N = Lanes<A>::count;
  const int n = window.row_count;
  const A c1 = (A)window.c1, c2 = (A)window.c2;
  Vec<A> sum{};
  for (int64_t j = 0; j < plan.windows_x; j += N) {
    Vec<A> m[kMoments] = {};
    int64_t slot = oldest;
    for (int t = 0; t < n; ++t) {
      const A* from = scratch.moments + slot * kMoments * plan.ring + j;
      const A g = scratch.weights_y[t];
#pragma GCC unroll 5
      for (int q = 0; q < kMoments; ++q) m[q] += g * load<A>(from + q * plan.ring);
      slot = slot + 1 < n ? slot + 1 : 0;
    }
    const Similarity<A> s(m, c1, c2);
    const int64_t left = plan.windows_x - j;
    const Vec<A> zero{};
    if (left >= N) {
      sum += s.value;
    } else {
      A lanes[N];
      store<A>(lanes, s.value);
      for (int64_t i = 0; i < left; ++i) sum[0] += lanes[i];
    }
    if (scratch.cotangents == nullptr) continue;
    A* to = scratch.cotangents + window.column_count - 1 + j;
    const Vec<A> found[kCotangents] = {s.to_mu, s.to_nu, s.to_square, s.to_product};
    for (int q = 0; q < kCotangents; ++q) {
      const Vec<A> value = scale * found[q];
      A* at = to + q * scratch.cotangent;
      if (left >= N) {
        store<A>(at, value);
      } else {
        store<A>(at, zero);
        store_partial<A>(at, value, left);
      }
    }
  }
  return (double)sum_lanes<A>(sum);
}

// Cotangents of a row of windows, filtered along the row towards pixels, into slot `slot`.
template <class A>
static void spread_row(const SsimPlan<A>& plan, const SsimWindow& window,
                       const SsimScratch<A>& scratch, int64_t slot) {
  constexpr int N = Lanes<A>::count;
  const int taps = window.column_count;
  A* out = scratch.filtered + slot * kCotangents * plan.row;
  for (int64_t j = 0; j < plan.width + 2 * plan.left; j += N) {
    Vec<A> sums[kCotangents] = {};
    for (int t = 0; t < taps; ++t) {  // window j - t holds pixel j at its place t
      const A g = scratch.weights_x[t];
      const A* from = scratch.cotangents + taps - 1 + j - t;
#pragma GCC unroll 4
      for (int q = 0; q < kCotangents; ++q) sums[q] += g * load<A>(from + q * scratch.cotangent);
    }
    for (int q = 0; q < kCotangents; ++q) store<A>(out + q * plan.row + j, sums[q]);
  }
}

// Cotangents of a row of pixels: `r` counts padded rows.
template <class A>
static void pixel_row(const SsimPlan<A>& plan, const SsimWindow& window,
                      const SsimScratch<A>& scratch, int64_t r) {
  constexpr int N = Lanes<A>::count;
  const int n = window.row_count;
  const A *x = scratch.x + r % n * plan.row, *y = scratch.y + r % n * plan.row;
  for (int64_t j = 0; j < plan.width + 2 * plan.left; j += N) {
    Vec<A> sums[kCotangents] = {};
    for (int t = 0; t < n; ++t) {
      const int64_t o = r - t;
      if (o < 0 || o >= plan.windows_y) continue;
      const A g = scratch.weights_y[t];
      const A* from = scratch.filtered + o % n * kCotangents * plan.row + j;
#pragma GCC unroll 4
      for (int q = 0; q < kCotangents; ++q) sums[q] += g * load<A>(from + q * plan.row);
    }
    const Vec<A> a = load<A>(x + j), b = load<A>(y + j);
    store<A>(scratch.to_x + j, sums[0] + (A)2 * a * sums[2] + b * sums[3]);
    store<A>(scratch.to_y + j, sums[1] + (A)2 * b * sums[2] + a * sums[3]);
  }
}

// The sum of S over the windows of one picture. source(r, x, y) writes row r of both pictures;
// sink(r, to_x, to_y) takes the cotangents of row r, times `scale`, where `backward`.
template <class A, class Source, class Sink>
static double sweep(const SsimPlan<A>& plan, const SsimWindow& window,
                    const SsimScratch<A>& scratch, bool backward, A scale, const Source& source,
                    const Sink& sink) {
  const int n = window.row_count;
  const int64_t padded = plan.height + 2 * plan.top;
  double total = 0;
  for (int64_t r = 0; r < padded; ++r) {
    const int64_t slot = r % n;
    A *x = scratch.x + slot * plan.row, *y = scratch.y + slot * plan.row;
    const int64_t pixel = r - plan.top;
    for (int64_t j = 0; j < plan.row; ++j) x[j] = y[j] = 0;
    if (pixel >= 0 && pixel < plan.height) source(pixel, x + plan.left, y + plan.left);
    filter_row(x, y, scratch.weights_x, window.column_count, plan.windows_x,
               scratch.moments + slot * kMoments * plan.ring, plan.ring);
    const int64_t o = r - n + 1;
    if (o < 0) continue;
    total += window_row(plan, window, scratch, (r + 1) % n, scale);
    if (!backward) continue;
    spread_row(plan, window, scratch, o % n);
    // Row o is in no later window; after the last window so are all that follow.
    const int64_t end = o + 1 < plan.windows_y ? o + 1 : padded;
    for (int64_t done = o; done < end; ++done) {
      const int64_t row = done - plan.top;
      if (row < 0 || row >= plan.height) continue;
      pixel_row(plan, window, scratch, done);
      sink(row, scratch.to_x + plan.left, scratch.to_y + plan.left);
    }
  }
  return total;
}

}  // namespace CAMKERNELS_ISA
}  // namespace camkernels
