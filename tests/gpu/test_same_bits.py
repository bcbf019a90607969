"""Equal inputs give equal bits, at every one of many runs."""

from __future__ import annotations

import pytest
import torch
from gpu.steps import PLACES, STEPS, batch, close, equal, every_step_at, place, using
from torch import Tensor

import camkernels as ck

RUNS = {"cpu": 3, "cuda": 100}


@every_step_at(*PLACES)
def test_steps_give_equal_bits(kind: str, device: str, backend: str) -> None:
    images, targets = batch(device)
    with using(backend):
        step = STEPS[kind](device)
        first = step(images, targets)
        assert all(bool(t.isfinite().all()) for t in first)
        for run in range(RUNS[device]):
            assert equal(step(images, targets), first), f"run {run + 2}"


@every_step_at(*PLACES)
def test_steps_are_those_of_the_cpu(kind: str, device: str, backend: str) -> None:
    with using(backend):
        found = STEPS[kind](device)(*batch(device))
    with ck.backend("reference"):
        expected = STEPS[kind]("cpu")(*batch("cpu"))
    close([t.cpu() for t in found], expected)


def _ops(a: Tensor, g: Tensor) -> list[Tensor]:
    statistics, maps = ck.cam_statistics(a, g, return_maps=True)
    loss = maps.square().sum() + statistics.entropy.sum() + statistics.area.sum()
    if ck.current_backend() == "cuda":  # which has no kernels for the others
        return [maps, *torch.autograd.grad(loss, (a, g))]
    norms = ck.lp_norm(maps, 1.0)
    scaled = ck.min_max_normalize(maps)
    loss = loss + norms.sum() + scaled.square().sum()
    return [maps, norms, scaled, *torch.autograd.grad(loss, (a, g))]


@pytest.mark.parametrize(("device", "backend"), [place(name) for name in PLACES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ops_split_over_blocks_give_equal_bits(
    dtype: torch.dtype, device: str, backend: str
) -> None:
    """A small batch of many channels: several blocks join their sums."""
    generator = torch.Generator().manual_seed(0)
    a, g = (
        torch.randn(2, 1024, 14, 14, generator=generator).to(device, dtype).requires_grad_()
        for _ in range(2)
    )
    with using(backend):
        first = _ops(a, g)
        for run in range(RUNS[device]):
            assert equal(_ops(a, g), first), f"run {run + 2}"
