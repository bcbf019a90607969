"""How the engine adds: strided gradients where they are, gamma rstd where it is cheaper, weight
gradients of both orders."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from engine.engine_cases import (
    assert_same_gradients,
    assert_same_step,
    batch,
    eager_step,
    engine_step,
    engined,
    gradients_of,
    network,
)
from nn.swapping import randomize_norms
from torch import Tensor, nn

from camkernels import backends
from camkernels.engine import conv_norm
from camkernels.engine.passes import _Table
from camkernels.engine.trace import Op
from camkernels.engine.units import Spread
from camkernels.ops.conv2d import pointwise

pytestmark = pytest.mark.skipif(
    backends.unavailable_reason("cpu") is not None, reason="needs the C++ kernels"
)


class Strided(nn.Module):
    """x goes to strided 1 x 1 convolutions and to others, in an order.

    Args:
        readers: "s": a strided 1 x 1 convolution; "d": a strided 3 x 3 one; "a": a sum, which
            gives the same gradient to x and to the other summand.
    """

    def __init__(self, readers: str) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6))
        self.readers = readers
        sizes = [1 if reader == "s" else 3 for reader in readers]
        self.convs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(6, 6, k, 2, k // 2, bias=False), nn.BatchNorm2d(6))
            for k in sizes
        )
        self.summand = nn.Conv2d(6, 6, 3, padding=1)
        self.relu = nn.ReLU()
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        total = None
        for reader, conv in zip(self.readers, self.convs, strict=True):
            part = conv(x + self.summand(x) if reader == "a" else x)
            total = part if total is None else total + part
        return self.head(self.relu(total))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Small convolutions go the way of large ones; what becomes of strided gradients is counted."""
    found: Counter[str] = Counter()
    monkeypatch.setattr(pointwise, "_LEAST_WORK", 0)
    for name in ("dense", "add_to"):
        original = getattr(Spread, name)

        def counted(self: Spread, *args: Any, name: str = name, original: Any = original) -> Tensor:
            found[name] += 1
            return original(self, *args)

        monkeypatch.setattr(Spread, name, counted)
    return found


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("readers", "ways"),
    [
        ("sd", {"add_to"}),
        ("ds", {"add_to"}),
        ("s", {"dense"}),
        ("ss", {"dense", "add_to"}),
        ("sds", {"add_to"}),
        ("as", {"dense"}),
        ("sa", {"add_to"}),
    ],
)
def test_strided_gradients(
    readers: str, ways: set[str], channels_last: bool, seen: Counter[str]
) -> None:
    torch.manual_seed(2)
    model = randomize_norms(Strided(readers)).double()
    x, target = batch(4, 24, 3)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    for memory in ("fast", "lean"):
        seen.clear()
        ours = engine_step(engined(model, memory), x, target)
        assert set(seen) == ways
        assert_same_step(ours, eager_step(copy.deepcopy(model), x, target))


@pytest.mark.parametrize("kept", [True, False])
def test_a_gradient_that_is_read_again_is_not_written_over(kept: bool, seen: Counter[str]) -> None:
    """With a graph that is kept the same backward is run twice."""
    torch.manual_seed(2)
    model = engined(randomize_norms(Strided("sd")).double())
    x, target = batch(4, 24, 3)
    loss = F.cross_entropy(model(x), target)
    first = gradients_of(model, loss, retain_graph=kept)
    if kept:
        assert_same_gradients(gradients_of(model, loss), first, 0.0)
    assert seen["add_to"]


@pytest.mark.parametrize("side", [8, 40])
def test_gamma_goes_where_there_is_less(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into the gradient of small maps, into the weight of others."""
    into_weights: list[tuple[int, ...]] = []
    original = conv_norm.per_filter

    def counted(scale: Tensor, like: Tensor) -> Tensor:
        into_weights.append(tuple(like.shape))
        return original(scale, like)

    monkeypatch.setattr(conv_norm, "per_filter", counted)
    model = network()
    x, target = batch(4, side)
    ours = engine_step(engined(model), x, target)
    convolutions = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert 0 < len(into_weights) <= convolutions
    assert (len(into_weights) == convolutions) is (side == 40)
    assert_same_step(ours, eager_step(copy.deepcopy(model), x, target))


def test_weight_gradients_that_are_made_with_a_graph() -> None:
    """create_graph in the backward that makes the weights' gradients too."""
    model = network()
    x, target = batch(4, 8)
    found = {}
    for name, net in (("ours", engined(model)), ("theirs", copy.deepcopy(model))):
        leaf, named = x.clone().requires_grad_(), dict(net.named_parameters())
        loss = F.cross_entropy(net(leaf), target)
        delta, *made = torch.autograd.grad(loss, [leaf, *named.values()], create_graph=True)
        weights = {n: g.detach() for n, g in zip(named, made, strict=True)}
        found[name] = weights, gradients_of(net, loss + delta.square().sum())
    for ours, theirs in zip(found["ours"], found["theirs"], strict=True):
        assert_same_gradients(ours, theirs)


def test_both_orders_under_autocast_meet_in_float32() -> None:
    """bfloat16 rounds each of the two weight gradients; their sum is not rounded again."""
    net = engined(network().float())
    x, target = batch(4, 40)
    leaf = x.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(net(leaf), target)
    (delta,) = torch.autograd.grad(loss, leaf, create_graph=True)
    found = gradients_of(net, loss + 30 * delta.float().square().sum())
    filters = [g for g in found.values() if g.dim() == 4]
    assert len(filters) == sum(isinstance(m, nn.Conv2d) for m in net.modules())
    for gradient in filters:
        assert gradient.dtype == torch.float32
        assert not torch.equal(gradient, gradient.bfloat16().float())


KINDS = ("private", "shared", "spread")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kinds", [*itertools.product(KINDS, KINDS, KINDS), *KINDS], ids=str)
def test_what_others_hold_is_not_written_over(
    kinds: str | tuple[str, ...], dtype: torch.dtype
) -> None:
    """``dtype``: of what comes; the table's is float64."""
    kinds = (kinds,) if isinstance(kinds, str) else kinds
    table, value = _Table(torch.float64), cast(Op, "any key")
    total, shared = torch.zeros(2, 3, 5, 7, dtype=torch.float64), []
    for kind in kinds:
        if kind == "spread":
            part = Spread(torch.randn(2, 3, 3, 4).double(), (5, 7), (2, 2))
            total += part.dense()
        else:
            part = torch.randn(2, 3, 5, 7).to(dtype)
            total += part
            if kind == "shared":
                shared.append((part, part.clone()))
        table.add(value, part, private=kind != "shared")
    found, private = table.take(value)
    torch.testing.assert_close(found, total, rtol=1e-14, atol=1e-14)
    for part, before in shared:
        assert torch.equal(part, before)
        assert not private or found.data_ptr() != part.data_ptr()
    assert table.take(value) == (None, False)
