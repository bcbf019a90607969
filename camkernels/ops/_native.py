"""What native kernels, C++ and CUDA, are given: pointers, dtype codes, memory that holds values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# As in csrc/common/view.h.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
NO_STRIDES = (0, 0, 0, 0)


def resolved(tensor: Tensor) -> Tensor:
    """Memory that holds the values themselves (a view may be marked as negated)."""
    return tensor.resolve_neg() if tensor.is_neg() else tensor


def dense(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` contiguous in ``dtype``: itself, or a copy. For (B,) and (B, K) sized tensors."""
    tensor = resolved(tensor)
    if tensor.dtype == dtype and tensor.is_contiguous():
        return tensor
    return tensor.to(dtype).contiguous()


def pointers(tensors: Sequence[Tensor | None]) -> list[int]:
    """Addresses; 0 for None. The caller keeps the tensors alive."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
