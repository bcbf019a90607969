"""The chain cam_statistics_fwd -> cam_statistics_bwd -> reference formula."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from camkernels.ops import _layout
from camkernels.ops._chain import Link, reference_vjp
from camkernels.ops.cam.op import (
    fake_cam_cotangents,
    grad_to_gradients,
    save_for_cam_bwd,
)
from camkernels.ops.cam_statistics import reference
from camkernels.ops.map_statistics import reference as statistics_reference
from camkernels.ops.map_statistics.op import (
    COUNT,
    GRADS_SCHEMA,
    RETURNS_SCHEMA,
    STATISTICS_SCHEMA,
    fake_statistics,
)


def _fwd_fake(activations: Tensor, gradients: Tensor, relu: bool) -> tuple[Tensor, ...]:
    batch, channels, height, width = activations.shape
    dtype = _layout.accumulate_dtype(activations.dtype)
    maps = activations.new_empty((batch, height, width), dtype=dtype)
    if gradients.dim() == 4:
        alpha = maps.new_empty((batch, channels))
    else:
        alpha = _layout.placeholder(activations)
    return maps, alpha, maps.new_empty(batch), *fake_statistics(maps)


def _fwd_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    activations, gradients, relu, ctx.backend = inputs
    maps, alpha, _total, *statistics = output
    # One call saves; the maps are kept whether or not a ReLU was applied, for the statistics.
    save_for_cam_bwd(ctx, activations, gradients, alpha, maps, relu, (maps, *statistics))
    ctx.relu = relu


def _fwd_backward(
    ctx: Any,
    grad_maps: Tensor | None,
    grad_alpha_out: Tensor | None,
    grad_total: Tensor | None,
    *grads: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, None, None]:
    activations, alpha, _, maps, *statistics = ctx.saved_tensors
    grad_activations = grad_alpha = None
    used = grad_maps is not None or any(grad is not None for grad in grads)
    if used and not (activations is None and alpha is None):
        known = (statistic.detach() for statistic in statistics)
        to_activations, to_alpha = cam_statistics_bwd(
            maps,
            activations,
            alpha,
            grad_maps,
            *known,
            *grads,
            ctx.relu,
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
    maps: Tensor, activations: Tensor | None, alpha: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    *_, channels_last, dtype = rest
    return fake_cam_cotangents(maps, activations, alpha, channels_last, dtype)


def _bwd_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *_, ctx.relu, ctx.channels_last, ctx.dtype, _ = inputs
    grads = inputs[4 + COUNT : 4 + 2 * COUNT]
    ctx.save_for_backward(*inputs[:4], *grads)
    ctx.set_materialize_grads(False)


def _bwd_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors

    def formula(
        maps: Tensor,
        activations: Tensor | None,
        alpha: Tensor | None,
        grad_maps: Tensor | None,
        *grads: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        statistics = statistics_reference.map_statistics(maps)
        return reference.cam_statistics_bwd(
            maps, activations, alpha, grad_maps, *statistics, *grads,
            ctx.relu, ctx.channels_last, ctx.dtype,
        )  # fmt: skip

    needed = ctx.needs_input_grad
    needs = (*needed[:4], *needed[4 + COUNT : 4 + 2 * COUNT])
    gradients = reference_vjp(formula, tensors, needs, cotangents)
    return (*gradients[:4], *(None,) * COUNT, *gradients[4:], None, None, None, None)


cam_statistics_fwd = Link(
    "cam_statistics",
    "cam_statistics_fwd",
    "(Tensor activations, Tensor gradients, bool relu, str backend) -> "
    f"(Tensor, Tensor, Tensor, {RETURNS_SCHEMA})",
    leader=0,
    fake=_fwd_fake,
    setup_context=_fwd_setup,
    backward=_fwd_backward,
)
cam_statistics_bwd = Link(
    "cam_statistics",
    "cam_statistics_bwd",
    "(Tensor maps, Tensor? activations, Tensor? alpha, Tensor? grad_maps, "
    f"{STATISTICS_SCHEMA}, {GRADS_SCHEMA}, bool relu, bool channels_last, ScalarType dtype, "
    "str backend) -> (Tensor, Tensor)",
    leader=0,
    fake=_bwd_fake,
    setup_context=_bwd_setup,
    backward=_bwd_backward,
)
