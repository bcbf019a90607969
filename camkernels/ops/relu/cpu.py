"""relu by the C++ kernels of csrc/relu. Signatures: reference.py."""

from __future__ import annotations

import torch
from torch import Tensor

from camkernels import _cpu
from camkernels.ops import _cpu_view
from camkernels.ops._native import DTYPE_CODES

_ALIGNMENT = 64  # of what is stored past the caches


def _streams(out: Tensor) -> bool:
    return _cpu_view.streams(out.numel(), out.dtype) and out.data_ptr() % _ALIGNMENT == 0


def relu_fwd(u: Tensor, inplace: bool, want_mask: bool) -> tuple[Tensor, Tensor]:
    v = u if inplace else torch.empty_like(u)
    mask = u.new_empty(-(-u.numel() // 8) if want_mask else 0, dtype=torch.uint8)
    _cpu.relu_fwd(
        u.data_ptr(),
        v.data_ptr(),
        mask.data_ptr() if want_mask else 0,
        u.numel(),
        DTYPE_CODES[u.dtype],
        not inplace and _streams(v),
        _cpu_view.threads(u.numel()),
    )
    return v, mask


def relu_bwd(grad: Tensor, kept: Tensor, guided: bool) -> Tensor:
    grad_u = torch.empty_like(grad)
    by_mask = kept.dtype == torch.uint8
    _cpu.relu_bwd(
        grad.data_ptr(),
        kept.data_ptr() if by_mask else 0,
        0 if by_mask else kept.data_ptr(),
        grad_u.data_ptr(),
        grad.numel(),
        DTYPE_CODES[grad.dtype],
        guided,
        _streams(grad_u),
        _cpu_view.threads(grad.numel()),
    )
    return grad_u
