"""The chain ssim_fwd -> ssim_bwd -> reference formula."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from camkernels.ops import _layout
from camkernels.ops._chain import Link, reference_vjp
from camkernels.ops.ssim import reference

_OPTIONS = "float[] rows, float[] columns, float c1, float c2, bool same"
_COUNT = 5


def _fwd_fake(x: Tensor, y: Tensor, *options: Any) -> Tensor:
    return x.new_empty(x.shape[0], dtype=_layout.accumulate_dtype(x.dtype))


def _fwd_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, y, *ctx.options, ctx.backend = inputs
    ctx.save_for_backward(x, y)
    ctx.set_materialize_grads(False)


def _fwd_backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    nothing = (None,) * (_COUNT + 1)
    if grad is None:
        return None, None, *nothing
    wanted: Any = ctx.needs_input_grad[:2]
    arguments: Any = (grad, *ctx.saved_tensors, *ctx.options, *wanted)
    found = ssim_bwd(*arguments, backend=ctx.backend)
    return *(g if w else None for g, w in zip(found, wanted, strict=True)), *nothing


def _bwd_fake(grad: Tensor, x: Tensor, y: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    *_, want_x, want_y = options
    return x.new_empty(x.shape if want_x else 0), y.new_empty(y.shape if want_y else 0)


def _bwd_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    grad, x, y, *ctx.options, ctx.want_x, ctx.want_y, _ = inputs
    ctx.save_for_backward(grad, x, y)
    ctx.set_materialize_grads(False)


def _bwd_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    options: Any = (*ctx.options, ctx.want_x, ctx.want_y)

    def formula(grad: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return reference.ssim_bwd(grad, x, y, *options)

    used = [c if w else None for c, w in zip(cotangents, (ctx.want_x, ctx.want_y), strict=True)]
    found = reference_vjp(formula, ctx.saved_tensors, ctx.needs_input_grad[:3], used)
    return *found, *(None,) * (_COUNT + 3)


ssim_fwd = Link(
    "ssim",
    "ssim_fwd",
    f"(Tensor x, Tensor y, {_OPTIONS}, str backend) -> Tensor",
    leader=0,
    fake=_fwd_fake,
    setup_context=_fwd_setup,
    backward=_fwd_backward,
)
ssim_bwd = Link(
    "ssim",
    "ssim_bwd",
    f"(Tensor grad, Tensor x, Tensor y, {_OPTIONS}, bool want_x, bool want_y, str backend)"
    " -> (Tensor, Tensor)",
    leader=1,
    fake=_bwd_fake,
    setup_context=_bwd_setup,
    backward=_bwd_backward,
)
