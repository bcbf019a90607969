"""Min-max normalisation of maps in plain PyTorch: the oracle of the kernels beside it.

Shapes: maps M (B, h, w), extremes (B, 2) = min M, max M, R = max M - min M.

    N = (M - min M) / R;  with N' a cotangent of N, M gets N' / R,
    the minimum also sum N' (N - 1) / R, the maximum also - sum N' N / R

Pixels that tie for an extreme share what it gets. A map with R not above the smallest normal number
is constant: N = 0 and no gradient. A sample with NaN or Inf is NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _wide(maps: Tensor) -> Tensor:
    return maps if maps.dtype == torch.float64 else maps.float()


def is_constant(extremes: Tensor) -> Tensor:
    """(B, 1, 1) bool; a range that is NaN is none."""
    return ((extremes[:, 1] - extremes[:, 0]) <= torch.finfo(extremes.dtype).tiny)[:, None, None]


def min_max_fwd(maps: Tensor) -> tuple[Tensor, Tensor]:
    """N and the extremes, float32 (float64 for float64), differentiable in M."""
    values = _wide(maps)
    if not len(values):
        return values.clone(), values.new_empty((0, 2))
    low, high = values.amin((1, 2)), values.amax((1, 2))
    extremes = torch.stack([low, high], 1)
    constant = is_constant(extremes.detach())
    span = (high - low)[:, None, None]
    visible = (span - span).detach()  # NaN where the range is not finite
    normalized = (values - low[:, None, None]) / torch.where(constant, 1.0, span) + visible
    return torch.where(constant, 0.0, normalized), extremes


def min_max_bwd(grad: Tensor, maps: Tensor, extremes: Tensor) -> Tensor:
    """The cotangent of M, in its dtype."""
    values = _wide(maps)
    low, high = (e[:, None, None] for e in extremes.unbind(1))
    constant = is_constant(extremes.detach())
    span = torch.where(constant, 1.0, high - low)
    normalized = (values - low) / span
    to_low = (grad * (normalized - 1)).sum((1, 2), keepdim=True)
    to_high = -(grad * normalized).sum((1, 2), keepdim=True)
    at_low, at_high = ((values == e).to(values.dtype) for e in (low, high))
    shares = (at / at.sum((1, 2), keepdim=True).clamp(min=1) for at in (at_low, at_high))
    total = grad + sum(t * s for t, s in zip((to_low, to_high), shares, strict=True))
    return torch.where(constant, 0.0, total / span).to(maps.dtype)
