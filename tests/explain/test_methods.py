"""Grad-CAM++, XGrad-CAM, LayerCAM, HiResCAM and CAM through a tap: against formulas by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import camkernels as ck


class Net(nn.Module):
    """``head``: "pool" has a closed form, "tanh" has none."""

    def __init__(self, head: str) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3))
        between = nn.Identity() if head == "pool" else nn.Tanh()
        self.head = nn.Sequential(between, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x).relu())
        return logits


def plus(a: Tensor, g: Tensor, eps: float = 0.0) -> Tensor:
    total = a.sum((2, 3), keepdim=True)
    below = 2 * g**2 + total * g**3 + eps
    share = torch.where(g > 0, g**2 / torch.where(g > 0, below, 1.0), 0.0)
    return ((share * g.relu()).sum((2, 3), keepdim=True) * a).sum(1)


def axiom(a: Tensor, g: Tensor) -> Tensor:
    weights = (a * g).sum((2, 3), keepdim=True) / (a.sum((2, 3), keepdim=True) + 1e-7)
    return (weights * a).sum(1)


METHODS: dict[str, tuple[Callable[..., Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "GradCAMPlusPlus": (ck.GradCAMPlusPlus, plus),
    "GradCAMPlusPlus, eps": (
        lambda *args, **options: ck.GradCAMPlusPlus(*args, eps=1e-6, **options),
        lambda a, g: plus(a, g, 1e-6),
    ),
    "XGradCAM": (ck.XGradCAM, axiom),
    "LayerCAM": (ck.LayerCAM, lambda a, g: (g.relu() * a).sum(1)),
    "HiResCAM": (ck.HiResCAM, lambda a, g: (g * a).sum(1)),
    "GradCAM": (ck.GradCAM, lambda a, g: (g.mean((2, 3), keepdim=True) * a).sum(1)),
}
every_method = pytest.mark.parametrize("name", METHODS)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 3, 9, 8, generator=generator).double(), torch.tensor([4, 0, 2])


class Positive(nn.Module):
    """A network whose tapped layer is not negative, as behind a ReLU."""

    def __init__(self, head: str) -> None:
        super().__init__()
        net = Net(head)
        self.body = nn.Sequential(net.body, nn.ReLU())
        self.head = net.head

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x))
        return logits


@every_method
@pytest.mark.parametrize("head", ["pool", "tanh"])
@pytest.mark.parametrize("relu", [True, False])
def test_maps_and_their_gradients(name: str, head: str, relu: bool) -> None:
    model = Positive(head).double()
    x, targets = batch()
    twin = copy.deepcopy(model)
    a = twin.body(x)
    score = twin.head(a).gather(1, targets[:, None]).sum()
    (g,) = torch.autograd.grad(score, a, create_graph=True)
    expected = METHODS[name][1](a, g)
    expected = expected.relu() if relu else expected
    with METHODS[name][0](model, "body", relu=relu) as cam:
        maps = cam(model(x), targets)
        assert cam.head.startswith("closed form" if head == "pool" else "autograd")
        torch.testing.assert_close(maps, expected)
        statistics = cam.statistics(model(x), targets)
        torch.testing.assert_close(statistics.mean, expected.mean((1, 2)))
    found = torch.autograd.grad(maps.square().sum(), list(model.parameters()), allow_unused=True)
    wanted = torch.autograd.grad(
        expected.square().sum(), list(twin.parameters()), allow_unused=True
    )
    for ours, theirs in zip(found, wanted, strict=True):
        # of what the map does not depend on a closed form has None, autograd may have zeros
        ours = torch.zeros(1).double() if ours is None else ours
        theirs = torch.zeros_like(ours) if theirs is None else theirs
        torch.testing.assert_close(ours.expand_as(theirs), theirs, rtol=1e-7, atol=1e-10)


@every_method
@pytest.mark.parametrize("head", ["pool", "tanh"])
def test_without_gradients(name: str, head: str) -> None:
    model = Positive(head)
    x, targets = batch()
    with METHODS[name][0](model, "body") as cam:
        expected = cam(model(x.float()), targets).detach()
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                maps = cam(model(x.float()), targets)
                assert not maps.requires_grad
                torch.testing.assert_close(maps.clone(), expected)


@every_method
def test_half_precision(name: str) -> None:
    """float16 gradients behind a pooling are scaled up; a method that is not linear undoes it."""
    model = Positive("tanh")
    x, targets = batch()
    with METHODS[name][0](model, "body") as cam:
        expected = cam(model(x.float()), targets).detach()
    half = copy.deepcopy(model).half()
    with METHODS[name][0](half, "body") as cam:
        found = cam(half(x.half()), targets)
    scale = float(expected.abs().max())
    assert float((found.float() - expected).abs().max().detach()) <= 2e-2 * scale


def test_cam_needs_a_closed_form() -> None:
    x, targets = batch()
    model = Positive("pool").double()
    with ck.CAM(model, "body") as cam, ck.GradCAM(model, "body") as grad_cam:
        logits = model(x)
        torch.testing.assert_close(cam(logits, targets), grad_cam(logits, targets))
    model = Positive("tanh").double()
    with ck.CAM(model, "body") as cam:
        logits = model(x)
        with pytest.raises(ck.TapError, match="closed_form"):
            cam(logits, targets)


def test_functions_refuse_what_they_cannot() -> None:
    a = torch.rand(2, 3, 4, 5)
    with pytest.raises(ValueError, match="method: unknown 'gradcam', allowed are gradcam"):
        ck.cam_weights(a, a, "gradcam")
    with pytest.raises(ValueError, match="eps: expected"):
        ck.cam_weights(a, a, eps=-1.0)
    with pytest.raises(ValueError, match="eps: expected"):
        ck.GradCAMPlusPlus(Positive("pool"), "body", eps=float("nan"))
    with pytest.raises(TypeError, match="gradients: expected the dtype of the activations"):
        ck.cam_pixels(a, a.half())
    with pytest.raises(ValueError, match="gradients"):
        ck.cam_pixels(a, a[:, :2])
    with pytest.raises(TypeError, match="activations"):
        ck.cam_weights(a.long(), a)
