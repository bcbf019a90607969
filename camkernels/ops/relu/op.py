"""ReLU whose backward is plain or guided, as the mode at backward time says.

The plain backward is linear in the gradient, with the same mask: it is its own derivative, to any
order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from camkernels import modes
from camkernels.ops._chain import implementation


def dense_strides(tensor: Tensor) -> bool:
    """Whether every element of a block of memory is held once: no holes, no overlap."""
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda p: p[1]):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def with_strides_of(grad: Tensor, shape: torch.Size, stride: tuple[int, ...]) -> Tensor:
    """``grad`` itself where it lies as the input did, otherwise a copy that does."""
    if grad.stride() == stride and not grad.is_neg():
        return grad
    moved = torch.empty_strided(shape, stride, dtype=grad.dtype, device=grad.device)
    return moved.copy_(grad)


class ReLUBackwardFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, kept: Tensor, stride: tuple[int, ...], backend: str
    ) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.stride, ctx.backend = stride, backend
        ctx.set_materialize_grads(False)
        grad = with_strides_of(grad, grad.shape, stride)
        return implementation("relu", "relu_bwd", backend)(grad, kept, False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        (kept,) = ctx.saved_tensors
        return _masked(grad, kept, ctx.stride, ctx.backend), None, None, None


def _masked(
    grad: Tensor | None, kept: Tensor, stride: tuple[int, ...], backend: str
) -> Tensor | None:
    if grad is None:
        return None
    if modes.guided_now():
        grad = with_strides_of(grad, grad.shape, stride)
        return implementation("relu", "relu_bwd", backend)(grad, kept, True)
    if torch.is_grad_enabled():
        return ReLUBackwardFunction.apply(grad, kept.detach(), stride, backend)
    grad = with_strides_of(grad, grad.shape, stride)
    return implementation("relu", "relu_bwd", backend)(grad, kept, False)


class ReLUFunction(torch.autograd.Function):
    """``save``: keep the "output", which costs nothing where the next op keeps it too, or the
    "mask", one bit per element."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, inplace: bool, save: str, backend: str) -> Tensor:
        v, mask = implementation("relu", "relu_fwd", backend)(u, inplace, save == "mask")
        if inplace:
            ctx.mark_dirty(u)
        ctx.save_for_backward(mask if save == "mask" else v)
        ctx.stride, ctx.backend = v.stride(), backend
        ctx.set_materialize_grads(False)
        return v

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        (kept,) = ctx.saved_tensors
        return _masked(grad, kept, ctx.stride, ctx.backend), None, None, None
