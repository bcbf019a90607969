"""The chain warped_ssim_fwd -> warped_ssim_bwd -> reference formula."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from camkernels.ops import _layout
from camkernels.ops._chain import Link, reference_vjp
from camkernels.ops.warped_ssim import reference

_TENSORS = "Tensor maps, Tensor others, Tensor boxes, Tensor flips"
_OPTIONS = "int[] via, int[] size, float[] rows, float[] columns, float c1, float c2, bool same"
_COUNT = 7


def _fwd_fake(maps: Tensor, *rest: Any) -> Tensor:
    return maps.new_empty(maps.shape[0], dtype=_layout.accumulate_dtype(maps.dtype))


def _fwd_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.options = tensors[4:]
    ctx.save_for_backward(*tensors[:4])
    ctx.set_materialize_grads(False)


def _fwd_backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    nothing = (None,) * (_COUNT + 3)
    if grad is None:
        return None, None, *nothing
    wanted: Any = ctx.needs_input_grad[:2]
    arguments: Any = (grad, *ctx.saved_tensors, *ctx.options, *wanted)
    found = warped_ssim_bwd(*arguments, backend=ctx.backend)
    return *(g if w else None for g, w in zip(found, wanted, strict=True)), *nothing


def _bwd_fake(grad: Tensor, maps: Tensor, others: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, want_maps, want_others = rest
    return (
        maps.new_empty(maps.shape if want_maps else 0),
        others.new_empty(others.shape if want_others else 0),
    )


def _bwd_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.want_maps, ctx.want_others, _ = inputs
    ctx.options = tensors[5:]
    ctx.save_for_backward(*tensors[:5])
    ctx.set_materialize_grads(False)


def _bwd_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    grad, maps, others, boxes, flips = ctx.saved_tensors

    options: Any = (boxes, flips, *ctx.options, ctx.want_maps, ctx.want_others)

    def formula(grad: Tensor, maps: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        return reference.warped_ssim_bwd(grad, maps, others, *options)

    wanted = (ctx.want_maps, ctx.want_others)
    used = [c if w else None for c, w in zip(cotangents, wanted, strict=True)]
    found = reference_vjp(formula, (grad, maps, others), ctx.needs_input_grad[:3], used)
    return *found, *(None,) * (_COUNT + 5)


warped_ssim_fwd = Link(
    "warped_ssim",
    "warped_ssim_fwd",
    f"({_TENSORS}, {_OPTIONS}, str backend) -> Tensor",
    leader=0,
    fake=_fwd_fake,
    setup_context=_fwd_setup,
    backward=_fwd_backward,
)
warped_ssim_bwd = Link(
    "warped_ssim",
    "warped_ssim_bwd",
    f"(Tensor grad, {_TENSORS}, {_OPTIONS}, bool want_maps, bool want_others, str backend)"
    " -> (Tensor, Tensor)",
    leader=1,
    fake=_bwd_fake,
    setup_context=_bwd_setup,
    backward=_bwd_backward,
)
