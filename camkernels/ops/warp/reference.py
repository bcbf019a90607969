"""Crop, resize and flip in plain PyTorch: the oracle of the kernels beside it.

Shapes: source (B, C, h, w), boxes (B, 4) int64 as top, left, height, width, flips (B,) bool. The
source is first resized to ``via`` = (H0, W0), whose pixels the boxes count, then cut, resized to
``size`` = (H, W), then mirrored left to right where ``flips`` says so; both resizes bilinear with
align_corners=False. All of it is linear and separable:

    out = P source Q^T,  P (B, H, h), Q (B, W, w), rows summing to 1

P has up to four entries per row: two pixels of the resized source, each between two pixels of the
source. Nothing of the size (H0, W0) is made. As in PyTorch, the crop is resized by itself: what
lies outside the box does not leak in. A box that is empty or leaves the picture makes its sample
NaN: kernels on a GPU cannot raise; see ``boxes_are_valid``.
"""

from __future__ import annotations

import torch
from torch import Tensor

Size = tuple[int, int]


def boxes_are_valid(boxes: Tensor, via: Size) -> Tensor:
    """(B,) bool."""
    top, left, height, width = boxes.unbind(1)
    # what is compared cannot overflow, as top + height could
    inside = (top >= 0) & (left >= 0) & (height <= via[0] - top) & (width <= via[1] - left)
    return inside & (height > 0) & (width > 0)


def _pairs(position: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The two pixels that a position lies between, kept within first to last, and the second's
    share."""
    position = torch.minimum(torch.maximum(position, first), last)
    below = position.floor()
    return below, torch.minimum(below + 1, last), position - below


def matrix(
    begin: Tensor, length: Tensor, flips: Tensor | None, source: int, via: int, size: int
) -> Tensor:
    """P or Q, (B, size, source) float64.

    Args:
        begin, length: of the box along this axis, (B,). flips: (B,), or None where the axis is not
            mirrored.
        source, via, size: pixels of the source, of the picture that boxes are counted in, and of
            the output.
    """
    begin, length = begin.double()[:, None], length.double()[:, None]
    index = torch.arange(size, dtype=torch.float64, device=begin.device).expand(len(begin), -1)
    if flips is not None:
        index = torch.where(flips[:, None], size - 1 - index, index)
    position = begin + (index + 0.5) * (length / size) - 0.5
    one, other, share = _pairs(position, begin, begin + length - 1)
    columns = torch.arange(source, dtype=torch.float64, device=begin.device)
    zero, last = torch.zeros_like(begin), torch.full_like(begin, source - 1)
    found = torch.zeros(*index.shape, source, dtype=torch.float64, device=begin.device)
    for pixel, weight in ((one, 1 - share), (other, share)):
        low, high, part = _pairs((pixel + 0.5) * (source / via) - 0.5, zero, last)
        for column, factor in ((low, weight * (1 - part)), (high, weight * part)):
            found = found + (column[..., None] == columns) * factor[..., None]
    return found


def matrices(
    boxes: Tensor, flips: Tensor, source: Size, via: Size, size: Size, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """P (B, H, h) and Q (B, W, w); NaN where a box is not valid."""
    top, left, height, width = boxes.unbind(1)
    rows = matrix(top, height, None, source[0], via[0], size[0])
    columns = matrix(left, width, flips, source[1], via[1], size[1])
    valid = boxes_are_valid(boxes, via)[:, None, None]
    return torch.where(valid, rows, float("nan")).to(dtype), columns.to(dtype)


def warp(source: Tensor, boxes: Tensor, flips: Tensor, via: Size, size: Size) -> Tensor:
    """(B, C, H, W) in the dtype of the source, differentiable in it."""
    dtype = torch.float64 if source.dtype == torch.float64 else torch.float32
    shape = (source.shape[2], source.shape[3])
    rows, columns = matrices(boxes, flips, shape, via, size, dtype)
    values = source.to(dtype)
    return (rows[:, None] @ values @ columns[:, None].transpose(2, 3)).to(source.dtype)


def warp_fwd(source: Tensor, boxes: Tensor, flips: Tensor, via: Size, size: Size) -> Tensor:
    return warp(source, boxes, flips, via, size)


def warp_bwd(grad: Tensor, boxes: Tensor, flips: Tensor, shape: Size, via: Size) -> Tensor:
    """The cotangent of the source, (B, C, h, w) in the dtype of ``grad``: P^T grad Q.

    Args:
        grad: (B, C, H, W). shape: h, w.
    """
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    size = (grad.shape[2], grad.shape[3])
    rows, columns = matrices(boxes, flips, shape, via, size, dtype)
    return (rows[:, None].transpose(2, 3) @ grad.to(dtype) @ columns[:, None]).to(grad.dtype)
