"""The chain cam_pixels_fwd -> cam_pixels_bwd -> reference formula."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from camkernels.ops import _layout
from camkernels.ops._chain import Link, reference_vjp
from camkernels.ops.cam_pixels import reference
from camkernels.ops.cam_weights.op import empty_as


def _fwd_fake(activations: Tensor, gradients: Tensor, positive: bool, relu: bool) -> Tensor:
    batch, _, height, width = activations.shape
    dtype = _layout.accumulate_dtype(activations.dtype)
    return activations.new_empty((batch, height, width), dtype=dtype)


def _fwd_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    activations, gradients, ctx.positive, relu, ctx.backend = inputs
    ctx.save_for_backward(activations, gradients, output if relu else None)
    ctx.set_materialize_grads(False)


def _fwd_backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return None, None, None, None, None
    activations, gradients, maps = ctx.saved_tensors
    wanted: Any = ctx.needs_input_grad[:2]
    # The ReLU's mask is constant almost everywhere: no gradient to maps.
    known = None if maps is None else maps.detach()
    arguments: Any = (grad, activations, gradients, known, ctx.positive, *wanted)
    found = cam_pixels_bwd(*arguments, backend=ctx.backend)
    return *(g if w else None for g, w in zip(found, wanted, strict=True)), None, None, None


def _bwd_fake(
    grad_maps: Tensor, activations: Tensor, gradients: Tensor, maps: Tensor | None, positive: bool,
    want_activations: bool, want_gradients: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return empty_as(activations, want_activations), empty_as(gradients, want_gradients)


def _bwd_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    grad_maps, activations, gradients, maps, ctx.positive, ctx.want_a, ctx.want_g, _ = inputs
    ctx.save_for_backward(grad_maps, activations, gradients, maps)
    ctx.set_materialize_grads(False)


def _bwd_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    grad_maps, activations, gradients, maps = ctx.saved_tensors

    def formula(grad: Tensor, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return reference.cam_pixels_bwd(grad, a, g, maps, ctx.positive, ctx.want_a, ctx.want_g)

    used = [c if w else None for c, w in zip(cotangents, (ctx.want_a, ctx.want_g), strict=True)]
    found = reference_vjp(
        formula, (grad_maps, activations, gradients), ctx.needs_input_grad[:3], used
    )
    return *found, None, None, None, None, None


cam_pixels_fwd = Link(
    "cam_pixels",
    "cam_pixels_fwd",
    "(Tensor activations, Tensor gradients, bool positive, bool relu, str backend) -> Tensor",
    leader=0,
    fake=_fwd_fake,
    setup_context=_fwd_setup,
    backward=_fwd_backward,
)
cam_pixels_bwd = Link(
    "cam_pixels",
    "cam_pixels_bwd",
    "(Tensor grad_maps, Tensor activations, Tensor gradients, Tensor? maps, bool positive, "
    "bool want_activations, bool want_gradients, str backend) -> (Tensor, Tensor)",
    leader=1,
    fake=_bwd_fake,
    setup_context=_bwd_setup,
    backward=_bwd_backward,
)
