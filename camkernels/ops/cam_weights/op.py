"""The chain cam_weights_fwd -> cam_weights_bwd -> reference formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from camkernels.ops import _layout
from camkernels.ops._chain import Link, reference_vjp
from camkernels.ops.cam_weights import reference


def empty_as(like: Tensor, wanted: bool) -> Tensor:
    """A cotangent of ``like``, unwritten; empty where not wanted."""
    if not wanted:
        return like.new_empty(0)
    return torch.empty(
        like.shape,
        dtype=like.dtype,
        device=like.device,
        memory_format=_layout.memory_format(_layout.is_channels_last(like)),
    )


def _fwd_fake(activations: Tensor, gradients: Tensor, method: str, eps: float) -> Tensor:
    dtype = _layout.accumulate_dtype(activations.dtype)
    return activations.new_empty(activations.shape[:2], dtype=dtype)


def _fwd_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    activations, gradients, *ctx.options, ctx.backend = inputs
    ctx.save_for_backward(activations, gradients)
    ctx.set_materialize_grads(False)


def _fwd_backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return None, None, None, None, None
    wanted: Any = ctx.needs_input_grad[:2]
    arguments: Any = (grad, *ctx.saved_tensors, *ctx.options, *wanted)
    found = cam_weights_bwd(*arguments, backend=ctx.backend)
    return *(g if w else None for g, w in zip(found, wanted, strict=True)), None, None, None


def _bwd_fake(
    grad: Tensor, activations: Tensor, gradients: Tensor, method: str, eps: float,
    want_activations: bool, want_gradients: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return empty_as(activations, want_activations), empty_as(gradients, want_gradients)


def _bwd_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    grad, activations, gradients, *ctx.options, ctx.want_a, ctx.want_g, _ = inputs
    ctx.save_for_backward(grad, activations, gradients)
    ctx.set_materialize_grads(False)


def _bwd_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    options: Any = (*ctx.options, ctx.want_a, ctx.want_g)

    def formula(grad: Tensor, activations: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
        return reference.cam_weights_bwd(grad, activations, gradients, *options)

    used = [c if w else None for c, w in zip(cotangents, (ctx.want_a, ctx.want_g), strict=True)]
    found = reference_vjp(formula, ctx.saved_tensors, ctx.needs_input_grad[:3], used)
    return *found, None, None, None, None, None


cam_weights_fwd = Link(
    "cam_weights",
    "cam_weights_fwd",
    "(Tensor activations, Tensor gradients, str method, float eps, str backend) -> Tensor",
    leader=0,
    fake=_fwd_fake,
    setup_context=_fwd_setup,
    backward=_fwd_backward,
)
cam_weights_bwd = Link(
    "cam_weights",
    "cam_weights_bwd",
    "(Tensor grad, Tensor activations, Tensor gradients, str method, float eps, "
    "bool want_activations, bool want_gradients, str backend) -> (Tensor, Tensor)",
    leader=1,
    fake=_bwd_fake,
    setup_context=_bwd_setup,
    backward=_bwd_backward,
)
