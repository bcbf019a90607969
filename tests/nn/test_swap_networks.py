"""swap_in on networks of torchvision and timm: the numbers of the unswapped network."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from swapping import assert_same_step, counting, images, randomize_norms, twins
from torch import nn

import camkernels as ck

torchvision = pytest.importorskip("torchvision")

# name -> fused groups, functional ReLUs outside groups, side of the images
TORCHVISION = {
    "resnet18": (20, 0, 33),
    "resnet50": (53, 0, 33),
    "vgg11_bn": (8, 0, 32),
    "squeezenet1_1": (0, 0, 33),
    "densenet121": (120, 1, 64),  # at 33 its last BatchNorms see 2 values, and rounding grows
    "googlenet": (59, 2, 33),
    "regnet_x_400mf": (71, 0, 33),
}


def network(name: str) -> nn.Module:
    options = {"init_weights": True} if name == "googlenet" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(torchvision.models, name)(num_classes=10, **options)
    if name.startswith("vgg"):
        model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, 10)
    return model


SLOW = {"densenet121", "googlenet", "regnet_x_400mf"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in TORCHVISION]
)
def test_the_step_is_that_of_the_unswapped_network(name: str) -> None:
    groups, functional, side = TORCHVISION[name]
    swapped, plain = twins(randomize_norms(network(name)))
    report = ck.swap_report(swapped)
    assert report.fused_groups == groups
    assert sum(report.functional_relus.values()) == functional
    assert report.left_alone == {}
    assert swapped.state_dict().keys() == plain.state_dict().keys()
    for training in (True, False) if name == "resnet18" else (True,):
        swapped.train(training), plain.train(training)
        with counting("conv_bn_act") as counts:
            assert_same_step(swapped, plain, images(4 if side == 64 else 2, side))
        if name.startswith("resnet"):
            assert counts["conv_bn_act"] == groups


@pytest.mark.parametrize(
    ("name", "groups"), [("resnet26d", 31), pytest.param("regnetx_002", 44, marks=pytest.mark.slow)]
)
def test_timm(name: str, groups: int) -> None:
    timm = pytest.importorskip("timm")
    swapped, plain = twins(randomize_norms(timm.create_model(name, num_classes=10)))
    report = ck.swap_report(swapped)
    assert report.fused_groups == groups
    assert report.left_alone == {}
    assert_same_step(swapped, plain, images(side=33))


def resnet_groups(model: nn.Module) -> dict[str, list[str]]:
    return ck.swap_report(model).fused


def test_the_last_group_of_a_residual_block_holds_sum_and_relu() -> None:
    groups = resnet_groups(network("resnet50"))
    assert groups[""] == ["conv1 + bn1 + relu"]
    assert groups["layer1.0"] == [
        "conv1 + bn1 + relu",
        "conv2 + bn2 + relu",
        "conv3 + bn3 + add + relu",
    ]
    assert groups["layer1.0.downsample"] == ["0 + 1"]


def test_channels_last() -> None:
    swapped, plain = twins(network("resnet18").to(memory_format=torch.channels_last))
    x = images(side=33).to(memory_format=torch.channels_last)
    assert_same_step(swapped, plain, x)


def guided_by_hooks(model: nn.Module, run: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The guided gradient as people write it: full backward hooks on every ReLU module."""
    handles = [
        m.register_full_backward_hook(lambda _, gi, go: (gi[0].clamp(min=0),))
        for m in model.modules()
        if isinstance(m, nn.ReLU)
    ]
    result = run()
    for handle in handles:
        handle.remove()
    return result


def test_guided_gradient_of_a_network() -> None:
    swapped, plain = twins(randomize_norms(network("resnet18")))
    for module in plain.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    x = images(side=33).requires_grad_()
    expected = guided_by_hooks(
        plain, lambda: torch.autograd.grad(plain(x).logsumexp(1).sum(), x)[0]
    )
    with ck.modes.guided():
        (found,) = torch.autograd.grad(swapped(x).logsumexp(1).sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
