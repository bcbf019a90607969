"""Factors per filter, and sums of weight gradients with them."""

from __future__ import annotations

import torch
from torch import Tensor

from camkernels.ops import _cpu_view, _native

_NARROW = (torch.bfloat16, torch.float16)


def per_filter(values: Tensor, like: Tensor) -> Tensor:
    """(K,) beside a weight (K, C, kh, kw), or a bias."""
    return values.to(like.dtype).view(-1, *(1,) * (like.dim() - 1))


def add_scaled(
    value: Tensor | None, other: Tensor, scale: Tensor | None, dtype: torch.dtype, backend: str
) -> Tensor:
    """value + scale other in ``dtype``; may be written into either.

    The second-order gradient of a weight is a sum of two, of which one lacks gamma rstd; under
    autocast both come in 16 bits and leave in float32. On the CPU that is one pass then.

    Args:
        value, other: (K, C, kh, kw); no value: zero. scale: (K,) float32 or float64; none: one.
        backend: ``"cpu"`` runs the C++ kernel where it applies.
    """
    narrow = dtype == torch.float32 and other.dtype in _NARROW and _rows_alike(value, other)
    if narrow and backend in ("cpu", "meta"):
        return _add_narrow(value, other, scale, backend)
    other = other.to(dtype)
    if value is None:
        return other if scale is None else other.mul_(per_filter(scale, other))
    value = value.to(dtype)
    return value.add_(other) if scale is None else value.addcmul_(other, per_filter(scale, other))


def _rows_alike(value: Tensor | None, other: Tensor) -> bool:
    """Whether filters lie one behind the other, in both tensors alike."""
    dense = other.is_contiguous() or other.is_contiguous(memory_format=torch.channels_last)
    return dense and (
        value is None or (value.stride() == other.stride() and value.dtype == other.dtype)
    )


def _add_narrow(value: Tensor | None, other: Tensor, scale: Tensor | None, backend: str) -> Tensor:
    out = torch.empty_like(other, dtype=torch.float32)
    if backend == "meta" or other.numel() == 0:
        return out
    from camkernels import _cpu

    factors = None if scale is None else _native.dense(scale, torch.float32)
    value_at, scale_at = _native.pointers([value, factors])
    _cpu.add_scaled(
        value_at, other.data_ptr(), scale_at, out.data_ptr(), other.shape[0],
        other.numel() // other.shape[0], _native.DTYPE_CODES[other.dtype],
        _cpu_view.threads(other.numel()),
    )  # fmt: skip
    return out
