"""p-norms per sample in plain PyTorch: the oracle of the kernels beside it.

    norm = (sum |v|^p)^(1/p);   v gets sign(v) (|v| / norm)^(p - 1)

p = 0 counts what is not zero and has no gradient; p = inf is the largest magnitude, whose gradient
ties share. A zero norm has no gradient, nor has v = 0. With ``size`` (empty: none) v are maps
(B, h, w) that are first enlarged, V = P v Q^T (``ops/warp/reference.py``).

Source: Staying Consistent with GradCAM, eq. 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from camkernels.ops.warp import reference as warp


def check_order(p: object) -> None:
    """
    Raises:
        ValueError: not a number that is 0 or at least 1.
    """
    valid = isinstance(p, (int, float)) and not isinstance(p, bool) and (p == 0 or p >= 1)
    if not valid:
        raise ValueError(f"p: expected 0, a number from 1 on, or inf, got {p!r}")


def _matrices(values: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """P (H, h) and Q (W, w)."""
    found = []
    for axis, length in enumerate(size):
        begin = torch.zeros(1, device=values.device)
        whole = torch.full((1,), length, device=values.device)
        source = values.shape[1 + axis]
        found.append(warp.matrix(begin, whole, None, source, length, length)[0].to(values.dtype))
    return found[0], found[1]


def _rows(values: Tensor, size: Sequence[int]) -> Tensor:
    """(B, n) in the type of the sums."""
    values = values if values.dtype == torch.float64 else values.float()
    if size:
        down, across = _matrices(values, size)
        values = down @ values @ across.t()
    return values.flatten(1)


def _powers(rows: Tensor, unit: Tensor, exponent: float) -> Tensor:
    """(|v| / unit)^exponent, 0 with a derivative of 0 where v is 0."""
    zero = rows == 0
    ratio = torch.where(zero, 1.0, rows.abs()) / unit[:, None]
    return torch.where(zero, 0.0, ratio**exponent)


def lp_norm_fwd(values: Tensor, p: float, size: Sequence[int]) -> Tensor:
    """(B,) float32 (float64 for float64), differentiable in the values."""
    rows = _rows(values, size)
    if p == 0:
        counted = (rows != 0).to(rows.dtype).sum(1)
        return counted + (rows.detach() - rows.detach()).sum(1) + 0 * rows.sum(1).nan_to_num()
    if not len(rows):
        return rows.sum(1)
    if p == 1:
        return rows.abs().sum(1)
    largest = rows.abs().amax(1)
    if math.isinf(p):
        return largest
    unit = torch.where(largest.detach() == 0, 1.0, largest.detach())
    total = _powers(rows, unit, p).sum(1)
    return torch.where(total == 0, 0.0, unit * torch.where(total == 0, 1.0, total) ** (1 / p))


def lp_norm_bwd(
    grad_norms: Tensor, values: Tensor, norms: Tensor, p: float, size: Sequence[int]
) -> Tensor:
    """The cotangent of the values, in their dtype."""
    rows = _rows(values, size)
    wide = values if values.dtype == torch.float64 else values.float()
    if p == 0 or not len(rows):
        return torch.zeros_like(values, memory_format=torch.contiguous_format)
    unit = torch.where(norms == 0, 1.0, norms)
    if math.isinf(p):
        ties = (rows.abs() == norms[:, None]).to(rows.dtype)
        found = ties / ties.sum(1, keepdim=True).clamp(min=1)
    else:
        found = _powers(rows, unit, p - 1)
    found = found * rows.sign() * torch.where(norms == 0, 0.0, grad_norms)[:, None]
    if size:
        down, across = _matrices(wide, size)
        found = down.t() @ found.unflatten(1, tuple(size)) @ across
    return found.view(values.shape).to(values.dtype)
