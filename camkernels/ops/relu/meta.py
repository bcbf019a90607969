"""What the C++ kernels of relu allocate, on the meta device: for predictions of memory.
Signatures: reference.py."""

from __future__ import annotations

import torch
from torch import Tensor


def relu_fwd(u: Tensor, inplace: bool, want_mask: bool) -> tuple[Tensor, Tensor]:
    mask = u.new_empty(-(-u.numel() // 8) if want_mask else 0, dtype=torch.uint8)
    return u if inplace else torch.empty_like(u), mask


def relu_bwd(grad: Tensor, kept: Tensor, guided: bool) -> Tensor:
    return torch.empty_like(grad)
