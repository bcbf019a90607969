"""camkernels.compat against pytorch-grad-cam itself, call by call."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from camkernels import compat

METHODS = ("GradCAM", "GradCAMPlusPlus", "XGradCAM", "LayerCAM", "HiResCAM")
CATEGORIES = [4, 0, 2]


def net() -> nn.Module:
    torch.manual_seed(1)
    first = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
    second = nn.Sequential(nn.Conv2d(6, 8, 3, 2), nn.ReLU())
    third = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Tanh())
    return nn.Sequential(
        first, second, third, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )


def images() -> Tensor:
    return torch.randn(3, 3, 18, 14, generator=torch.Generator().manual_seed(2))


def call(package: Any, name: str, model: nn.Module, layers: list[int], **options: Any) -> Any:
    with getattr(package, name)(model=model, target_layers=[model[i] for i in layers]) as cam:
        return cam(input_tensor=images(), **options)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("layers", [[1], [0, 1]])
@pytest.mark.parametrize("targets", ["predicted", "classes", "softmax"])
@pytest.mark.parametrize("aug_smooth", [False, True])
def test_the_same_call_gives_the_same_maps(
    name: str, layers: list[int], targets: str, aug_smooth: bool
) -> None:
    peer = pytest.importorskip("pytorch_grad_cam")
    theirs = pytest.importorskip("pytorch_grad_cam.utils.model_targets")

    def chosen(package: Any) -> Any:
        if targets == "predicted":
            return None
        kind = {"classes": "ClassifierOutputTarget", "softmax": "ClassifierOutputSoftmaxTarget"}
        return [getattr(package, kind[targets])(c) for c in CATEGORIES]

    expected = call(peer, name, net(), layers, targets=chosen(theirs), aug_smooth=aug_smooth)
    for targets_of in (theirs, compat):
        found = call(compat, name, net(), layers, targets=chosen(targets_of), aug_smooth=aug_smooth)
        assert found.dtype == np.float32
        assert found.shape == expected.shape == (3, 18, 14)
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_model_is_as_before_and_outputs_are_kept() -> None:
    model = net().train()
    before = copy.deepcopy(model.state_dict())
    cam = compat.GradCAM(model, [model[1]])
    cam.batch_size = 2
    maps = cam(images())
    expected = copy.deepcopy(model).eval()(images())
    torch.testing.assert_close(cam.outputs, expected.detach())
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    np.testing.assert_allclose(maps, compat.GradCAM(model, [model[1]])(images()), atol=1e-6)


def test_score_cam_and_what_is_refused() -> None:
    model = net()
    with compat.ScoreCAM(model, [model[1]]) as cam:
        cam.batch_size = 5
        maps = cam(input_tensor=images(), targets=None)
    assert maps.shape == (3, 18, 14)
    assert maps.min() == 0
    assert maps.max() == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(ValueError, match="eigen_smooth: not supported"):
        compat.GradCAM(model, [model[1]])(images(), eigen_smooth=True)
    with pytest.raises(ValueError, match="targets: expected one per image, 3, got 1"):
        compat.GradCAM(model, [model[1]])(images(), [compat.ClassifierOutputTarget(1)])
    with pytest.raises(ValueError, match="not a submodule of the model"):
        compat.GradCAM(model, [nn.ReLU()])
