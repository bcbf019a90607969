"""Scores of maps made by hand."""

from __future__ import annotations

import math

import pytest
import torch
from camtrain.measures import EpochMeasures, MapMeasures

import camkernels as ck
from camkernels.metrics import localisation


def test_pointing_and_energy_of_hand_made_maps() -> None:
    maps = torch.zeros(4, 4, 4)
    maps[0, 1, 1] = 1.0  # inside
    maps[1, 3, 3] = 1.0  # outside
    maps[2] = 1.0  # flat: the share of the area
    boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0]]).expand(4, 4)
    pointing, energy = localisation(maps, boxes, (16, 16))
    assert pointing.tolist()[:2] == [True, False]
    assert energy[1] == 0
    assert energy[2] == pytest.approx(0.25)
    assert (pointing[3], energy[3]) == (False, 0)  # dead
    assert 0.5 < energy[0] < 1  # interpolation spreads one pixel over its neighbours


def test_the_box_is_top_left_height_width() -> None:
    maps = torch.zeros(1, 8, 8)
    maps[0, 1, 6] = 1.0  # top right
    tall = torch.tensor([[0.0, 40.0, 16.0, 24.0]])
    swapped = torch.tensor([[40.0, 0.0, 24.0, 16.0]])
    assert localisation(maps, tall, (64, 64))[0].item()
    assert not localisation(maps, swapped, (64, 64))[0].item()


def test_without_upsampling_energy_is_exact() -> None:
    maps = torch.rand(3, 8, 8)
    boxes = torch.tensor([[2.0, 3.0, 4.0, 1.0]]).expand(3, 4)
    _, energy = localisation(maps, boxes, (8, 8))
    expected = maps[:, 2:6, 3:4].sum((1, 2)) / maps.sum((1, 2))
    torch.testing.assert_close(energy, expected)


def test_means_are_over_live_maps() -> None:
    maps = torch.zeros(4, 2, 2)
    maps[0] = 1.0  # ce = ln 4
    maps[1, 0, 0] = 1.0  # ce = 0, cd = 3
    measures = MapMeasures()
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0]]).expand(4, 4)
    for chunk in (slice(0, 1), slice(1, 4)):  # in uneven batches
        part = maps[chunk]
        measures.update(ck.map_statistics(part), part, boxes[chunk], (2, 2))
    values = {name: float(value) for name, value in measures.compute().items()}
    assert values["entropy"] == pytest.approx(math.log(4) / 2)
    assert values["dispersion"] == pytest.approx(1.5)
    assert values["dead"] == pytest.approx(0.5)
    assert values["pointing"] == 1
    assert values["energy"] == pytest.approx(1)


def test_without_boxes_there_are_no_scores() -> None:
    measures = EpochMeasures(3)
    assert measures.compute() == {}
    maps = torch.rand(2, 4, 4)
    logits, targets = torch.eye(3)[:2], torch.tensor([0, 2])
    loss = torch.tensor(1.5)
    measures.update(logits, targets, loss, loss, ck.map_statistics(maps), maps, None, (8, 8))
    values = measures.compute()
    assert values["accuracy"] == 0.5
    assert values["loss"] == 1.5
    assert "pointing" not in values
    measures.reset()
    assert measures.compute() == {}


def test_a_loss_that_is_not_finite_shows() -> None:
    measures = EpochMeasures(3)
    maps = torch.rand(2, 4, 4)
    logits, targets = torch.eye(3)[:2], torch.tensor([0, 2])
    for loss in (torch.tensor(1.0), torch.tensor(math.nan)):
        measures.update(logits, targets, loss, loss, ck.map_statistics(maps), maps, None, (8, 8))
    values = measures.compute()
    assert math.isnan(values["loss"])
    assert values["accuracy"] == 0.5


def test_all_dead_maps_give_no_number() -> None:
    measures = MapMeasures()
    maps = torch.zeros(2, 4, 4)
    measures.update(ck.map_statistics(maps), maps, None, (8, 8))
    values = measures.compute()
    assert values["dead"] == 1
    assert values["entropy"].isnan()
