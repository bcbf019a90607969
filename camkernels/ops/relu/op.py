"""ReLU whose backward is plain or guided, as the mode at backward time says.

The plain backward is linear in the gradient, with the same mask: it is its own derivative, to any
order. Kernels see dense memory only, in whatever order: what is not dense (a slice, an expanded
tensor) is gathered into the output and rectified there, so that no temporary is made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from camkernels import backends, modes
from camkernels.ops import _chain, _validate
from camkernels.ops.batch_norm_relu.norm import GUIDED_TWICE

SAVES = ("mask", "output")


def is_dense(tensor: Tensor) -> bool:
    """Whether every element of a block of memory is held once: no holes, no overlap."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda p: p[1]):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def _kernels_take(u: Tensor) -> bool:
    return is_dense(u) and not u.is_neg()


def _lies_as(tensor: Tensor, stride: tuple[int, ...]) -> bool:
    """Whether its elements lie in the order of ``stride`` (a dimension of one entry has none)."""
    return tensor.stride() == stride or all(
        own == other or size == 1
        for size, own, other in zip(tensor.shape, tensor.stride(), stride, strict=True)
    )


def _relaid(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    """``tensor`` itself where it lies as the output did, otherwise a copy that does."""
    if _lies_as(tensor, stride) and not tensor.is_neg():
        return tensor
    moved = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device)
    return moved.copy_(tensor)


def _kernel(name: str, backend: str) -> Callable[..., Any]:
    """Where a dispatch mode traces, tensors may hold no data, and no kernel may read them; what
    only allocates (a ledger is such a mode) reads none."""
    traced = _chain._is_traced() and backend != "meta"
    return _chain.implementation("relu", name, "reference" if traced else backend)


def _run_backward(
    grad: Tensor, kept: Tensor, stride: tuple[int, ...], guided: bool, backend: str
) -> Tensor:
    grad_u: Tensor = _kernel("relu_bwd", backend)(_relaid(grad, stride), kept, guided)
    return grad_u


class ReLUBackwardFunction(torch.autograd.Function):
    """The plain backward, linear in ``grad``: its backward is itself."""

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, kept: Tensor, stride: tuple[int, ...], backend: str
    ) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.stride, ctx.backend = stride, backend
        ctx.set_materialize_grads(False)
        return _run_backward(grad, kept, stride, False, backend)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        (kept,) = ctx.saved_tensors
        if modes.guided_now():
            raise RuntimeError(GUIDED_TWICE)
        return _plain(grad, kept, ctx.stride, ctx.backend), None, None, None


def _plain(
    grad: Tensor | None, kept: Tensor, stride: tuple[int, ...], backend: str
) -> Tensor | None:
    if grad is None:
        return None
    if torch.is_grad_enabled():
        return ReLUBackwardFunction.apply(grad, kept.detach(), stride, backend)
    return _run_backward(grad, kept, stride, False, backend)


class ReLUFunction(torch.autograd.Function):
    """Keeps a mask of one bit per element where ``want_mask``, otherwise the output."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, inplace: bool, want_mask: bool, backend: str) -> Tensor:
        kernel = _kernel("relu_fwd", backend)
        if _kernels_take(u):
            v, mask = kernel(u, inplace, want_mask)
        else:
            v, mask = kernel(torch.empty_like(u).copy_(u), True, want_mask)
        ctx.stride, ctx.backend = v.stride(), backend
        if inplace:
            ctx.mark_dirty(u)
            v = u if v is u else u.copy_(v)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(mask if want_mask else v)
        ctx.set_materialize_grads(False)
        return v

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        (kept,) = ctx.saved_tensors
        if not modes.guided_now():
            return _plain(grad, kept, ctx.stride, ctx.backend), None, None, None
        if grad is not None:
            grad = _run_backward(grad, kept, ctx.stride, True, ctx.backend)
        return grad, None, None, None


def _check_inplace(u: Tensor) -> None:
    """What PyTorch refuses before it writes; a Function notices only when all is written."""
    if not (torch.is_grad_enabled() and u.requires_grad):
        return
    base = u._base if u._is_view() else None
    if u.is_leaf or (base is not None and base.is_leaf and base.requires_grad):
        what = "a leaf" if u.is_leaf else "a view of a leaf"
        raise RuntimeError(
            f"relu: {what} Variable that requires grad is being used in an in-place operation"
        )


def relu(input: Tensor, inplace: bool = False, save: str = "mask") -> Tensor:
    """See camkernels.nn.functional.relu."""
    if save not in SAVES:
        raise ValueError(f"save: unknown {save!r}, allowed are {', '.join(SAVES)}")
    u = _validate.floating("input", input)
    if inplace:
        _check_inplace(u)
    want_mask = torch.is_grad_enabled() and u.requires_grad
    # In place, what a kernel cannot take as it lies is no output that a kernel could read later.
    want_mask = want_mask and (save == "mask" or (inplace and not _kernels_take(u)))
    backend = backends.resolve_network(u.device, u.dtype)
    v: Tensor = ReLUFunction.apply(u, inplace, want_mask, backend)
    return v
