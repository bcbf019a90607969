"""Explainers on real pictures and trained weights, against captum."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from captum import attr
from explain import real
from torch import Tensor, nn

import camkernels as ck
from camkernels import metrics

pytest.importorskip("torchvision")
NAMES = ("both.png", "elephant.jpg", "zebra.jpg")


@pytest.fixture(scope="module")
def squeezenet(shared_data: Path) -> nn.Module:
    return real.squeezenet(shared_data)


@pytest.fixture(scope="module")
def pictures(shared_data: Path) -> Tensor:
    return real.pictures([shared_data / "demo_images" / name for name in NAMES], 224)


@pytest.fixture(scope="module")
def resnet20(shared_data: Path) -> nn.Module:
    return real.resnet20(shared_data)


@pytest.fixture(scope="module")
def small_pictures(shared_data: Path) -> tuple[Tensor, Tensor]:
    """CIFAR test pictures, four of each class, and their classes."""
    files, classes = [], []
    for index, folder in enumerate(sorted((shared_data / "cifar10_subset" / "test").iterdir())):
        chosen = sorted(folder.iterdir())[:4]
        files += chosen
        classes += [index] * len(chosen)
    return real.pictures(files, None), torch.tensor(classes)


def test_the_small_network_is_the_trained_one(
    resnet20: nn.Module, small_pictures: tuple[Tensor, Tensor]
) -> None:
    images, classes = small_pictures
    assert float((resnet20(images).argmax(1) == classes).float().mean()) >= 0.7


METHODS = ("GradCAM", "GradCAMPlusPlus", "XGradCAM", "LayerCAM", "HiResCAM")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("network", ["squeezenet", "resnet20"])
def test_maps_are_those_of_pytorch_grad_cam(
    name: str, network: str, request: pytest.FixtureRequest
) -> None:
    """Enlarged and scaled to [0, 1] by their extremes, as that library returns them."""
    peer = pytest.importorskip("pytorch_grad_cam")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    model: nn.Module = request.getfixturevalue(network)
    if network == "squeezenet":
        images, layer = request.getfixturevalue("pictures"), "features.12"
    else:
        images, layer = request.getfixturevalue("small_pictures")[0], "layer3"
    classes = model(images).argmax(1)
    twin = copy.deepcopy(model)
    theirs = getattr(peer, name)(twin, [twin.get_submodule(layer)])
    with theirs:
        chosen = [targets.ClassifierOutputTarget(int(c)) for c in classes]
        expected = torch.from_numpy(theirs(input_tensor=images.clone(), targets=chosen))
    options = {"eps": 1e-6} if name == "GradCAMPlusPlus" else {}
    with torch.no_grad(), getattr(ck, name)(model, layer, **options) as cam:
        maps = cam(model(images), classes)
    size = (images.shape[2], images.shape[3])
    large = F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    found = ck.min_max_normalize(large)
    live = maps.amax((1, 2)) > 0
    assert int(live.sum()) >= len(images) - 2
    assert float((found - expected)[live].abs().max()) <= 1e-3


def test_gradients_are_those_of_captum(squeezenet: nn.Module, pictures: Tensor) -> None:
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


@pytest.mark.slow
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


def test_metrics_are_those_of_torch_cam(
    resnet20: nn.Module, small_pictures: tuple[Tensor, Tensor]
) -> None:
    """Average drop and increase, insertion and deletion: those that it defines alike."""
    methods = pytest.importorskip("torchcam.methods", reason="make test installs it")
    peer = pytest.importorskip("torchcam.metrics", reason="make test installs it")
    images, _ = small_pictures
    classes = resnet20(images).argmax(1)

    def score(logits: Tensor) -> Tensor:  # torch-cam explains what it measures
        return logits.softmax(1).gather(1, classes[:, None])[:, 0]

    maps = ck.GradCAM(resnet20, "layer3").explain(images, score)
    alive = maps.flatten(1).amax(1) > 1e-4  # its 1e-8 dims smaller ones
    assert alive.sum() >= 20
    images, classes, maps = images[alive], classes[alive], maps[alive]
    twin = copy.deepcopy(resnet20)
    with methods.GradCAM(twin, "layer3", input_shape=(3, 32, 32)) as cam:

        def asked(metric: object) -> dict[str, float]:
            metric.update(images, classes.tolist())  # type: ignore[attr-defined]
            return metric.summary()  # type: ignore[attr-defined, no-any-return]

        def share(logits: Tensor) -> Tensor:
            return logits.softmax(-1)

        change = asked(peer.ClassificationMetric(cam, share))
        deletion = asked(peer.DeletionInsertionMetric(cam, share, steps=16))
        insertion = asked(
            peer.DeletionInsertionMetric(cam, share, steps=16, baseline=metrics.curves.blurred)
        )
    ours = metrics.ConfidenceChange(resnet20)
    ours.update(images, maps, classes)
    assert float(ours.compute()["average_drop"]) == pytest.approx(
        100 * change["avg_drop"], abs=0.01
    )
    assert float(ours.compute()["average_increase"]) == pytest.approx(
        100 * change["conf_increase"], abs=0.01
    )
    # beyond the outermost centres of the map pixels tie: theirs are ordered by rounding
    for metric, theirs, name in (
        (metrics.DeletionAUC(resnet20, steps=16), deletion, "deletion_auc"),
        (metrics.InsertionAUC(resnet20, steps=16), insertion, "insertion_auc"),
    ):
        metric.update(images, maps, classes)
        assert float(metric.compute()) == pytest.approx(theirs[name], abs=0.01)


def test_transformers_by_reshape_transform() -> None:
    """A ViT and a Swin of timm, against pytorch-grad-cam."""
    timm = pytest.importorskip("timm", reason="make test installs it")
    peer = pytest.importorskip("pytorch_grad_cam")
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64)

    def of_vit(tokens: Tensor) -> Tensor:
        return tokens[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)

    def of_swin(tokens: Tensor) -> Tensor:
        return tokens.permute(0, 3, 1, 2)

    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=48, num_heads=3, num_classes=7
    ).eval()
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=64, window_size=4, depths=(1, 1), num_heads=(2, 4),
        embed_dim=16, num_classes=7,
    ).eval()  # fmt: skip
    for model, layer, reshape, grid in (
        (vit, "blocks.1.norm1", of_vit, (4, 4)),
        (swin, "layers.1.blocks.0.norm1", of_swin, (8, 8)),
    ):
        for name in ("GradCAM", "LayerCAM"):
            twin = copy.deepcopy(model)
            theirs = getattr(peer, name)(
                twin, [twin.get_submodule(layer)], reshape_transform=reshape
            )
            expected = torch.from_numpy(theirs(input_tensor=images.clone(), targets=None))
            theirs.activations_and_grads.release()
            with getattr(ck, name)(model, layer, reshape_transform=reshape) as cam:
                maps = cam.explain(images, size="input")
            assert float((ck.min_max_normalize(maps) - expected).abs().max()) <= 1e-3
        with ck.ScoreCAM(model, layer, reshape_transform=reshape) as cam:
            assert cam.explain(images).shape == (2, *grid)
