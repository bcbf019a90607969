"""The best box at every threshold, in plain PyTorch: the oracle of the kernel beside it.

Shapes: levels (B, H, W) int32, of each pixel how many of T thresholds, in ascending order, it
reaches; boxes (B, 4) float64 as top, left, height, width.

    ious[b, t] = max over the segments s of {levels[b] > t} of IoU(box around s, boxes[b])

A segment is made of pixels that touch at an edge or a corner; 0 where there is none. No gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Pixels of the masks that are held at a time; about a hundred bytes each.
_PIXELS = 2**21


def best_box_ious(levels: Tensor, boxes: Tensor, thresholds: int) -> Tensor:
    """ious (B, T) float64."""
    batch, height, width = levels.shape
    cells = torch.arange(batch * thresholds, device=levels.device)
    found = [boxes.new_zeros(0)]
    for chunk in cells.split(max(1, _PIXELS // max(1, height * width))):
        owner = chunk // thresholds
        marked = levels[owner] > (chunk % thresholds)[:, None, None]
        found.append(_best(marked, boxes[owner]))
    return torch.cat(found).view(batch, thresholds)


def _best(marked: Tensor, boxes: Tensor) -> Tensor:
    """(N,) of masks (N, H, W) and boxes (N, 4)."""
    count, height, width = marked.shape
    index = segments(marked).flatten(1)
    rows = torch.arange(height, device=marked.device).repeat_interleave(width).expand_as(index)
    columns = torch.arange(width, device=marked.device).repeat(height).expand_as(index)
    edges = []
    for line, start, reduce in (
        (rows, height, "amin"), (columns, width, "amin"), (rows, -1, "amax"), (columns, -1, "amax"),
    ):  # fmt: skip
        edge = index.new_full((count, height * width + 1), start)
        edges.append(edge.scatter_reduce_(1, index, line, reduce)[:, 1:].double())
    top, left, bottom, right = edges
    y, x, h, w = (edge[:, None] for edge in boxes.unbind(1))
    common = (torch.minimum(bottom + 1, y + h) - torch.maximum(top, y)).clamp(min=0)
    common = common * (torch.minimum(right + 1, x + w) - torch.maximum(left, x)).clamp(min=0)
    union = (bottom + 1 - top) * (right + 1 - left) + h * w - common
    # Numbers that no segment has are left with a bottom above their top.
    return torch.where(bottom >= top, common / union, 0.0).amax(1)


def segments(marked: Tensor) -> Tensor:
    """Numbers (N, H, W) int64 of the segments of masks, from 1; 0 outside of them.

    Each pixel takes the highest number around it, and then that of the pixel so numbered, until
    nothing changes: the rounds grow with the windings of a segment, not with its length.
    """
    count, height, width = marked.shape
    numbers = torch.arange(1, height * width + 1, device=marked.device).view(1, height, width)
    labels = torch.where(marked, numbers, 0)
    while True:
        # Exact in float64, in which pooling is to be had on every device.
        spread = F.max_pool2d(labels.double()[:, None], 3, 1, 1)[:, 0].long()
        spread = torch.where(marked, spread, 0).flatten(1)
        if torch.equal(spread, labels.flatten(1)):
            return labels
        # The pixel that a segment was numbered by learns of the higher number, then tells its own.
        table = F.pad(spread, (1, 0))
        table = table.scatter_reduce(1, labels.flatten(1), spread, "amax")
        table[:, 0] = 0
        for _ in range(2):
            table = table.gather(1, table)
        labels = table[:, 1:].view(count, height, width)
