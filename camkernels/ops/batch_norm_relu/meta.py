"""What the C++ kernels of batch_norm_relu allocate, on the meta device: for predictions of memory.
Signatures: reference.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from camkernels.ops import _layout


def _like(z: Tensor) -> Tensor:
    layout = _layout.memory_format(_layout.is_channels_last(z))
    return torch.empty_like(z, memory_format=layout)


def _sums(z: Tensor, count: int) -> Tensor:
    return z.new_empty((count, z.shape[1]), dtype=_layout.accumulate_dtype(z.dtype))


def bn_stats(z: Tensor) -> tuple[Tensor, Tensor]:
    mean, squares = _sums(z, 2).unbind(0)
    return mean, squares


def bn_fwd(
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    want_mask: bool,
) -> tuple[Tensor, Tensor]:
    return _like(z), z.new_empty(-(-z.numel() // 8) if want_mask else 0, dtype=torch.uint8)


def bn_bwd_reduce(grad: Tensor, z: Tensor, *rest: Any) -> Tensor:
    return _sums(z, 2)


def bn_bwd(grad: Tensor, z: Tensor, *rest: Any, inplace: bool = False) -> tuple[Tensor, Tensor]:
    want_residual = rest[-1]
    if inplace:
        return (_like(z), grad) if want_residual else (grad, z.new_empty(0))
    return _like(z), _like(z) if want_residual else z.new_empty(0)


def bn_bwd_bwd_reduce(grad_grad: Tensor, grad_prime: Tensor, z: Tensor, *rest: Any) -> Tensor:
    return _sums(z, 3)


def bn_bwd_bwd(
    grad_grad: Tensor,
    grad_grad_residual: Tensor | None,
    grad_prime: Tensor,
    z: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    inplace, reuse_prime = rest[-2:]
    return grad_grad if inplace else _like(z), grad_prime if reuse_prime else _like(z)
