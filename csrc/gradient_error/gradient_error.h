// Errors between a gradient and the guided one, and the way back.
// Formulas and conventions: camkernels/ops/gradient_error/reference.py.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/view.h"

namespace camkernels {

// In the order of ERRORS of the reference.
enum GradientErrorKind : int { kSigmoid, kCenteredSigmoid, kCosine, kHistogram, kHistogramPaper };

constexpr int kErrorStatistics = 3, kErrorSums = 3;
// Entries of one partial sum: the shape alone decides how a sum is split.
constexpr int64_t kErrorBlock = 16384;

// Rows (batch, entries), the entries of a row side by side.
struct Rows {
  const void* data;
  int dtype;
  int64_t stride;
};

struct GradientErrorForward {
  Rows delta, guided;
  int64_t batch, entries;
  int error;
  void* errors;      // (batch), in the type of the sums
  void* statistics;  // (batch, kErrorStatistics)
  double* partial;   // (batch, blocks, kErrorSums)
  int threads;
};

struct GradientErrorBackward {
  const void* grad_errors;  // (batch), in the type of the sums
  Rows delta, guided;
  const void* statistics;
  void* grad_delta;  // (batch, entries) side by side, dtype of delta
  int64_t batch, entries;
  int error;
  bool streaming;  // store past the caches
  int threads;
};

CAMKERNELS_DECLARE_KERNEL(gradient_error_fwd, GradientErrorForward)
CAMKERNELS_DECLARE_KERNEL(gradient_error_bwd, GradientErrorBackward)

}  // namespace camkernels
