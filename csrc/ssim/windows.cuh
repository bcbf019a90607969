// A tile of windows by one block, of two pictures that are stored or made: their means, and the way
// back. Formulas: camkernels/ops/ssim/reference.py.
//
// A tile has kOut x kOut windows, or pixels, one per thread. Windows of any length are filtered in
// spans of kSpan pixels, down and then across. The way back visits the tiles of windows around a
// tile of pixels, takes their means again, and filters their cotangents: nothing of the size of the
// picture is stored, at the price of the means of about four tiles for one.
//
// A source has `prepare(top, left)`, which all threads call before pixels of the span from there
// are read, in shared memory where kShares; and `at(r, c, &x, &y)`, pixel r, c of the span, which
// leaves x and y where there is none.
#pragma once

#include "common/block.cuh"
#include "ssim/ssim_device.h"

namespace camkernels {
namespace cuda {

constexpr int kOut = 16, kSpan = 32, kMeans = 4;
static_assert(kOut * kOut == kThreads, "a window, or a pixel, per thread");

// Shared memory, in floats.
constexpr int kPixelsAt = 0;                                       // (2, kSpan, kSpan)
constexpr int kColumnsAt = kPixelsAt + 2 * kSpan * kSpan;          // (kMeans, kOut, kSpan)
constexpr int kCotangentsAt = kColumnsAt + kMeans * kOut * kSpan;  // (kMeans, kOut, kOut)
constexpr int kPartAt = kCotangentsAt + kMeans * kThreads;         // (kMeans, kOut, kOut)
constexpr int kWindowScratchAt = kPartAt + kMeans * kThreads;
constexpr int kWindowFloats = kWindowScratchAt + reduction_floats(2);

// How many windows there are down and across.
struct WindowCount {
  int down, across;
};

CAMKERNELS_HD inline WindowCount windows_of(const DeviceWindow& window, int height, int width) {
  return {height + 2 * window.pad_y - window.length_y + 1,
          width + 2 * window.pad_x - window.length_x + 1};
}

__device__ inline int smaller(int a, int b) { return a < b ? a : b; }
__device__ inline int larger(int a, int b) { return a > b ? a : b; }

// Values that are taken off both pictures: variances are differences of means of squares, and what
// is nearly constant would leave rounding only. S does not depend on them but by the means.
struct Pivot {
  float x, y;
};

// The means of the pixels of the tile from top, left on (from the last row on, where bands of
// windows go further than pixels); 0 where a mean is no number. All threads come.
template <class Source>
__device__ inline Pivot pivot_of_tile(Source& source, int top, int left, int height, int width) {
  top = smaller(top, height - 1);
  const int existing = smaller(kOut, height - top) * smaller(kOut, width - left);
  source.prepare(top, left);
  if (Source::kShares) __syncthreads();
  float means[2] = {0, 0};
  source.at(threadIdx.x / kOut, threadIdx.x % kOut, &means[0], &means[1]);
  reduce_block(means, shared_array<float>(kWindowScratchAt), Sum());
  const float infinity = __int_as_float(0x7f800000), count = (float)existing;
  return {fabsf(means[0]) < infinity ? means[0] / count : 0.0f,
          fabsf(means[1]) < infinity ? means[1] / count : 0.0f};
}

struct Means {
  float mu, nu, squares, products;  // E x, E y, E (xx + yy), E xy of x and y less the pivot
};

// Columns of a span, filtered down: `sums` of two of them per thread grow by the rows [i0, i0 +
// kSpan) of the tile's pixels.
__device__ inline void add_rows(const DeviceWindow& window, const Pivot& pivot, int i0,
                                Shared<float> pixels, float (&sums)[2][kMeans]) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int item = threadIdx.x + n * kThreads, y = item / kSpan, x = item % kSpan;
    const int end = smaller(kSpan, y + window.length_y - i0);
    for (int r = larger(0, y - i0); r < end; ++r) {
      const float weight = window.weights[i0 + r - y];
      const float a = pixels.get(r * kSpan + x) - pivot.x;
      const float b = pixels.get((kSpan + r) * kSpan + x) - pivot.y;
      sums[n][0] += weight * a;
      sums[n][1] += weight * b;
      sums[n][2] += weight * (a * a + b * b);
      sums[n][3] += weight * (a * b);
    }
  }
}

// Means of the window of this thread in the tile whose first window begins at pixel top, left.
template <class Source>
__device__ inline Means window_means(Source& source, const DeviceWindow& window, const Pivot& pivot,
                                     int top, int left) {
  const Shared<float> pixels = shared_array<float>(kPixelsAt);
  const Shared<float> columns = shared_array<float>(kColumnsAt);
  const int height = kOut + window.length_y - 1, width = kOut + window.length_x - 1;
  const int row = threadIdx.x / kOut, column = threadIdx.x % kOut;
  float means[kMeans] = {};
  for (int j0 = 0; j0 < width; j0 += kSpan) {
    float sums[2][kMeans] = {};
    for (int i0 = 0; i0 < height; i0 += kSpan) {
      if (i0 > 0) __syncthreads();  // the span before has been read
      source.prepare(top + i0, left + j0);
      if (Source::kShares) __syncthreads();
      for (int p = threadIdx.x; p < kSpan * kSpan; p += kThreads) {
        const int r = p / kSpan, c = p % kSpan;
        float x = 0, y = 0;
        if (i0 + r < height && j0 + c < width) source.at(r, c, &x, &y);
        pixels.set(p, x);
        pixels.set(kSpan * kSpan + p, y);
      }
      __syncthreads();
      add_rows(window, pivot, i0, pixels, sums);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int q = 0; q < kMeans; ++q) {
        columns.set(q * kOut * kSpan + threadIdx.x + n * kThreads, sums[n][q]);
      }
    }
    __syncthreads();
    const int end = smaller(kSpan, column + window.length_x - j0);
    for (int c = larger(0, column - j0); c < end; ++c) {
      const float weight = window.weights[window.length_y + j0 + c - column];
#pragma unroll
      for (int q = 0; q < kMeans; ++q) {
        means[q] += weight * columns.get((q * kOut + row) * kSpan + c);
      }
    }
  }
  return {means[0], means[1], means[2], means[3]};
}

// S of a window, a product of two fractions, and its derivatives to the means of x and y less the
// pivot; adding that back takes weights whose sum is 1, as ops/ssim/reference.py makes them.
struct Similarity {
  float value, to_means[kMeans];

  __device__ Similarity(const Means& m, const Pivot& pivot, float c1, float c2) {
    const float mu = m.mu + pivot.x, nu = m.nu + pivot.y;
    const float below_luminance = mu * mu + nu * nu + c1;
    const float below_structure = m.squares - m.mu * m.mu - m.nu * m.nu + c2;
    const float luminance = (2 * mu * nu + c1) / below_luminance;
    const float structure = (2 * (m.products - m.mu * m.nu) + c2) / below_structure;
    value = luminance * structure;
    const float per_luminance = 2 * structure / below_luminance;
    const float per_structure = 2 * luminance / below_structure;
    to_means[0] = per_luminance * (nu - luminance * mu) + per_structure * (structure * m.mu - m.nu);
    to_means[1] = per_luminance * (mu - luminance * nu) + per_structure * (structure * m.nu - m.mu);
    to_means[2] = -0.5f * per_structure * structure;
    to_means[3] = per_structure;
  }
};

// Of the windows [row, row + kOut) of all columns: the sum of S over this thread's.
template <class Source>
__device__ inline float sum_of_band(Source& source, const DeviceWindow& window,
                                    const WindowCount& count, int row, const Pivot& pivot) {
  float sum = 0;
  for (int column = 0; column < count.across; column += kOut) {
    const Means means =
        window_means(source, window, pivot, row - window.pad_y, column - window.pad_x);
    const bool exists = row + (int)threadIdx.x / kOut < count.down &&
                        column + (int)threadIdx.x % kOut < count.across;
    if (exists) sum += Similarity(means, pivot, window.c1, window.c2).value;
  }
  return sum;
}

// Cotangents of the window means, times `scale`, filtered back to this thread's pixel of the tile
// from pixel top, left on; of x and y less the pivot.
template <class Source>
__device__ inline void filter_back(Source& source, const DeviceWindow& window,
                                   const WindowCount& count, const Pivot& pivot, int top, int left,
                                   float scale, float (&sums)[kMeans]) {
  const Shared<float> cotangents = shared_array<float>(kCotangentsAt);
  const Shared<float> part = shared_array<float>(kPartAt);
  const int row = threadIdx.x / kOut, column = threadIdx.x % kOut;
  const int first_row = larger(0, top + window.pad_y - window.length_y + 1);
  const int first_column = larger(0, left + window.pad_x - window.length_x + 1);
  const int end_row = smaller(count.down, top + kOut + window.pad_y);
  const int end_column = smaller(count.across, left + kOut + window.pad_x);
  for (int y = first_row; y < end_row; y += kOut) {
    for (int x = first_column; x < end_column; x += kOut) {
      const Means means = window_means(source, window, pivot, y - window.pad_y, x - window.pad_x);
      const bool exists = y + row < count.down && x + column < count.across;
      const Similarity similarity(means, pivot, window.c1, window.c2);
#pragma unroll
      for (int q = 0; q < kMeans; ++q) {
        cotangents.set(q * kThreads + threadIdx.x, exists ? scale * similarity.to_means[q] : 0.0f);
      }
      __syncthreads();
      float across[kMeans] = {};
      const int pixel = left + column + window.pad_x - x;  // window c holds it at pixel - c
      for (int c = larger(0, pixel - window.length_x + 1); c < kOut && c <= pixel; ++c) {
        const float weight = window.weights[window.length_y + pixel - c];
#pragma unroll
        for (int q = 0; q < kMeans; ++q) {
          across[q] += weight * cotangents.get(q * kThreads + row * kOut + c);
        }
      }
#pragma unroll
      for (int q = 0; q < kMeans; ++q) part.set(q * kThreads + threadIdx.x, across[q]);
      __syncthreads();
      const int line = top + row + window.pad_y - y;
      for (int r = larger(0, line - window.length_y + 1); r < kOut && r <= line; ++r) {
        const float weight = window.weights[line - r];
#pragma unroll
        for (int q = 0; q < kMeans; ++q) {
          sums[q] += weight * part.get(q * kThreads + r * kOut + column);
        }
      }
    }
  }
}

}  // namespace cuda
}  // namespace camkernels
