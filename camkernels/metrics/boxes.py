"""Boxes around what a map marks at every threshold, as MaxBoxAccV2 takes them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from camkernels.consistency import min_max_normalize
from camkernels.metrics.regions import enlarged, missing
from camkernels.ops.best_box_ious.op import best_box_ious as _best_box_ious

THRESHOLDS = 1001
LEVELS = (0.3, 0.5, 0.7)


@torch.no_grad()
def best_box_ious(
    maps: Tensor, boxes: Tensor, size: tuple[int, int], *, thresholds: int = THRESHOLDS
) -> Tensor:
    """IoU of the best box of each map with the true one, at every threshold.

    With S the map enlarged bilinearly to the picture and then scaled to [0, 1], t = k / (T - 1)::

        iou[k] = max over segments of {S >= t} of IoU(box around the segment, true box)

    Segments are made of pixels that touch at an edge or a corner; boxes count whole pixels. A
    constant map marks the whole picture at t = 0 and nothing beyond.

    Args:
        maps: (B, h, w).
        boxes: (B, 4) as top, left, height, width in pixels of the picture; one per picture.
        size: height and width of the picture.
        thresholds: T, at least 2; 0 and 1 are among them.

    Returns:
        (B, T) float64; NaN where the map is not finite, or the box is missing (height or width NaN
        or not above 0).

    Raises:
        ValueError: maps or boxes of another shape, fewer than 2 thresholds.
        BackendUnavailableError: a backend named by ``ck.backend`` that has no kernel for it.

    The code of the paper (wsolevaluation) enlarges bicubically, rounds S down to 8 bits and marks
    what lies above the threshold, not at it: 255 thresholds differ. Its boxes reach one pixel
    further right and down, except at the border, and outlines of holes count as boxes too; here
    they do not.

    Source: Choe et al., Evaluating weakly supervised object localization methods right, section
    3.3, and its extension (2020), MaxBoxAccV2.
    """
    if thresholds < 2:
        raise ValueError(f"thresholds: expected at least 2, got {thresholds}")
    if tuple(boxes.shape) != (len(maps), 4) or boxes.dtype == torch.bool:
        raise ValueError(
            f"boxes: expected ({len(maps)}, 4), got {boxes.dtype} {tuple(boxes.shape)}"
        )
    large = enlarged(maps, size)
    if not large.numel():
        return torch.empty(len(maps), thresholds, dtype=torch.float64, device=maps.device)
    shares = min_max_normalize(large)  # all NaN where the map is not finite
    steps = torch.arange(thresholds, dtype=torch.float64, device=maps.device) / (thresholds - 1)
    levels = torch.searchsorted(steps.to(shares.dtype), shares, right=True, out_int32=True)
    found = _best_box_ious(levels, boxes.double(), thresholds)
    known = shares[:, 0, 0].isfinite() & ~missing(boxes)
    return torch.where(known[:, None], found, math.nan)
