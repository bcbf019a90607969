"""Geometries of convolutions and pools, memory layouts, dtypes and sizes that change."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine.engine_cases import (
    assert_same_buffers,
    assert_same_gradients,
    assert_same_step,
    batch,
    eager_step,
    engine_step,
    engined,
    everything_dropped,
    gradients_of,
    network,
    relative,
    stages,
)
from nn.swapping import randomize_norms
from torch import nn

import camkernels as ck
from camkernels import backends

pytestmark = pytest.mark.skipif(
    backends.unavailable_reason("cpu") is not None, reason="needs the C++ kernels"
)
NAMES = ("residual", "preactivation", "dense", "plain", "linear_bottlenecks")
CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "odd channels": {"out_channels": 7, "kernel_size": 3},
    "groups": {"out_channels": 9, "kernel_size": 3, "groups": 3, "padding": 1},
    "depthwise": {"out_channels": 6, "kernel_size": 3, "groups": 6, "padding": 1},
    "depthwise multiplied": {"out_channels": 12, "kernel_size": 3, "groups": 6, "stride": 2},
    "dilation": {"out_channels": 5, "kernel_size": 3, "dilation": 2, "padding": 2},
    "stride": {"out_channels": 5, "kernel_size": 3, "stride": 2, "padding": 1},
    "oblong": {"out_channels": 5, "kernel_size": (1, 3), "stride": (2, 1), "padding": (0, 2)},
    "same": {"out_channels": 5, "kernel_size": 3, "padding": "same", "dilation": 2},
    "pointwise": {"out_channels": 4, "kernel_size": 1, "stride": 3},
    "one channel": {"out_channels": 1, "kernel_size": 2},
}
POOLS: dict[str, Any] = {
    "max overlapping": lambda: nn.MaxPool2d(3, 2, 1),
    "max ceil": lambda: nn.MaxPool2d(2, ceil_mode=True),
    "max dilated": lambda: nn.MaxPool2d(2, 1, dilation=2),
    "max oblong": lambda: nn.MaxPool2d((1, 3), (2, 1)),
    "average": lambda: nn.AvgPool2d(3, 2, 1),
    "average of what is there": lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "average with a divisor": lambda: nn.AvgPool2d(2, ceil_mode=True, divisor_override=3),
}


def _draw(conv: dict[str, Any], norm: bool, pool: Any) -> nn.Module:
    middle = nn.Conv2d(6, **conv)
    width = conv["out_channels"]
    model = randomize_norms(
        nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True),
            middle, *([nn.BatchNorm2d(width)] if norm else []), nn.ReLU(),
            *([] if pool is None else [pool()]), nn.Conv2d(width, 16, 1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
        )
    ).double()  # fmt: skip
    if width == 1 and norm:  # or nothing passes
        nn.init.constant_(model.get_parameter("4.weight"), -0.7)
    return model


def _network(conv: dict[str, Any], norm: bool, pool: Any = None) -> nn.Module:
    """One whose guided gradient of no image is zero, as it may be where there are few channels."""
    for seed in range(40):
        torch.manual_seed(seed)
        model = ck.swap_in(_draw(conv, norm, pool))
        zero = False
        for training in (True, False):
            leaf = batch(3, 14)[0].requires_grad_()
            score = F.cross_entropy(copy.deepcopy(model).train(training)(leaf), batch(3, 14)[1])
            with ck.guided():
                (guided,) = torch.autograd.grad(score, leaf)
            zero = zero or not bool(guided.flatten(1).any(1).all())
        if not zero:
            return ck.swap_out(model)
    raise AssertionError("no such network found")


def _check(model: nn.Module) -> None:
    x, target = batch(3, 14)
    for training in (True, False):
        model.train(training)
        for memory in ("fast", "lean"):
            twin = copy.deepcopy(model)
            ours = engined(model, memory)
            with everything_dropped():
                assert_same_step(engine_step(ours, x, target), eager_step(twin, x, target))
            assert bool(stages(ours, x)[0].dropped) == (memory == "lean")
            assert_same_buffers(ours, twin)


@pytest.mark.parametrize("norm", [True, False], ids=["BatchNorm", "none"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str, bias: bool, norm: bool) -> None:
    _check(_network({**CONVOLUTIONS[name], "bias": bias}, norm))


@pytest.mark.parametrize("name", POOLS)
def test_pools(name: str) -> None:
    _check(_network(CONVOLUTIONS["odd channels"], True, POOLS[name]))


def test_batch_norm_without_weights_or_statistics() -> None:
    for options in ({"affine": False}, {"track_running_stats": False}, {"momentum": None}):
        model = _network(CONVOLUTIONS["groups"], True)
        model[4] = randomize_norms(nn.BatchNorm2d(9, **options))  # type: ignore[index]
        _check(model.double())


@pytest.mark.parametrize("name", NAMES)
def test_channels_last(name: str) -> None:
    model = network(name)
    x, target = batch()
    expected = eager_step(copy.deepcopy(model), x, target)
    for memory in ("fast", "lean"):
        last: nn.Module = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        ours = engined(last, memory)
        found = engine_step(ours, x.to(memory_format=torch.channels_last), target)
        assert_same_step(found, expected)
        assert_same_step(engine_step(ours, x, target), expected)  # contiguous images


def test_images_in_no_layout() -> None:
    x, target = batch(4, 26)
    x = x.transpose(2, 3)[:, :, ::2, 3:23]
    model = network()
    found = engine_step(engined(model), x, target)
    assert_same_step(found, eager_step(model, x, target))


@pytest.mark.parametrize("memory", ["fast", "lean", 10_000_000])
def test_sizes_that_change(memory: str | int) -> None:
    model = network("residual")
    ours = engined(model, memory)
    for size, side in ((4, 20), (2, 24), (5, 17), (4, 20)):
        x, target = batch(size, side)
        assert_same_step(engine_step(ours, x, target), eager_step(model, x, target))
        assert_same_buffers(ours, model)


@pytest.mark.parametrize("name", NAMES)
def test_float32_is_as_close_as_it_can_be(name: str) -> None:
    model = network(name)
    x, target = batch()
    expected = eager_step(model, x, target)
    found = engine_step(engined(copy.deepcopy(model).float()), x.float(), target)
    assert found.delta.dtype == torch.float32
    for value, truth in found.gradients.items():
        scale = max(float(g.abs().max()) for g in expected.gradients.values())
        assert float((truth.double() - expected.gradients[value]).abs().max()) < 1e-2 * scale


def test_autocast() -> None:
    model = network("plain").float()
    x, target = batch(8)
    x = x.float()
    ours = engined(model)
    expected = gradients_of(model, F.cross_entropy(model(x), target))
    with torch.autocast("cpu", torch.bfloat16):
        features = ours[:6](x)  # type: ignore[index]
        logits = ours(x)
        plain = model(x)
    assert features.dtype == torch.bfloat16
    assert relative(logits.detach().float(), plain.detach().float()) < 2e-2
    found = gradients_of(ours, F.cross_entropy(logits.float(), target))
    one, other = (torch.cat([g.flatten() for g in f.values()]) for f in (found, expected))
    assert found["0.weight"].dtype == torch.float32
    assert float(F.cosine_similarity(one, other, dim=0)) > 0.98


@pytest.mark.parametrize("memory", ["fast", "lean", "lean-bf16"])
def test_two_orders_under_autocast(memory: str) -> None:
    model = network("residual").float()
    x, target = batch(8)
    twin = copy.deepcopy(model)
    ours = engined(model, memory)
    leaf = x.float().requires_grad_()
    found = []
    for m in (ours, twin):
        with torch.autocast("cpu", torch.bfloat16, enabled=m is ours):
            score = F.cross_entropy(m(leaf), target)
        (delta,) = torch.autograd.grad(score, leaf, create_graph=True)
        found.append(gradients_of(m, delta.float().square().sum().sqrt()))
    one, other = (torch.cat([g.flatten().float() for g in f.values()]) for f in found)
    assert float(F.cosine_similarity(one, other, dim=0)) > 0.98


def test_no_gradient_of_the_images_no_second_order() -> None:
    model = network()
    x, target = batch()
    ours = engined(model, "lean")
    for m in (ours, model):
        m(x)  # a forward that is let go
    found = [gradients_of(m, F.cross_entropy(m(x), target)) for m in (ours, model)]
    assert_same_gradients(*found)
