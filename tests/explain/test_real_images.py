"""Explainers on real pictures and trained weights, against captum."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import camkernels as ck
from camkernels import metrics

torchvision = pytest.importorskip("torchvision")
Image = pytest.importorskip("PIL.Image")
NAMES = ("both.png", "elephant.jpg", "zebra.jpg")


@pytest.fixture(scope="module")
def squeezenet(shared_data: Path) -> nn.Module:
    model = torchvision.models.squeezenet1_0()
    file = shared_data / "weights_squeezenet1_0_imagenet" / "squeezenet1_0_dc_fp16.pth"
    state = torch.load(file, weights_only=True)
    model.load_state_dict({name: value.float() for name, value in state.items()})
    return model.eval()


@pytest.fixture(scope="module")
def pictures(shared_data: Path) -> Tensor:
    found = []
    for name in NAMES:
        picture = Image.open(shared_data / "demo_images" / name).convert("RGB").resize((224, 224))
        found.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255)
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in
                       ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))  # fmt: skip
    return (torch.stack(found) - mean) / deviation


def test_gradients_are_those_of_captum(squeezenet: nn.Module, pictures: Tensor) -> None:
    attr = pytest.importorskip("captum.attr")
    theirs = copy.deepcopy(squeezenet)
    for module in theirs.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # captum's hooks cannot take it
    classes = squeezenet(pictures).argmax(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # captum tells that it sets hooks
        guided = attr.GuidedBackprop(theirs).attribute(pictures.clone(), target=classes)
        plain = attr.Saliency(theirs).attribute(pictures.clone(), target=classes, abs=False)
    for ours, expected in (
        (ck.GuidedBackprop(squeezenet)(pictures), guided),
        (ck.InputGradient(squeezenet)(pictures), plain),
    ):
        scale = expected.abs().amax((1, 2, 3), keepdim=True)
        assert float(((ours - expected).abs() / scale).max()) <= 1e-5


def test_guided_grad_cam_is_that_of_captum(squeezenet: nn.Module, pictures: Tensor) -> None:
    attr = pytest.importorskip("captum.attr")
    theirs = copy.deepcopy(squeezenet)
    for module in theirs.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    classes = squeezenet(pictures).argmax(1)
    layer = theirs.features[12]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cam = attr.LayerGradCam(theirs, layer).attribute(
            pictures.clone(), target=classes, relu_attributions=True
        )
        guided = attr.GuidedBackprop(theirs).attribute(pictures.clone(), target=classes)
    enlarged = F.interpolate(cam, pictures.shape[2:], mode="bilinear", align_corners=False)
    expected = guided * enlarged
    found = ck.GuidedGradCAM(squeezenet, "features.12")(pictures, classes)
    scale = expected.abs().amax((1, 2, 3), keepdim=True)
    assert float(((found - expected).abs() / scale).max()) <= 1e-5


def test_a_map_beats_its_opposite(squeezenet: nn.Module, pictures: Tensor) -> None:
    """On trained weights Grad-CAM finds what the class lives on."""
    with torch.no_grad(), ck.GradCAM(squeezenet, "features.12") as cam:
        maps = cam(squeezenet(pictures))
    assert isinstance(maps, Tensor)
    opposite = maps.amax((1, 2), keepdim=True) - maps
    found = {}
    for name, given in (("map", maps), ("opposite", opposite)):
        for kind in (metrics.InsertionAUC, metrics.DeletionAUC):
            metric = kind(squeezenet, steps=12)
            metric.update(pictures, given)
            found[name, kind.__name__] = float(metric.compute())
        drop = metrics.ConfidenceChange(squeezenet)
        drop.update(pictures, given)
        found[name, "drop"] = float(drop.compute()["average_drop"])
    assert found["map", "InsertionAUC"] > found["opposite", "InsertionAUC"] + 0.1
    assert found["map", "DeletionAUC"] < found["opposite", "DeletionAUC"] - 0.1
    assert found["map", "drop"] < found["opposite", "drop"]
