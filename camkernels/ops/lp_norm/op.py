"""The chain lp_norm_fwd -> lp_norm_bwd -> reference formula."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from camkernels.ops import _layout
from camkernels.ops._chain import Link, reference_vjp
from camkernels.ops.lp_norm import reference


def _fwd_fake(values: Tensor, p: float, size: Any) -> Tensor:
    return values.new_empty(values.shape[0], dtype=_layout.accumulate_dtype(values.dtype))


def _fwd_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, ctx.p, ctx.size, ctx.backend = inputs
    ctx.save_for_backward(values, output)
    ctx.set_materialize_grads(False)


def _fwd_backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return None, None, None, None
    values, norms = ctx.saved_tensors
    # To autograd the norms are functions of the values, which the reference formula recomputes.
    found = lp_norm_bwd(grad, values, norms.detach(), ctx.p, ctx.size, backend=ctx.backend)
    return found, None, None, None


def _bwd_fake(grad_norms: Tensor, values: Tensor, norms: Tensor, p: float, size: Any) -> Tensor:
    return values.new_empty(values.shape)


def _bwd_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_norms, values, _, ctx.p, ctx.size, _ = inputs
    ctx.save_for_backward(grad_norms, values)
    ctx.set_materialize_grads(False)


def _bwd_backward(ctx: Any, cotangent: Tensor | None) -> tuple[Any, ...]:
    def formula(grad_norms: Tensor, values: Tensor) -> tuple[Tensor]:
        norms = reference.lp_norm_fwd(values, ctx.p, ctx.size)
        return (reference.lp_norm_bwd(grad_norms, values, norms, ctx.p, ctx.size),)

    needs = ctx.needs_input_grad[:2]
    found = reference_vjp(formula, ctx.saved_tensors, needs, (cotangent,))
    return *found, None, None, None, None


lp_norm_fwd = Link(
    "lp_norm",
    "lp_norm_fwd",
    "(Tensor values, float p, int[] size, str backend) -> Tensor",
    leader=0,
    fake=_fwd_fake,
    setup_context=_fwd_setup,
    backward=_fwd_backward,
)
lp_norm_bwd = Link(
    "lp_norm",
    "lp_norm_bwd",
    "(Tensor grad_norms, Tensor values, Tensor norms, float p, int[] size, str backend) -> Tensor",
    leader=1,
    fake=_bwd_fake,
    setup_context=_bwd_setup,
    backward=_bwd_backward,
)
