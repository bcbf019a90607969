"""DistributedDataParallel over the engine: two processes with shared statistics equal one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import engine.engine_process as process
import pytest
import torch
import torch.nn.functional as F
from engine.engine_cases import assert_same_gradients
from torch import Tensor

import camkernels as ck
from camkernels import backends

pytestmark = [
    pytest.mark.skipif(
        backends.unavailable_reason("cpu") is not None or backends.triton_interpreted(),
        reason="needs the C++ kernels, in a process that does not interpret Triton",
    ),
    pytest.mark.skipif(
        not torch.distributed.is_available(), reason="this torch has no distributed"
    ),
]


def _alone(images: Tensor, targets: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What one process finds, with the composable modules, which other tests hold to eager."""
    model = ck.swap_in(process.network())
    process.step(model, images, targets)
    model(images)
    F.cross_entropy(model(images), targets).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return gradients, dict(model.named_buffers())


def test_two_processes_equal_one(tmp_path: Path, two_processes: Callable[[str], None]) -> None:
    two_processes(process.__file__)
    images, targets = process.data()
    gradients, buffers = _alone(images, targets)
    half, _ = _alone(images[:4], targets[:4])
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for one, two in zip(*results, strict=True):
        assert_same_gradients(one[0], gradients)
        for name, value in one[0].items():
            assert torch.equal(value, two[0][name]), "gradients that differ between processes"
        for name, value in buffers.items():
            torch.testing.assert_close(one[1][name], value, rtol=1e-10, atol=1e-10)
    apart = max(float((half[n] - g).abs().max()) for n, g in gradients.items())
    assert apart > 1e-2, "statistics and gradients of one share alone would do"
