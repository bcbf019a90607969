"""CAMConsistencyLoss: each option against the eager oracle, values and parameter gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from consistency_oracle import BOXES, FLIPS, SIDE, cropped, eager_loss, eager_maps, eager_ssim
from nets import SmallNet, batch, largest_difference, model_and_twin, parameter_gradients
from torch import Tensor, nn

import camkernels as ck

CLASS_WEIGHTS = torch.tensor([0.2, 1.0, 3.0, 0.5, 2.0], dtype=torch.float64)
OPTIONS: dict[str, dict[str, Any]] = {
    "true class": {"target": "true"},
    "relu": {"relu": True},
    "raw maps": {"normalize": "none"},
    "raw maps, their range": {"normalize": "none", "data_range": 0.05},
    "size": {"size": (9, 7)},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "class weights": {"weight": CLASS_WEIGHTS, "label_smoothing": 0.2},
    "contrastive": {"distance": "contrastive"},
    "contrastive, none": {"distance": "contrastive", "reduction": "none"},
    "many": {
        "target": "true", "relu": True, "normalize": "none", "data_range": 0.2,
        "reduction": "sum", "label_smoothing": 0.1, "p": 2.0,
    },
}  # fmt: skip
CASES = [
    (name, views)
    for name, options in OPTIONS.items()
    for views in ("separate", "joint")
    if views == "separate" or "size" not in options  # joint views are as large as the images
]


def wrong_targets(model: nn.Module, images: Tensor) -> Tensor:
    """None of them the predicted class."""
    with torch.no_grad():
        return (copy.deepcopy(model)(images).argmax(1) + 1) % 5


def total(loss: Tensor) -> Tensor:
    """0-dim; samples told apart."""
    return (loss * torch.tensor([1.0, -2.0, 3.0, 0.5])).sum() if loss.dim() else loss


def compare(images: Tensor, targets: Tensor, views: str, boxes: Tensor = BOXES, layer: str = "body",
            window: int = 3, **options: Any) -> ck.CAMConsistencyLoss:  # fmt: skip
    """Loss and gradients of all parameters, ours and the oracle's; all in float64."""
    model, twin = model_and_twin()
    window_size = {} if window != 3 else {"window_size": 3}
    criterion = ck.CAMConsistencyLoss(
        model, layer, 3.0, 0.01, views=views, **window_size, **options
    )
    criterion.use(boxes, FLIPS)
    loss = criterion(model(images), targets)
    truth = eager_loss(
        twin, images, targets, 3.0, 0.01, joint=views == "joint", boxes=boxes, layer=layer,
        window_size=window, **options,
    )  # fmt: skip
    torch.testing.assert_close(loss, truth, rtol=0, atol=1e-10)
    found, wanted = (parameter_gradients(*a) for a in ((model, total(loss)), (twin, total(truth))))
    assert largest_difference(found, wanted) <= 1e-10
    return criterion


@pytest.mark.parametrize(("name", "views"), CASES)
def test_options(name: str, views: str) -> None:
    options = OPTIONS[name]
    images, _ = batch(side=SIDE)
    torch.manual_seed(1)  # a network some of whose maps have both signs
    model, twin = model_and_twin()
    targets = wrong_targets(model, images)
    plain, other = (
        eager_loss(twin, images, targets, 3.0, 0.01, joint=views == "joint", **chosen)
        for chosen in ({}, options)
    )
    assert bool(((plain - other).abs() > 1e-6).all()), "the option changes nothing here"
    torch.manual_seed(1)
    compare(images, targets, views, **options)


@pytest.mark.parametrize("views", ["separate", "joint"])
@pytest.mark.parametrize("weight", [None, CLASS_WEIGHTS])
def test_class_probabilities(views: str, weight: Tensor | None) -> None:
    images, _ = batch(side=SIDE)
    targets = torch.rand(4, 5, dtype=torch.float64).softmax(1)
    compare(images, targets, views, weight=weight, label_smoothing=0.1)


@pytest.mark.parametrize("views", ["separate", "joint"])
@pytest.mark.parametrize("normalize", ["minmax", "none"])
def test_maps_of_one_pixel(normalize: str, views: str) -> None:
    images, targets = batch(side=SIDE)
    criterion = compare(images, targets, views, layer="pool", normalize=normalize)
    assert float(criterion.terms["uniform"]) == 1
    if normalize == "minmax":
        assert bool((criterion.consistency == 1).all()), "both are 0 everywhere"


@pytest.mark.parametrize("views", ["separate", "joint"])
def test_the_default_window_on_a_smaller_image(views: str) -> None:
    """The largest odd one that fits 8 pixels has 7, with the same sigma."""
    images, targets = batch(side=8)
    boxes = torch.tensor([[0, 0, 8, 8], [1, 2, 5, 4], [3, 0, 4, 7], [4, 4, 4, 4]])
    compare(images, targets, views, boxes=boxes, window=7)


def test_small_raw_maps_need_their_range() -> None:
    model = SmallNet().double().eval()
    with torch.no_grad():
        model.fc[1].weight *= 1e-3
    images, targets = batch(side=SIDE)
    classes = model(images).argmax(1)
    maps, others = (
        eager_maps(model, x, classes, False, "body")[1]
        for x in (images, cropped(images, BOXES, (SIDE, SIDE)))
    )
    u, v = (nn.functional.interpolate(m[:, None], SIDE, mode="bilinear") for m in (maps, others))
    u = cropped(u, BOXES, (SIDE, SIDE))
    span = float(maps.max() - maps.min())
    scores = {}
    for data_range in (1.0, span):
        criterion = ck.CAMConsistencyLoss(
            model, "body", normalize="none", data_range=data_range, window_size=3
        )
        criterion(model(images), targets, BOXES, FLIPS)
        scores[data_range] = criterion.consistency
        expected = eager_ssim(u[:, 0], v[:, 0], 3, data_range)
        torch.testing.assert_close(criterion.consistency, expected, rtol=0, atol=1e-12)
    assert bool((scores[1.0] > 0.999).all()), "swamped: all are alike"
    assert bool((scores[span][1:] < 0.9).all())
