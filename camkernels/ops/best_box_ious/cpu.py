"""best_box_ious by the C++ kernel of csrc/best_box_ious. Signature: reference.py."""

from __future__ import annotations

import torch
from torch import Tensor

from camkernels import _cpu
from camkernels.ops import _cpu_view, _native


def best_box_ious(levels: Tensor, boxes: Tensor, thresholds: int) -> Tensor:
    levels, boxes = _native.dense(levels, torch.int32), _native.dense(boxes, torch.float64)
    ious = boxes.new_zeros(len(levels), thresholds)
    threads = min(_cpu_view.threads(levels.numel()), max(1, len(levels)))
    pixels = levels.shape[1] * levels.shape[2]
    # For each thread: of each pixel six numbers and an IoU; where each level begins.
    numbers = levels.new_empty(threads, 7 * pixels + thresholds + 2)
    scores = boxes.new_empty(threads, pixels)
    _cpu.best_box_ious(
        tuple(levels.shape), thresholds, levels.data_ptr(), boxes.data_ptr(), numbers.data_ptr(),
        scores.data_ptr(), ious.data_ptr(), threads,
    )  # fmt: skip
    return ious
