"""lp_norm by the C++ kernels of csrc/lp_norm. Signatures: reference.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from camkernels import _cpu
from camkernels.ops import _cpu_view, _layout, _native
from camkernels.ops.warp.cpu import taps_bytes


def planes(values: Tensor) -> Tensor:
    """(B, h, w) as it is; other ranks as one row per sample, copied where that has no strides."""
    if values.dim() == 3:
        return values
    return values.reshape(values.shape[0], 1, values.shape[1:].numel())


def _run(values: Tensor, p: float, size: Sequence[int], *tensors: Tensor) -> None:
    """``tensors``: norms; of the backward, cotangents of the norms and the output too."""
    values = planes(_native.resolved(values))
    wide = _layout.accumulate_dtype(values.dtype)
    height, width = size or values.shape[1:]
    numbers = 2 * width + values.shape[1] * (2 * width + values.shape[2]) + values.shape[2]
    each = -(-(taps_bytes(width, wide) + numbers * wide.itemsize) // 64) * 64
    threads = _cpu_view.threads(len(values) * height * width)
    scratch = values.new_empty(each * threads, dtype=torch.uint8)
    norms, *rest = tensors
    more: list[Any] = _native.pointers(rest) if rest else [0, 0]
    _cpu.lp_norm(
        tuple(values.shape), (height, width), bool(size), values.data_ptr(),
        _native.DTYPE_CODES[values.dtype], values.stride(), p, norms.data_ptr(), *more,
        scratch.data_ptr(), each, threads,
    )  # fmt: skip


def lp_norm_fwd(values: Tensor, p: float, size: Sequence[int]) -> Tensor:
    norms = values.new_empty(len(values), dtype=_layout.accumulate_dtype(values.dtype))
    _run(values, p, size, norms)
    return norms


def lp_norm_bwd(
    grad_norms: Tensor, values: Tensor, norms: Tensor, p: float, size: Sequence[int]
) -> Tensor:
    wide = _layout.accumulate_dtype(values.dtype)
    out = values.new_empty(values.shape)
    known, grads = _native.dense(norms, wide), _native.dense(grad_norms, wide)
    _run(values, p, size, known, grads, out)
    return out
