"""Pictures without a box, maps that are not finite, and batches of nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torchmetrics
from torch import Tensor

from camkernels import metrics

SIZE = (8, 8)
METRICS = [metrics.PointingGame, metrics.EnergyInRegion, metrics.BoxIoU, metrics.MaxBoxAccV2]


def data() -> tuple[Tensor, Tensor]:
    maps = torch.rand(6, 4, 4, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[0.0, 0, 4, 8]]).repeat(6, 1)
    boxes[1, 2], boxes[2, 3], boxes[4, 0], boxes[5, 2] = 0, 0, math.nan, -2
    return maps, boxes  # of 0 and 3 only


def value(metric: Any) -> float:
    found = metric.compute()
    return float(found["max_box_acc"] if isinstance(found, dict) else found)


@pytest.mark.parametrize("make", METRICS)
def test_boxes_that_are_missing_are_left_out_and_counted(make: Any) -> None:
    maps, boxes = data()
    alone, metric = make(), make()
    alone.update(maps[[0, 3]], boxes[[0, 3]], SIZE)
    metric.update(maps[:3], boxes[:3], SIZE)
    metric.update(maps[3:], boxes[3:], SIZE)
    assert value(metric) == value(alone) > 0
    assert (float(metric.missing), float(alone.missing)) == (4, 0)
    metric.reset()
    assert float(metric.missing) == 0
    metric.update(maps[1:3], boxes[1:3], SIZE)
    assert math.isnan(value(metric))
    assert float(metric.missing) == 2


@pytest.mark.parametrize("make", METRICS[:2])
def test_empty_masks_are_missing(make: Any) -> None:
    maps, _ = data()
    masks = torch.zeros(6, *SIZE, dtype=torch.bool)
    masks[0, :4], masks[3, 2:, 1:] = True, True
    alone, metric = make(), make()
    alone.update(maps[[0, 3]], masks[[0, 3]], SIZE)
    metric.update(maps, masks, SIZE)
    assert value(metric) == value(alone) > 0
    assert float(metric.missing) == 4


@pytest.mark.parametrize("make", METRICS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_map_that_is_not_finite_makes_the_mean_nan(make: Any, bad: float) -> None:
    maps, boxes = data()
    maps[1, 0, 0] = bad
    metric = make()
    metric.update(maps[:2], boxes[:2], SIZE)  # the bad map has no box
    assert not math.isnan(value(metric))
    metric.update(maps[1:2], boxes[:1], SIZE)
    assert math.isnan(value(metric))


@pytest.mark.parametrize("make", METRICS)
def test_nothing_at_all(make: Any) -> None:
    maps, boxes = data()
    metric = make()
    metric.update(maps[:0], boxes[:0], SIZE)
    assert math.isnan(value(metric))
    assert float(metric.missing) == 0
    metric.update(maps[:1], boxes[:1], SIZE)
    before = value(metric)
    metric.update(maps[:0], boxes[:0], SIZE)
    assert value(metric) == before


@pytest.mark.parametrize("make", METRICS)
def test_processes_share_sums(make: Any) -> None:
    maps, boxes = data()
    whole, one, other = make(), make(), make()
    whole.update(maps, boxes, SIZE)
    one.update(maps[:4], boxes[:4], SIZE)
    other.update(maps[4:], boxes[4:], SIZE)
    assert set(one._reductions.values()) == {torchmetrics.utilities.dim_zero_sum}
    one.merge_state(other)
    assert value(one) == pytest.approx(value(whole))
    assert float(one.missing) == 4
