"""The chain warp_fwd -> warp_bwd -> warp_fwd: linear, each differentiates into the other."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from camkernels.ops._chain import Link

_SCHEMA = "Tensor boxes, Tensor flips, int[] {}, int[] {}, str backend) -> Tensor"


def _fwd_fake(source: Tensor, boxes: Tensor, flips: Tensor, via: Any, size: Any) -> Tensor:
    return source.new_empty((*source.shape[:2], *size))


def _fwd_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    source, boxes, flips, ctx.via, _, ctx.backend = inputs
    ctx.shape = tuple(source.shape[2:])
    ctx.save_for_backward(boxes, flips)
    ctx.set_materialize_grads(False)


def _fwd_backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 6
    boxes, flips = ctx.saved_tensors
    found = warp_bwd(grad, boxes, flips, ctx.shape, ctx.via, backend=ctx.backend)
    return found, None, None, None, None, None


def _bwd_fake(grad: Tensor, boxes: Tensor, flips: Tensor, shape: Any, via: Any) -> Tensor:
    return grad.new_empty((*grad.shape[:2], *shape))


def _bwd_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, boxes, flips, _, ctx.via, ctx.backend = inputs
    ctx.size = tuple(grad.shape[2:])
    ctx.save_for_backward(boxes, flips)
    ctx.set_materialize_grads(False)


def _bwd_backward(ctx: Any, cotangent: Tensor | None) -> tuple[Any, ...]:
    if cotangent is None:
        return (None,) * 6
    boxes, flips = ctx.saved_tensors
    found = warp_fwd(cotangent, boxes, flips, ctx.via, ctx.size, backend=ctx.backend)
    return found, None, None, None, None, None


warp_fwd = Link(
    "warp",
    "warp_fwd",
    "(Tensor source, " + _SCHEMA.format("via", "size"),
    leader=0,
    fake=_fwd_fake,
    setup_context=_fwd_setup,
    backward=_fwd_backward,
)
warp_bwd = Link(
    "warp",
    "warp_bwd",
    "(Tensor grad, " + _SCHEMA.format("shape", "via"),
    leader=0,
    fake=_bwd_fake,
    setup_context=_bwd_setup,
    backward=_bwd_backward,
)
