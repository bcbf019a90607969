"""Metrics of explanations against loops over single images, their edges, and what is refused."""

from __future__ import annotations

import copy
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from skimage import measure
from torch import Tensor, nn

from camkernels import metrics
from camkernels.metrics.curves import blurred

SIZE = (12, 10)


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2)]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.5), nn.Linear(24, 4)).double()
    with torch.no_grad():
        net[-1].weight.mul_(6)  # scores that differ
    return net.train()


def data(count: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, *SIZE, generator=generator).double()
    maps = torch.rand(count, 4, 3, generator=generator).double()
    return images, maps, torch.tensor([0, 1, 2, 3, 1][:count])


def scores(net: nn.Module, image: Tensor, target: Tensor) -> float:
    with torch.no_grad():
        return float(copy.deepcopy(net).eval()(image[None]).softmax(1)[0, target])


def enlarged(a_map: Tensor) -> Tensor:
    """Line by line in numpy, which takes the border's value beyond it: ties there are exact."""
    places = [
        (np.arange(long) + 0.5) * short / long - 0.5
        for short, long in zip(a_map.shape, SIZE, strict=True)
    ]
    lines = [np.interp(places[1], np.arange(len(line)), line) for line in a_map.double().numpy()]
    columns = [np.interp(places[0], np.arange(len(line)), line) for line in np.stack(lines, 1)]
    return torch.from_numpy(np.stack(columns, 1))


def scaled(a_map: Tensor) -> Tensor:
    large = enlarged(a_map)
    low, high = a_map.min(), a_map.max()
    return (large - low) / (high - low)


@pytest.mark.parametrize("convention", ["headroom", "relative"])
@pytest.mark.parametrize("background", [0.0, (-0.5, 0.2, 0.1)])
def test_drop_increase_and_gain(convention: str, background: Any) -> None:
    net, (images, maps, targets) = model(), data()
    colour = torch.tensor(background).double().view(-1, 1, 1)
    drops, increases, gains = [], [], []
    for image, a_map, target in zip(images, maps, targets, strict=True):
        mask = scaled(a_map)
        p, o = scores(net, image, target), scores(net, image * mask + colour * (1 - mask), target)
        drops.append(100 * max(p - o, 0) / p)
        increases.append(100.0 * (p < o))
        gains.append(100 * max(o - p, 0) / (1 - p if convention == "headroom" else p))
    metric = metrics.ConfidenceChange(
        net, gain=convention, batch_size=2, background=torch.tensor(background)
    )
    metric.update(images[:3], maps[:3], targets[:3])
    metric.update(images[3:], maps[3:], targets[3:])
    found = metric.compute()
    assert len(set(increases)) == 2  # both happen
    for name, values in (
        ("average_drop", drops), ("average_increase", increases), ("average_gain", gains),
    ):  # fmt: skip
        assert float(found[name]) == pytest.approx(np.mean(values), rel=1e-9), name
    metric.reset()
    assert math.isnan(metric.compute()["average_drop"])


def test_removal_of_the_top_quarter() -> None:
    net, (images, maps, targets) = model(), data()
    changes = []
    for image, a_map, target in zip(images, maps, targets, strict=True):
        large = enlarged(a_map)
        keep = large < torch.from_numpy(np.array(np.percentile(large.numpy(), 75)))
        assert 30 <= int((~keep).sum()) <= 40  # equal values go together
        changes.append(scores(net, image * keep, target) - scores(net, image, target))
    metric = metrics.RemovalChange(net)
    metric.update(images, maps, targets)
    assert float(metric.compute()) == pytest.approx(np.mean(changes), rel=1e-9)


def test_insertion_and_deletion() -> None:
    net, (images, maps, targets) = model(), data()
    for kind in ("insertion", "deletion"):
        areas = []
        for image, a_map, target in zip(images, maps, targets, strict=True):
            order = enlarged(a_map).flatten().argsort(descending=True, stable=True)
            soft = blurred(image[None])[0]
            before, after = (soft, image) if kind == "insertion" else (image, 0 * image)
            curve = []
            for step in range(9):
                picture = before.clone().flatten(1)
                chosen = order[: step * 120 // 8]
                picture[:, chosen] = after.flatten(1)[:, chosen]
                curve.append(scores(net, picture.view_as(image), target))
            areas.append(np.trapezoid(curve, dx=1 / 8))
        metric = (metrics.InsertionAUC if kind == "insertion" else metrics.DeletionAUC)(
            net, steps=8, batch_size=7
        )
        metric.update(images, maps, targets)
        assert float(metric.compute()) == pytest.approx(np.mean(areas), rel=1e-6), kind


def test_predicted_targets_and_structured_outputs() -> None:
    class Structured(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"out": self.inner(x)}

    net, (images, maps, _) = model(), data()
    predicted = copy.deepcopy(net).eval()(images).argmax(1)
    values = []
    for made, targets in (
        (metrics.ConfidenceChange(net), predicted),
        (metrics.ConfidenceChange(net), None),
        (metrics.ConfidenceChange(Structured(net), logits=lambda output: output["out"]), None),
    ):
        made.update(images, maps, targets)
        values.append(float(made.compute()["average_drop"]))
    assert values[0] == values[1] == values[2]


def test_the_model_is_left_as_it_was_and_is_no_part_of_the_state() -> None:
    net, (images, maps, targets) = model(), data()
    net[0].eval()
    before = copy.deepcopy(net.state_dict())
    modes = [m.training for m in net.modules()]
    metric = metrics.ConfidenceChange(net)
    metric.update(images, maps, targets)
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not list(metric.parameters())
    assert not metric.state_dict()


def rectangle(top: int, left: int, height: int, width: int) -> Tensor:
    made = torch.zeros(1, *SIZE)
    made[:, top : top + height, left : left + width] = 1
    return made


def test_pointing_and_energy_of_boxes_and_masks() -> None:
    maps = torch.cat([rectangle(2, 3, 4, 5), rectangle(0, 0, 2, 2), torch.zeros(1, *SIZE)])
    boxes = torch.tensor([[2, 3, 4, 2], [5, 5, 3, 3], [0, 0, 4, 4]])
    masks = torch.cat([rectangle(*box) for box in boxes.tolist()]).bool()
    for regions in (boxes, masks):
        pointing, energy = metrics.PointingGame(), metrics.EnergyInRegion()
        pointing.update(maps, regions, SIZE)
        energy.update(maps, regions, SIZE)
        assert float(pointing.compute()) == pytest.approx(1 / 3)
        assert float(energy.compute()) == pytest.approx((8 / 20) / 3)
    both = (rectangle(2, 3, 4, 2) + rectangle(2, 7, 4, 1)).bool()  # two objects
    assert float(metrics.localisation(maps[:1], both, SIZE)[1]) == pytest.approx(12 / 20)


def test_boxes_are_around_the_largest_segment() -> None:
    one = rectangle(1, 1, 3, 4) + 0.5 * rectangle(6, 2, 5, 6)  # the weaker one is larger
    one[0, 11, 9] = 1
    found = metrics.box_of_map(one, SIZE, 0.15)
    assert found.tolist() == [[6, 2, 5, 6]]
    assert metrics.box_of_map(one, SIZE, 0.6).tolist() == [[1, 1, 3, 4]]
    assert metrics.box_of_map(torch.zeros(2, *SIZE), SIZE).tolist() == [[0, 0, 0, 0]] * 2
    diagonal = torch.eye(12)[None, :, :10]
    assert metrics.box_of_map(diagonal, SIZE).tolist() == [[0, 0, 10, 10]]
    winding = torch.tensor(
        [[1, 1, 1, 1, 1], [0, 0, 0, 0, 1], [1, 1, 1, 0, 1], [1, 0, 0, 0, 1], [1, 1, 1, 1, 1]]
    ).float()
    assert metrics.box_of_map(winding[None], (5, 5)).tolist() == [[0, 0, 5, 5]]


def test_segments_are_those_of_scikit_image() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = (torch.rand(30, 15, 17, generator=generator) > 0.6).float()
    found = metrics.box_of_map(maps, (15, 17))
    for a_map, box in zip(maps, found.tolist(), strict=True):
        labels = measure.label(a_map.numpy(), connectivity=2)
        regions = sorted(measure.regionprops(labels), key=lambda r: (-r.area, r.label))
        top, left, bottom, right = regions[0].bbox
        assert box == [top, left, bottom - top, right - left]


def test_iou() -> None:
    boxes = torch.tensor([[0, 0, 4, 4], [0, 0, 4, 4], [0, 0, 0, 0], [1, 1, 2, 2]])
    others = torch.tensor([[2, 2, 4, 4], [4, 4, 2, 2], [0, 0, 0, 0], [1, 1, 2, 2]])
    found = metrics.box_iou(boxes, others)
    torch.testing.assert_close(found, torch.tensor([4 / 28, 0, 0, 1]).double())
    metric = metrics.BoxIoU()
    metric.update(rectangle(2, 3, 4, 5), torch.tensor([[2, 3, 4, 5]]), SIZE)
    metric.update(rectangle(2, 3, 4, 5), torch.tensor([[2, 3, 4, 10]]), SIZE)
    assert float(metric.compute()) == pytest.approx(0.75)


def test_edges_of_the_ratios() -> None:
    zero, one = torch.zeros(1), torch.ones(1)
    assert metrics.drop(zero, one).tolist() == [0]
    assert metrics.gain(one, one).tolist() == [0]  # nothing was left to gain
    assert metrics.gain(zero, one, "relative").tolist() == [0]
    assert metrics.increase(one, one).tolist() == [0]
    nan = torch.tensor([math.nan])
    assert bool(metrics.drop(one, nan).isnan().all())


def test_a_collection_and_empty_batches() -> None:
    net, (images, maps, targets) = model(), data()
    collection = torchmetrics.MetricCollection(
        {"change": metrics.ConfidenceChange(net), "insertion": metrics.InsertionAUC(net, steps=4)}
    )
    collection.update(images, maps, targets)
    before = {k: float(v) for k, v in collection.compute().items()}
    assert set(before) == {"average_drop", "average_increase", "average_gain", "insertion"}
    collection.update(images[:0], maps[:0], targets[:0])
    assert {k: float(v) for k, v in collection.compute().items()} == before


def test_what_is_refused() -> None:
    net, (images, maps, targets) = model(), data()
    metric = metrics.ConfidenceChange(net)
    with pytest.raises(ValueError, match=r"maps: expected \(5, h, w\), got \(4, 4, 3\)"):
        metric.update(images, maps[:4], targets)
    with pytest.raises(IndexError, match="class 8 is out of range"):
        metric.update(images, maps, targets + 5)
    with pytest.raises(TypeError, match="callable"):
        metric.update(images, maps, lambda logits: logits[:, 0])
    with pytest.raises(ValueError, match="background"):
        metrics.ConfidenceChange(net, background=torch.zeros(2)).update(images, maps, targets)
    with pytest.raises(ValueError, match="gain: expected one of headroom, relative"):
        metrics.ConfidenceChange(net, gain="all")
    with pytest.raises(ValueError, match="share"):
        metrics.RemovalChange(net, share=1.0)
    with pytest.raises(ValueError, match="batch_size"):
        metrics.InsertionAUC(net, batch_size=0)
    with pytest.raises(ValueError, match="threshold"):
        metrics.BoxIoU(0.0)
    with pytest.raises(ValueError, match="regions: expected boxes"):
        metrics.localisation(maps, torch.zeros(5, 3), SIZE)
    with pytest.raises(ValueError, match="regions: expected masks"):
        metrics.localisation(maps, torch.zeros(5, 3, 3, dtype=torch.bool), SIZE)
    with pytest.raises(ValueError, match="regions: expected one per map"):
        metrics.localisation(maps, torch.zeros(4, 4), SIZE)
    with pytest.raises(ValueError, match="maps: expected floating-point"):
        metrics.box_of_map(maps.long(), SIZE)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        metrics.Nothing  # noqa: B018


def test_without_torchmetrics_the_functions_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    monkeypatch.delitem(sys.modules, "camkernels.metrics.accumulated", raising=False)
    assert metrics.drop(torch.ones(1), torch.zeros(1)).tolist() == [100]
    with pytest.raises(ImportError, match=r"needs torchmetrics.*camkernels\[train\]"):
        metrics.ConfidenceChange  # noqa: B018
