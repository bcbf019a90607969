"""The chain min_max_fwd -> min_max_bwd -> reference formula."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from camkernels.ops import _layout
from camkernels.ops._chain import Link, reference_vjp
from camkernels.ops.min_max import reference


def _fwd_fake(maps: Tensor) -> tuple[Tensor, Tensor]:
    dtype = _layout.accumulate_dtype(maps.dtype)
    return maps.new_empty(maps.shape, dtype=dtype), maps.new_empty((len(maps), 2), dtype=dtype)


def _fwd_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    maps, ctx.backend = inputs
    ctx.save_for_backward(maps, output[1])
    ctx.set_materialize_grads(False)


def _fwd_backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, None]:
    if grad is None:
        return None, None
    maps, extremes = ctx.saved_tensors
    # To autograd the extremes are functions of the maps, which the reference formula recomputes.
    return min_max_bwd(grad, maps, extremes.detach(), backend=ctx.backend), None


def _bwd_fake(grad: Tensor, maps: Tensor, extremes: Tensor) -> Tensor:
    return maps.new_empty(maps.shape)


def _bwd_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, maps, _, _ = inputs
    ctx.save_for_backward(grad, maps)
    ctx.set_materialize_grads(False)


def _bwd_backward(ctx: Any, cotangent: Tensor | None) -> tuple[Any, ...]:
    def formula(grad: Tensor, maps: Tensor) -> tuple[Tensor]:
        return (reference.min_max_bwd(grad, maps, reference.min_max_fwd(maps)[1]),)

    needs = ctx.needs_input_grad[:2]
    return *reference_vjp(formula, ctx.saved_tensors, needs, (cotangent,)), None, None


min_max_fwd = Link(
    "min_max",
    "min_max_fwd",
    "(Tensor maps, str backend) -> (Tensor, Tensor)",
    leader=0,
    fake=_fwd_fake,
    setup_context=_fwd_setup,
    backward=_fwd_backward,
)
min_max_bwd = Link(
    "min_max",
    "min_max_bwd",
    "(Tensor grad, Tensor maps, Tensor extremes, str backend) -> Tensor",
    leader=1,
    fake=_bwd_fake,
    setup_context=_bwd_setup,
    backward=_bwd_backward,
)
