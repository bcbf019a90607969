"""The chain cam_fwd -> cam_bwd -> reference formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from camkernels.ops import _layout
from camkernels.ops._chain import Link, reference_vjp
from camkernels.ops.cam import reference


def _fwd_fake(activations: Tensor, gradients: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
    batch, _, height, width = activations.shape
    dtype = _layout.accumulate_dtype(activations.dtype)
    maps = activations.new_empty((batch, height, width), dtype=dtype)
    if gradients.dim() == 2:
        return maps, _layout.placeholder(activations)
    return maps, activations.new_empty(activations.shape[:2], dtype=dtype)


def save_for_cam_bwd(
    ctx: Any,
    activations: Tensor,
    gradients: Tensor,
    alpha: Tensor,
    maps: Tensor,
    relu: bool,
    more: tuple[Tensor, ...] = (),
) -> None:
    """Keep what the wanted cotangents need, and no more.

    alpha is saved as an output of the forward: unpacked in the backward it is connected to the
    gradients through this very node, so the gradients need not be kept for a double backward.
    """
    to_activations, to_gradients = ctx.needs_input_grad[:2]
    pooled = gradients.dim() == 4
    ctx.save_for_backward(
        activations if to_gradients else None,
        (alpha if pooled else gradients) if to_activations else None,
        maps if relu and not more else None,
        *more,
    )
    ctx.pooled = pooled
    ctx.gradients_shape, ctx.gradients_dtype = gradients.shape, gradients.dtype
    ctx.activations_dtype = activations.dtype
    ctx.channels_last = _layout.is_channels_last(activations)
    ctx.set_materialize_grads(False)


def grad_to_gradients(ctx: Any, grad_alpha: Tensor | None) -> Tensor | None:
    """Cotangent of G from that of alpha: 1/Z of it at every pixel, as an expanded view."""
    if grad_alpha is None:
        return None
    if not ctx.pooled:
        return grad_alpha.to(ctx.gradients_dtype)
    pixels = ctx.gradients_shape[2] * ctx.gradients_shape[3]
    per_pixel = (grad_alpha / pixels).to(ctx.gradients_dtype)
    return per_pixel[:, :, None, None].expand(ctx.gradients_shape)


def _fwd_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    activations, gradients, relu, ctx.backend = inputs
    maps, alpha = output
    save_for_cam_bwd(ctx, activations, gradients, alpha, maps, relu)


def _fwd_backward(
    ctx: Any, grad_maps: Tensor | None, grad_alpha_out: Tensor | None
) -> tuple[Tensor | None, Tensor | None, None, None]:
    activations, alpha, maps = ctx.saved_tensors
    grad_activations = grad_alpha = None
    if grad_maps is not None and not (activations is None and alpha is None):
        to_activations, to_alpha = cam_bwd(
            grad_maps,
            activations,
            alpha,
            maps,
            ctx.channels_last,
            ctx.activations_dtype,
            backend=ctx.backend,
        )
        grad_activations = to_activations if alpha is not None else None
        grad_alpha = to_alpha if activations is not None else None
    if ctx.pooled and grad_alpha_out is not None:  # only in a double backward
        grad_alpha = grad_alpha_out if grad_alpha is None else grad_alpha + grad_alpha_out
    return grad_activations, grad_to_gradients(ctx, grad_alpha), None, None


def _bwd_fake(
    grad_maps: Tensor,
    activations: Tensor | None,
    alpha: Tensor | None,
    maps: Tensor | None,
    channels_last: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return fake_cam_cotangents(grad_maps, activations, alpha, channels_last, dtype)


def fake_cam_cotangents(
    maps: Tensor,
    activations: Tensor | None,
    alpha: Tensor | None,
    channels_last: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Outputs of cam_bwd and cam_statistics_bwd, uncomputed."""
    to_activations = to_alpha = _layout.placeholder(maps)
    if alpha is not None:
        to_activations = torch.empty(
            (*alpha.shape, *maps.shape[1:]),
            dtype=dtype,
            device=maps.device,
            memory_format=_layout.memory_format(channels_last),
        )
    if activations is not None:
        to_alpha = maps.new_empty(activations.shape[:2])
    return to_activations, to_alpha if to_alpha is not to_activations else to_alpha.clone()


def _bwd_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.channels_last, ctx.dtype, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _bwd_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    grad_maps, activations, alpha, maps = ctx.saved_tensors

    def formula(*tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        grad, values, weights = tensors
        assert grad is not None
        return reference.cam_bwd(grad, values, weights, maps, ctx.channels_last, ctx.dtype)

    gradients = reference_vjp(
        formula, (grad_maps, activations, alpha), ctx.needs_input_grad[:3], cotangents
    )
    # The ReLU's mask is constant almost everywhere: no gradient to maps.
    return (*gradients, None, None, None, None)


cam_fwd = Link(
    "cam",
    "cam_fwd",
    "(Tensor activations, Tensor gradients, bool relu, str backend) -> (Tensor, Tensor)",
    leader=0,
    fake=_fwd_fake,
    setup_context=_fwd_setup,
    backward=_fwd_backward,
)
cam_bwd = Link(
    "cam",
    "cam_bwd",
    "(Tensor grad_maps, Tensor? activations, Tensor? alpha, Tensor? maps, bool channels_last, "
    "ScalarType dtype, str backend) -> (Tensor, Tensor)",
    leader=0,
    fake=_bwd_fake,
    setup_context=_bwd_setup,
    backward=_bwd_backward,
)
