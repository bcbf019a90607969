"""Similarity of two low-resolution maps after warping one and enlarging the other, in plain
PyTorch: the oracle of the kernels beside it.

    U = warp(maps; boxes, flips, via, size),  V = resize(others, size),  value = SSIM(U, V)

(``ops/warp/reference.py``, ``ops/ssim/reference.py``). Kernels make U and V in pieces and store
neither.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from camkernels.ops.ssim import reference as ssim
from camkernels.ops.warp import reference as warp

Size = tuple[int, int]


def enlarged(others: Tensor, size: Size) -> Tensor:
    """V (B, 1, H, W)."""
    boxes = torch.tensor([0, 0, *size], device=others.device).expand(len(others), -1)
    flips = torch.zeros(len(others), dtype=torch.bool, device=others.device)
    return warp.warp(others[:, None], boxes, flips, size, size)


def warped_ssim_fwd(
    maps: Tensor,
    others: Tensor,
    boxes: Tensor,
    flips: Tensor,
    via: Size,
    size: Size,
    rows: Sequence[float],
    columns: Sequence[float],
    c1: float,
    c2: float,
    same: bool,
) -> Tensor:
    """(B,) float32 (float64 for float64), from maps (B, h, w) and others (B, h', w')."""
    wide = torch.float64 if maps.dtype == torch.float64 else torch.float32
    u = warp.warp(maps[:, None].to(wide), boxes, flips, via, size)
    v = enlarged(others.to(wide), size)
    return ssim.ssim_fwd(u, v, rows, columns, c1, c2, same)


def warped_ssim_bwd(
    grad: Tensor,
    maps: Tensor,
    others: Tensor,
    boxes: Tensor,
    flips: Tensor,
    via: Size,
    size: Size,
    rows: Sequence[float],
    columns: Sequence[float],
    c1: float,
    c2: float,
    same: bool,
    want_maps: bool,
    want_others: bool,
) -> tuple[Tensor, Tensor]:
    """Cotangents of maps and others (empty where not wanted), in their dtypes."""

    def value(maps: Tensor, others: Tensor) -> Tensor:
        return warped_ssim_fwd(maps, others, boxes, flips, via, size, rows, columns, c1, c2, same)

    _, pull, *_ = torch.func.vjp(value, maps, others)
    to_maps, to_others = pull(grad)
    return (
        to_maps if want_maps else maps.new_empty(0),
        to_others if want_others else others.new_empty(0),
    )
