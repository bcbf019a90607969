"""relu by the CUDA kernels of csrc/relu. Signatures: reference.py."""

from __future__ import annotations

import torch
from torch import Tensor

from camkernels.ops import _cuda_launch as host
from camkernels.ops._native import DTYPE_CODES


def relu_fwd(u: Tensor, inplace: bool, want_mask: bool) -> tuple[Tensor, Tensor]:
    v = u if inplace else torch.empty_like(u)
    mask = u.new_empty(-(-u.numel() // 8) if want_mask else 0, dtype=torch.uint8)
    host.run(
        "relu_fwd", (u,),
        u.data_ptr(), v.data_ptr(), mask.data_ptr() if want_mask else 0,
        u.numel(), DTYPE_CODES[u.dtype],
    )  # fmt: skip
    return v, mask


def relu_bwd(grad: Tensor, kept: Tensor, guided: bool) -> Tensor:
    grad_u = torch.empty_like(grad)
    by_mask = kept.dtype == torch.uint8
    host.run(
        "relu_bwd", (grad, kept),
        grad.data_ptr(), kept.data_ptr() if by_mask else 0, 0 if by_mask else kept.data_ptr(),
        grad_u.data_ptr(), grad.numel(), DTYPE_CODES[grad.dtype], guided,
    )  # fmt: skip
    return grad_u
