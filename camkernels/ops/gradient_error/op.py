"""The chain gradient_error_fwd -> gradient_error_bwd -> reference formula."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from camkernels.ops import _layout
from camkernels.ops._chain import Link, reference_vjp
from camkernels.ops.gradient_error import flat, reference


def _fwd_fake(delta: Tensor, guided: Tensor, error: str) -> tuple[Tensor, Tensor]:
    batch, dtype = delta.shape[0], _layout.accumulate_dtype(delta.dtype)
    statistics = delta.new_empty((batch, reference.STATISTICS), dtype=dtype)
    return delta.new_empty(batch, dtype=dtype), statistics


def _fwd_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    delta, guided, ctx.error, ctx.backend = inputs
    _, statistics = output
    ctx.save_for_backward(delta, guided, statistics)
    ctx.set_materialize_grads(False)


def _fwd_backward(
    ctx: Any, grad_errors: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, None, None, None]:
    if grad_errors is None:
        return None, None, None, None
    delta, guided, statistics = ctx.saved_tensors
    # The kernel's shortcut: to autograd the statistics are functions of delta, which the reference
    # formula recomputes, so they enter as constants.
    found = gradient_error_bwd(
        grad_errors, delta, guided.detach(), statistics.detach(), ctx.error, backend=ctx.backend
    )
    return found, None, None, None


def _bwd_fake(
    grad_errors: Tensor, delta: Tensor, guided: Tensor, statistics: Tensor, error: str
) -> Tensor:
    return flat.like_samples_of(delta, delta.dtype)


def _bwd_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_errors, delta, guided, _, ctx.error, _ = inputs
    ctx.save_for_backward(grad_errors, delta, guided)
    ctx.set_materialize_grads(False)


def _bwd_backward(ctx: Any, cotangent: Tensor | None) -> tuple[Any, ...]:
    grad_errors, delta, guided = ctx.saved_tensors

    def formula(grad_errors: Tensor, delta: Tensor) -> tuple[Tensor]:
        _, statistics = reference.gradient_error_fwd(delta, guided, ctx.error)
        return (reference.gradient_error_bwd(grad_errors, delta, guided, statistics, ctx.error),)

    to_errors, to_delta = reference_vjp(
        formula, (grad_errors, delta), ctx.needs_input_grad[:2], (cotangent,)
    )
    return to_errors, to_delta, None, None, None, None


gradient_error_fwd = Link(
    "gradient_error",
    "gradient_error_fwd",
    "(Tensor delta, Tensor guided, str error, str backend) -> (Tensor, Tensor)",
    leader=0,
    fake=_fwd_fake,
    setup_context=_fwd_setup,
    backward=_fwd_backward,
)
gradient_error_bwd = Link(
    "gradient_error",
    "gradient_error_bwd",
    "(Tensor grad_errors, Tensor delta, Tensor guided, Tensor statistics, str error, str backend)"
    " -> Tensor",
    leader=1,
    fake=_bwd_fake,
    setup_context=_bwd_setup,
    backward=_bwd_backward,
)
