"""Score-CAM and Smooth Grad-CAM++ against loops by hand, and Score-CAM against torch-cam."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from explain import real
from torch import Tensor, nn

import camkernels as ck


class Net(nn.Module):
    """The tapped layer has a dead channel, and one that is constant but not zero."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.ReLU())
        self.head = nn.Sequential(
            nn.Conv2d(6, 5, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        with torch.no_grad():
            self.body[0].weight[1:3] = 0
            self.body[0].bias[1:3] = torch.tensor([-1.0, 0.7])
            self.head[0].weight *= 6
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += len(x)
        logits: Tensor = self.head(self.body(x))
        return logits


def images(count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 13, 11, generator=generator).double()


TARGETS = [4, 0, 2]


@pytest.mark.parametrize("score", ["logit", "softmax"])
@pytest.mark.parametrize("memory_format", [None, torch.channels_last])
@pytest.mark.parametrize("layer", ["body", "body.0"])  # not negative, and signed
def test_score_cam_by_hand(score: str, memory_format: Any, layer: str) -> None:
    model, x = Net().double(), images()
    maps = []
    for image, target in zip(x, TARGETS, strict=True):
        a = model.get_submodule(layer)(image[None])[0]

        def value(picture: Tensor, target: int = target) -> Tensor:
            logits = model(picture[None])
            return (logits.softmax(1) if score == "softmax" else logits)[0, target]

        changes = []
        for channel in a:
            mask = (channel - channel.min()) / (channel.max() - channel.min() + 1e-8)
            mask = F.interpolate(mask[None, None], (13, 11), mode="bilinear")[0, 0]
            changes.append(value(image * mask) - value(image))
        weights = torch.stack(changes).softmax(0)
        maps.append((weights[:, None, None] * a).sum(0).relu())
    expected = torch.stack(maps).detach()
    with ck.ScoreCAM(model, layer, score=score, memory_format=memory_format) as cam:
        for batch_size in (None, 1, 5):
            model.calls = 0
            torch.testing.assert_close(cam.explain(x, TARGETS, batch_size=batch_size), expected)
            live, groups = 4, 3 if batch_size == 1 else 1
            assert model.calls == 3 + 3 * live + groups  # all constant channels are one image
    signed = ck.ScoreCAM(model, layer, score=score, relu=False).explain(x, TARGETS)
    torch.testing.assert_close(signed.relu(), expected)


def test_score_cam_refuses() -> None:
    with pytest.raises(ValueError, match="score: expected one of logit, softmax, got 'probs'"):
        ck.ScoreCAM(Net(), "body", score="probs")
    with pytest.raises(ValueError, match="layer: no module named 'bodi'"):
        ck.ScoreCAM(Net(), "bodi")
    twice = nn.Sequential(nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    twice = nn.Sequential(twice[0], *twice)
    with pytest.raises(ck.TapError, match="'0' was reached 2 times in one forward"):
        ck.ScoreCAM(twice, "0").explain(images().float())


def test_score_cam_of_pictures_that_are_no_numbers() -> None:
    model, x = Net().double(), images()
    whole = ck.ScoreCAM(model, "body").explain(x, TARGETS)
    x[1, 0, 4, 4] = float("nan")
    found = ck.ScoreCAM(model, "body").explain(x, TARGETS)
    torch.testing.assert_close(found[[0, 2]], whole[[0, 2]])
    assert bool(found[1].isnan().any())


def test_score_cam_of_one_channel_is_its_positive_part() -> None:
    model = nn.Sequential(nn.Conv2d(3, 1, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    expected = model[0](images())[:, 0].relu().detach()
    torch.testing.assert_close(ck.ScoreCAM(model, "0").explain(images()), expected)


@pytest.mark.parametrize(
    "network", [pytest.param("squeezenet", marks=pytest.mark.slow), "resnet20"]
)
def test_score_cam_is_that_of_torch_cam(network: str, shared_data: Path) -> None:
    methods = pytest.importorskip("torchcam.methods", reason="make test installs it")
    pytest.importorskip("torchvision")
    model: nn.Module
    if network == "squeezenet":
        model, layer = real.squeezenet(shared_data), "features.12"
        x = real.pictures([shared_data / "demo_images" / "both.png"], 80)
    else:
        model, layer = real.resnet20(shared_data), "layer3"
        folders = sorted((shared_data / "cifar10_subset" / "test").iterdir())
        x = real.pictures([sorted(folder.iterdir())[0] for folder in folders], None)
    twin = copy.deepcopy(model)
    for module in twin.modules():  # torch-cam does not see what a later layer does in place
        if isinstance(module, nn.ReLU):
            module.inplace = False
    classes = model(x).argmax(1)
    with torch.no_grad(), methods.ScoreCAM(twin, layer, input_shape=tuple(x.shape[1:])) as theirs:
        logits = twin(x)
        (expected,) = theirs(classes.tolist(), logits)
    found = ck.ScoreCAM(model, layer).explain(x, classes)
    found = ck.min_max_normalize(found)
    assert float((found - expected).abs().max()) <= 1e-3


def test_smooth_grad_cam_by_hand() -> None:
    model, x = Net().double(), images()
    targets = torch.tensor(TARGETS)
    generator = torch.Generator().manual_seed(7)
    span = (x.flatten(1).amax(1) - x.flatten(1).amin(1)).view(-1, 1, 1, 1)
    powers: list[list[Tensor]] = [[], [], []]
    for _ in range(4):
        noise = torch.randn(x.shape[1:], generator=generator, dtype=torch.float64)
        a = model.body(x + 0.3 * span * noise)
        (g,) = torch.autograd.grad(model.head(a).gather(1, targets[:, None]).sum(), a)
        for power, values in enumerate(powers, 1):
            values.append(g**power)
    first, second, third = (torch.stack(values).mean(0) for values in powers)
    a = model.body(x).detach()
    for eps in (0.0, 1e-3):
        below = 2 * second + a.sum((2, 3), keepdim=True) * third + eps
        alpha = second / torch.where(second > 0, below, 1.0)
        weights = (alpha * first.relu()).sum((2, 3), keepdim=True)
        expected = (weights * a).sum(1).relu()
        made = ck.SmoothGradCAMPlusPlus(model, "body", samples=4, noise=0.3, seed=7, eps=eps)
        torch.testing.assert_close(made.explain(x, TARGETS), expected)
        torch.testing.assert_close(made.explain(x[1:2], TARGETS[1:2]), expected[1:2])


def test_smooth_grad_cam_without_noise_is_grad_cam_plus_plus() -> None:
    model, x = Net().double(), images()
    expected = ck.GradCAMPlusPlus(model, "body").explain(x)
    still = ck.SmoothGradCAMPlusPlus(model, "body", samples=2, noise=0.0)
    torch.testing.assert_close(still.explain(x), expected)
    small = copy.deepcopy(model).float()
    with torch.no_grad():  # gradients whose cubes are no float32
        small.head[0].weight *= 1e-16
    expected = ck.GradCAMPlusPlus(small, "body").explain(x.float(), TARGETS)
    assert 0 < float(expected.max()) < 1e-12
    found = ck.SmoothGradCAMPlusPlus(small, "body", samples=2, noise=0.0)
    torch.testing.assert_close(found.explain(x.float(), TARGETS), expected, rtol=1e-4, atol=0)


def test_smooth_grad_cam_refuses() -> None:
    for options, named in (
        ({"samples": 0}, "samples"),
        ({"noise": -1}, "noise"),
        ({"eps": -1}, "eps"),
    ):
        with pytest.raises(ValueError, match=f"{named}: expected"):
            ck.SmoothGradCAMPlusPlus(Net(), "body", **options)  # type: ignore[arg-type]
