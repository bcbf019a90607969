"""What the tests of the engine share: networks, a step by hand in eager PyTorch, and comparisons.

The step is the paper's with a weight that makes the regulariser dominate, or its errors would hide
under the cross-entropy: CE - 1e3 mean(cos(delta, delta_G)), delta_G guided and detached. The
twin runs PyTorch's own modules with ReLUs that a switch makes guided.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nn import eager
from nn.swapping import Block, randomize_norms
from torch import Tensor, nn

import camkernels as ck
from camkernels.engine import keep

CLASSES, WEIGHT = 5, 1e3


# --- networks -------------------------------------------------------------------------------------


def _stem(channels: int) -> list[nn.Module]:
    conv = nn.Conv2d(3, channels, 3, stride=2, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]


def _head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)]


def residual() -> nn.Module:
    """Blocks with plain and with projected shortcuts (the sum of two BatchNorms)."""
    return nn.Sequential(
        *_stem(8), nn.MaxPool2d(3, 2, 1), Block(8), Projected(8, 6), Block(6, functional=True),
        Projected(6, 8), *_head(8),
    )  # fmt: skip


class Projected(nn.Module):
    """A bottleneck whose shortcut is a convolution with a BatchNorm."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, 4, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, 2, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.conv3 = nn.Conv2d(4, after, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(
            nn.Conv2d(before, after, 1, 2, bias=False), nn.BatchNorm2d(after)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += self.downsample(x)
        return self.relu(y)


class Preactivated(nn.Module):
    """x + conv(relu(bn(conv(relu(bn(x)))))): the sum is read as it is."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.bn1(x)))
        return x + self.conv2(F.relu(self.bn2(y)))


def preactivation() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), Preactivated(8), Preactivated(8), nn.AvgPool2d(2),
        Preactivated(8), nn.BatchNorm2d(8), nn.ReLU(), *_head(8),
    )  # fmt: skip


class LinearBlock(nn.Module):
    """A residual sum of BatchNorms without a ReLU, as in MobileNetV2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(channels, 2 * channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(2 * channels)
        self.depthwise = nn.Conv2d(
            2 * channels, 2 * channels, 3, padding=1, groups=2 * channels, bias=False
        )
        self.bn2 = nn.BatchNorm2d(2 * channels)
        self.reduce = nn.Conv2d(2 * channels, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.expand(x)))
        y = self.relu(self.bn2(self.depthwise(y)))
        return x + self.bn3(self.reduce(y))


def linear_bottlenecks() -> nn.Module:
    blocks = [LinearBlock(6) for _ in range(3)]
    return nn.Sequential(*_stem(6), *blocks, nn.Conv2d(6, 8, 1), nn.ReLU(), *_head(8))


class Dense(nn.Module):
    """Layers that read all before them, then a transition with AvgPool2d."""

    def __init__(self, channels: int, growth: int = 4, layers: int = 2) -> None:
        super().__init__()
        widths = [channels + growth * i for i in range(layers + 1)]
        self.norms = nn.ModuleList(nn.BatchNorm2d(w) for w in widths)
        self.convs = nn.ModuleList(
            nn.Conv2d(w, growth, 3, padding=1, bias=False) for w in widths[:-1]
        )
        self.transition = nn.Conv2d(widths[-1], channels, 1, bias=False)
        self.pool = nn.AvgPool2d(2, 2)
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for i in range(self.layers):
            y = torch.relu(self.norms[i](torch.cat(features, 1)))
            features.append(self.convs[i](y))
        y = torch.relu(self.norms[self.layers](torch.cat(features, 1)))
        return self.pool(self.transition(y))


def dense() -> nn.Module:
    return nn.Sequential(*_stem(6), Dense(6), Dense(6), nn.BatchNorm2d(6), nn.ReLU(), *_head(6))


def plain() -> nn.Module:
    """Convolution, ReLU and MaxPool2d; no BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(8, 8, 3), nn.ReLU(inplace=True), *_head(8),
    )  # fmt: skip


SMALL: dict[str, Callable[[], nn.Module]] = {
    "residual": residual, "preactivation": preactivation, "dense": dense, "plain": plain,
    "linear_bottlenecks": linear_bottlenecks,
}  # fmt: skip


def network(name: str = "residual", training: bool = True) -> nn.Module:
    """One of the small ones, float64, with gammas of 0 and below, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return randomize_norms(SMALL[name]()).double().train(training)


def batch(size: int = 4, side: int = 20, classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size + side)
    images = torch.randn(size, 3, side, side, generator=generator, dtype=torch.float64)
    return images, torch.arange(size) % classes


# --- steps ----------------------------------------------------------------------------------------


@dataclass
class Step:
    """What a step found; ``gradients`` by the names of parameters, zero where there was none."""

    loss: Tensor
    delta: Tensor
    guided: Tensor
    gradients: dict[str, Tensor]


def gradients_of(model: nn.Module, loss: Tensor, **options: Any) -> dict[str, Tensor]:
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, **options)
    pairs = zip(named.items(), found, strict=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in pairs}


@contextmanager
def switchable_relus() -> Iterator[None]:
    """Every ReLU that a forward calls inside the block has eager.SwitchableReLU's backward."""
    functions = {(m, n): getattr(m, n) for m, n in ((F, "relu"), (F, "relu_"), (torch, "relu"))}
    functions[Tensor, "relu_"] = Tensor.relu_
    forward = nn.ReLU.forward

    def relu(u: Tensor, inplace: bool = False) -> Tensor:
        return eager.SwitchableReLU.apply(u)

    for holder, name in functions:
        setattr(holder, name, relu)
    nn.ReLU.forward = lambda self, u: relu(u)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for (holder, name), original in functions.items():
            setattr(holder, name, original)
        nn.ReLU.forward = forward  # type: ignore[method-assign]


def eager_step(twin: nn.Module, x: Tensor, target: Tensor, weight: float = WEIGHT) -> Step:
    """By hand, with PyTorch's own modules."""
    leaf = x.detach().clone().requires_grad_()
    torch.manual_seed(1)  # dropout draws the same mask on both sides
    with switchable_relus():
        ce = F.cross_entropy(twin(leaf), target)
        with eager.eager_guided():
            (teacher,) = torch.autograd.grad(ce, leaf, retain_graph=True)
        (delta,) = torch.autograd.grad(ce, leaf, create_graph=True)
        assert float(teacher.flatten(1).norm(dim=1).min()) > 0, "a guided gradient is zero"
        assert not torch.allclose(teacher, delta), "the twin's guided gradient is the plain one"
        cosine = F.cosine_similarity(delta.flatten(1), teacher.flatten(1), eps=0.0)
        loss = ce - weight * cosine.mean()
        return Step(loss.detach(), delta.detach(), teacher, gradients_of(twin, loss))


def engine_step(model: nn.Module, x: Tensor, target: Tensor, weight: float = WEIGHT) -> Step:
    """By our criterion."""
    criterion = ck.InterpretableGradientLoss(model, weight=weight, keep_gradients=True)
    torch.manual_seed(1)
    loss = criterion(model(x), target)
    delta, guided = criterion.gradients
    criterion.close()
    return Step(loss.detach(), delta, guided, gradients_of(model, loss))


def assert_same_gradients(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-9
) -> None:
    """To ``tolerance``, relative to the largest entry of all, and to no less than 1."""
    assert ours.keys() == theirs.keys()
    scale = max(1.0, *(float(g.abs().max()) for g in theirs.values()))
    for name, expected in theirs.items():
        error = float((ours[name] - expected).abs().max())
        assert error <= tolerance * scale, f"{name}: off by {error:.3g} of {scale:.3g}"


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def assert_same_step(ours: Step, theirs: Step, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-11, atol=1e-11)
    assert relative(ours.delta, theirs.delta) <= tolerance
    assert relative(ours.guided, theirs.guided) <= tolerance
    assert_same_gradients(ours.gradients, theirs.gradients, tolerance)


def assert_same_buffers(model: nn.Module, twin: nn.Module) -> None:
    for (name, mine), theirs in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11, msg=name)


# --- the engine -----------------------------------------------------------------------------------


def engined(model: nn.Module, memory: str | int = "fast") -> nn.Module:
    """A copy, run by the engine."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a network without ReLU
        return ck.swap_in(copy.deepcopy(model), engine=True, memory=memory)


@contextmanager
def everything_dropped() -> Iterator[None]:
    """In the block the lean plans drop every convolution that can be dropped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keep, "lean_values", lambda stage: frozenset(keep.droppable(stage)))
        yield


def stages(model: nn.Module, x: Tensor) -> list[Any]:
    return list(model.__dict__["forward"].program_of(x).stages)
