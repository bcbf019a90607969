"""CAMEntropyLoss on the networks people train, against eager autograd in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from nets import eager_loss, largest_difference, parameter_gradients
from torch import nn

import camkernels as ck

torchvision = pytest.importorskip("torchvision", reason="the networks are torchvision's")
timm = pytest.importorskip("timm", reason="one network is timm's")
CLASSES = 10


def _tv(name: str) -> nn.Module:
    model: nn.Module = getattr(torchvision.models, name)(num_classes=CLASSES)
    return model


def _resnet18_300() -> nn.Module:
    model = _tv("resnet18")
    model.fc = nn.Sequential(nn.Linear(512, 300), nn.ReLU(), nn.Linear(300, CLASSES))
    return model


CASES: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "resnet18-layer4": (lambda: _tv("resnet18"), "layer4", "closed form: pool -> linear"),
    "resnet18-layer3": (lambda: _tv("resnet18"), "layer3", "autograd: Conv2d"),
    "resnet18-300": (_resnet18_300, "layer4", "closed form: pool -> linear -> relu -> linear"),
    "squeezenet1_1": (lambda: _tv("squeezenet1_1"), "features", "autograd: Conv2d"),
    "convnext_tiny": (lambda: _tv("convnext_tiny"), "features", "autograd: LayerNorm2d"),
    "resnet26d": (
        lambda: timm.create_model("resnet26d", num_classes=CLASSES),
        "layer4",
        "closed form: pool -> linear",
    ),
    "shufflenet": (lambda: _tv("shufflenet_v2_x0_5"), "conv5", "closed form: mean -> linear"),
}


@pytest.mark.parametrize("name", CASES)
def test_parameter_gradients_equal_eager_autograd(name: str) -> None:
    make, layer, head = CASES[name]
    torch.manual_seed(0)
    model = make().double()
    twin = copy.deepcopy(model)
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    targets = torch.tensor([1, 2, 3, 9])
    criterion = ck.CAMEntropyLoss(model, layer, beta=10.0)
    torch.manual_seed(1)  # dropout draws the same mask on both sides
    ours = parameter_gradients(model, criterion(model(images), targets))
    torch.manual_seed(1)
    theirs = parameter_gradients(twin, eager_loss(twin, layer, images, targets, 10.0))
    error = largest_difference(ours, theirs)
    print(f"{name} at {layer}: {criterion.head}; largest difference {error:.1e}")
    assert criterion.head.startswith(head)
    assert error <= 1e-9
    assert criterion.terms["live"] > 0


def test_activations_changed_in_place_after_the_tap_are_noticed() -> None:
    model = _tv("densenet121").eval()  # F.relu(features, inplace=True) in its forward
    criterion = ck.CAMEntropyLoss(model, "features")
    logits = model(torch.randn(1, 3, 64, 64))
    with pytest.raises(ck.TapError, match="changed in place"):
        criterion(logits, torch.tensor([0]))


def test_dropout_decides_the_head_of_mobilenet() -> None:
    model = _tv("mobilenet_v2")
    criterion = ck.CAMEntropyLoss(model, "features")
    images, targets = torch.randn(2, 3, 64, 64), torch.tensor([0, 1])
    criterion(model(images), targets)
    assert criterion.head == "autograd: dropout (p=0.2) is active in the head"
    model.eval()
    with torch.no_grad():
        criterion(model(images), targets)
    assert criterion.head == "closed form: mean -> linear"
