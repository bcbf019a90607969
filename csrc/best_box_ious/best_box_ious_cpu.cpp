// One pass over the pixels of a picture, from the highest level down: each joins the segments that
// it touches, whose boxes grow. The IoU of a segment holds for all thresholds until it grows again.
#include "best_box_ious/best_box_ious.h"
#include "common/parallel.h"

namespace camkernels {
namespace CAMKERNELS_ISA {

template <class T>
static T lower(T a, T b) {
  return b < a ? b : a;
}

template <class T>
static T higher(T a, T b) {
  return a < b ? b : a;
}

struct Edges {
  int32_t top, left, bottom, right;  // inclusive
};

// Segments of one picture as trees of pixels; the root of each knows its box.
class Segments {
 public:
  Segments(const BestBoxIous& args, int64_t b, int thread)
      : height_(args.height),
        width_(args.width),
        pixels_(args.height * args.width),
        thresholds_(args.thresholds),
        levels_(args.levels + b * pixels_),
        box_(args.boxes + 4 * b),
        ious_(args.ious + b * thresholds_),
        parent_(args.numbers + thread * (7 * pixels_ + thresholds_ + 2)),
        order_(parent_ + pixels_),
        since_(order_ + pixels_),
        edges_(reinterpret_cast<Edges*>(since_ + pixels_)),
        begins_(since_ + 5 * pixels_),
        scores_(args.scores + thread * pixels_) {}

  void run() {
    sort();
    for (int64_t p = 0; p < pixels_; ++p) parent_[p] = -1;
    for (int64_t level = thresholds_; level > 0; --level) {
      const int32_t threshold = (int32_t)level - 1;
      const int32_t begin = begins_[level], end = begins_[level + 1];
      for (int32_t i = begin; i < end; ++i) insert(order_[i], threshold);
      for (int32_t i = begin; i < end; ++i) {
        const int32_t root = find(order_[i]);
        if (scores_[root] < 0) scores_[root] = iou(edges_[root]);
      }
    }
    for (int32_t p = 0; p < pixels_; ++p) {
      if (parent_[p] == p) hand_in(p, 0);
    }
  }

 private:
  // Pixels by level: those of level l lie from begins_[l] to begins_[l + 1].
  void sort() {
    for (int64_t l = 0; l <= thresholds_ + 1; ++l) begins_[l] = 0;
    for (int64_t p = 0; p < pixels_; ++p) ++begins_[levels_[p] + 1];
    for (int64_t l = 0; l <= thresholds_; ++l) begins_[l + 1] += begins_[l];
    for (int32_t p = 0; p < pixels_; ++p) order_[begins_[levels_[p]]++] = p;
    for (int64_t l = thresholds_; l >= 0; --l) begins_[l + 1] = begins_[l];
    begins_[0] = 0;
  }

  void insert(int32_t p, int32_t threshold) {
    const int32_t row = p / (int32_t)width_, column = p % (int32_t)width_;
    parent_[p] = p;
    since_[p] = threshold;
    edges_[p] = {row, column, row, column};
    scores_[p] = -1;
    int32_t root = p;
    const int32_t last_row = lower(row + 1, (int32_t)height_ - 1);
    const int32_t last_column = lower(column + 1, (int32_t)width_ - 1);
    for (int32_t y = higher(row - 1, 0); y <= last_row; ++y) {
      for (int32_t x = higher(column - 1, 0); x <= last_column; ++x) {
        const int32_t other = y * (int32_t)width_ + x;
        if (parent_[other] >= 0) root = join(root, find(other), threshold);
      }
    }
  }

  int32_t find(int32_t p) {
    while (parent_[p] != p) p = parent_[p] = parent_[parent_[p]];
    return p;
  }

  // The root of both, whose IoU is to be found again. a is of this threshold already, b may not be.
  int32_t join(int32_t a, int32_t b, int32_t threshold) {
    if (a == b) return a;
    if (since_[b] > threshold) hand_in(b, threshold + 1);
    Edges &one = edges_[a], &two = edges_[b];
    const Edges both{lower(one.top, two.top), lower(one.left, two.left),
                     higher(one.bottom, two.bottom), higher(one.right, two.right)};
    // The root with the larger box stays: paths stay short.
    const bool second = size(two) > size(one);
    const int32_t root = second ? b : a;
    parent_[second ? a : b] = root;
    edges_[root] = both;
    since_[root] = threshold;
    scores_[root] = -1;
    return root;
  }

  static int64_t size(const Edges& edges) {
    return (int64_t)(edges.bottom - edges.top + 1) * (edges.right - edges.left + 1);
  }

  // The segment was as it is for the thresholds from `first` to that at which it last grew.
  void hand_in(int32_t root, int32_t first) {
    const double score = scores_[root];
    for (int32_t t = first; t <= since_[root]; ++t) ious_[t] = higher(ious_[t], score);
  }

  double iou(const Edges& edges) const {
    const double rows =
        lower(edges.bottom + 1.0, box_[0] + box_[2]) - higher((double)edges.top, box_[0]);
    const double columns =
        lower(edges.right + 1.0, box_[1] + box_[3]) - higher((double)edges.left, box_[1]);
    const double common = higher(rows, 0.0) * higher(columns, 0.0);
    return common / ((double)size(edges) + box_[2] * box_[3] - common);
  }

  int64_t height_, width_, pixels_, thresholds_;
  const int32_t* levels_;
  const double* box_;
  double* ious_;
  int32_t *parent_, *order_, *since_;
  Edges* edges_;
  int32_t* begins_;
  double* scores_;
};

void best_box_ious(const BestBoxIous& args) {
#pragma omp parallel for schedule(dynamic) num_threads(args.threads) if (args.threads > 1)
  for (int64_t b = 0; b < args.batch; ++b) Segments(args, b, thread_index()).run();
}

}  // namespace CAMKERNELS_ISA
}  // namespace camkernels
