"""The chain map_statistics_fwd -> map_statistics_bwd -> reference formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from camkernels.ops import _layout
from camkernels.ops._chain import Link, reference_vjp
from camkernels.ops.map_statistics import reference
from camkernels.ops.map_statistics.reference import Statistics

COUNT = len(Statistics._fields)
# Arguments of a library op are flat: one name per statistic, and one per cotangent.
STATISTICS_SCHEMA = ", ".join(f"Tensor {name}" for name in Statistics._fields)
GRADS_SCHEMA = ", ".join(f"Tensor? grad_{name}" for name in Statistics._fields)
RETURNS_SCHEMA = ", ".join(["Tensor"] * COUNT)


def fake_statistics(maps: Tensor) -> Statistics:
    """Outputs of the forward, uncomputed."""
    batch, dtype = maps.shape[0], _layout.accumulate_dtype(maps.dtype)
    shapes = ((batch,),) * (COUNT - 2) + ((batch, 2), (batch, 2, 2))
    return Statistics._make(maps.new_empty(shape, dtype=dtype) for shape in shapes)


def _fwd_run_fake(maps: Tensor, clamp: bool) -> tuple[Tensor, ...]:
    return tuple(fake_statistics(maps))


def _fwd_setup(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    maps, ctx.clamp, ctx.backend = inputs
    ctx.save_for_backward(maps, *output)
    ctx.set_materialize_grads(False)


def _fwd_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
    if all(grad is None for grad in grads):
        return None, None, None
    maps, *statistics = ctx.saved_tensors
    # The kernel's shortcut: statistics already known. To autograd they are functions of the maps
    # (the reference formula recomputes them), so they enter as constants.
    known = (statistic.detach() for statistic in statistics)
    return map_statistics_bwd(maps, *known, *grads, ctx.clamp, backend=ctx.backend), None, None


def _bwd_fake(maps: Tensor, *rest: Any) -> Tensor:
    return torch.empty(maps.shape, dtype=maps.dtype, device=maps.device)


def _bwd_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    maps, *_, ctx.clamp, _ = inputs
    ctx.save_for_backward(maps, *inputs[1 + COUNT : 1 + 2 * COUNT])
    ctx.set_materialize_grads(False)


def _bwd_backward(ctx: Any, cotangent: Tensor | None) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors

    def formula(maps: Tensor, *grads: Tensor | None) -> tuple[Tensor]:
        statistics = reference.map_statistics(maps, ctx.clamp)
        return (reference.map_statistics_bwd(maps, *statistics, *grads, ctx.clamp),)

    needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[1 + COUNT : 1 + 2 * COUNT])
    to_maps, *to_grads = reference_vjp(formula, tensors, needs, (cotangent,))
    return (to_maps, *(None,) * COUNT, *to_grads, None, None)


map_statistics_fwd = Link(
    "map_statistics",
    "map_statistics_fwd",
    f"(Tensor maps, bool clamp, str backend) -> ({RETURNS_SCHEMA})",
    leader=0,
    fake=_fwd_run_fake,
    setup_context=_fwd_setup,
    backward=_fwd_backward,
)
map_statistics_bwd = Link(
    "map_statistics",
    "map_statistics_bwd",
    f"(Tensor maps, {STATISTICS_SCHEMA}, {GRADS_SCHEMA}, bool clamp, str backend) -> Tensor",
    leader=0,
    fake=_bwd_fake,
    setup_context=_bwd_setup,
    backward=_bwd_backward,
)
