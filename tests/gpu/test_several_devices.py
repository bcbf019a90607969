"""Tensors of a GPU that is not the current one."""

from __future__ import annotations

import pytest
import torch
from gpu.steps import ON_GPU, STEPS, batch, close, every_step

import camkernels as ck

pytestmark = [
    *ON_GPU,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@every_step
def test_a_step_on_the_second_device(kind: str) -> None:
    expected = STEPS[kind]("cuda:0")(*batch("cuda:0"))
    assert torch.cuda.current_device() == 0
    found = STEPS[kind]("cuda:1")(*batch("cuda:1"))
    assert torch.cuda.current_device() == 0
    assert all(t.device.index == 1 for t in found)
    close([t.cpu() for t in found], [t.cpu() for t in expected])


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_ops_of_both_devices_in_turn(backend: str) -> None:
    reason = ck.backends.unavailable_reason(backend)
    if reason is not None:
        pytest.skip(f"backend {backend}: {reason}")
    a = torch.randn(2, 1024, 14, 14)
    with ck.backend(backend):  # type: ignore[arg-type]
        found = [ck.grad_cam(a.to(d), a.to(d)) for d in ("cuda:1", "cuda:0") * 10]
    assert [t.device.index for t in found] == [1, 0] * 10
    assert all(torch.equal(t.cpu(), found[0].cpu()) for t in found[::2])
