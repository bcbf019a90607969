"""The count of passes over memory: known counts first, then the network's promise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import camkernels as ck
from benchmarks import loops, passes
from camkernels.ops import _chain
from camkernels.ops.batch_norm_relu import norm
from camkernels.ops.relu import op as relu_op

B, C = 5, 4
SHAPE = (B, C, 6, 6)
ONE = B * C * 36 * 4
"""Bytes of one pass over a tensor of SHAPE."""


def traffic(step: Callable[[], Any]) -> passes.Traffic:
    return passes.count(step, B, [])


def test_operators_read_and_write_what_they_touch() -> None:
    x, y = torch.rand(SHAPE), torch.rand(SHAPE)
    known: list[tuple[int, Callable[[], Any]]] = [
        (2, lambda: x.relu()),
        (2, lambda: x.mul_(2)),
        (3, lambda: x + y),
        (3, lambda: x.add_(y)),
        (2, lambda: x * x),  # one tensor read twice is read once
        (2, lambda: x.clone()),
        (2, lambda: x.copy_(y)),
        (1, lambda: x.zero_()),
        (1, lambda: torch.ones_like(x)),
        (1, lambda: x.sum()),
        (2, lambda: x.transpose(0, 1) + 1),
        (2, lambda: x + torch.rand(1, C, 1, 1).expand(SHAPE)),  # stride 0 is no memory
        (0, lambda: torch.empty_like(x)),
        (0, lambda: x.detach()),
        (0, lambda: torch.nn.functional.conv2d(x, torch.rand(C, C, 1, 1))),
        (0, lambda: torch.rand(64, 64) + 1),
    ]
    for i, (expected, step) in enumerate(known):
        assert traffic(step).bytes.total() == expected * ONE, i


class Tiny(nn.Module):
    """Convolution, BatchNorm, ReLU, residual, mean: every element is a BatchNorm element."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, C, 3, padding=1, bias=False)
        self.bn, self.relu = nn.BatchNorm2d(C), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(x)
        return self.relu(self.bn(z) + z).amax((2, 3))


def test_known_count_of_a_tiny_network() -> None:
    images, targets = torch.rand(B, 3, 6, 6), torch.arange(B) % C
    torch.manual_seed(0)
    ((found, one_pass),) = passes.measure(Tiny, {"plain": loops.plain}, images, targets).values()
    assert one_pass == ONE
    norm = {
        "native_batch_norm": 3,  # statistics read z; normalising reads z and writes
        "relu_": 2,
        "threshold_backward": 3,
        "native_batch_norm_backward": 5,  # sums read g and z; the rest reads both and writes
    }
    for operator, expected in norm.items():
        assert found.operators[passes.NORM, operator] == expected * ONE, operator
    assert found.bytes[passes.NORM] == sum(norm.values()) * ONE
    assert found.bytes[passes.RESIDUAL] == 3 * ONE
    assert found.bytes[passes.ACCUMULATION] == 3 * ONE
    assert found.bytes[passes.CONVOLUTION] == 0


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_kernels_are_counted_once(backend: str) -> None:
    if ck.backends.unavailable_reason(backend) is not None:
        pytest.skip(f"backend {backend} is not here")
    u = torch.rand(SHAPE).sub_(0.5).requires_grad_()
    g = torch.rand(SHAPE)
    mask = B * C * 36 // 8

    def step() -> None:
        v = relu_op.ReLUFunction.apply(u, False, "mask", backend)
        torch.autograd.grad(v, u, g)

    before = _chain.implementation
    found = traffic(step)
    assert _chain.implementation is norm.implementation is before  # put back
    assert found.operators[passes.NORM, "relu_fwd"] == 2 * ONE + mask
    assert found.operators[passes.NORM, "relu_bwd"] == 2 * ONE + mask
    assert found.bytes.total() == 4 * ONE + 2 * mask


def test_a_batch_that_cannot_be_told_from_channels_is_refused() -> None:
    with pytest.raises(ValueError, match="batch of 4"):
        passes.count(lambda: None, 4, [torch.zeros(4, 3, 1, 1)])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_step_through_resnet18_takes_few_passes(layout: torch.memory_format) -> None:
    pytest.importorskip("torchvision")
    from benchmarks.harness import Options
    from benchmarks.members import _steps, step_interpretable

    images, targets = _steps.batch(B, 64, Options(), torch.float32)
    sides = step_interpretable.makers()
    measured = passes.measure(
        lambda: _steps.network("resnet18").to(memory_format=layout),  # type: ignore[call-overload]
        {name: sides[name] for name in ("plain", "ours")},
        images.contiguous(memory_format=layout),
        targets,
    )
    per_side = {name: found.bytes.total() / one for name, (found, one) in measured.items()}
    assert 12 < per_side["plain"] < 20
    assert per_side["ours"] <= 40
