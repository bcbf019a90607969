"""The digits: the same for the same seed, split by scan, and boxes that are true."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from camtrain.data.digits import Digits, compose, scans
from camtrain.data.sampling import generator
from camtrain.errors import CamtrainError


def test_the_seed_decides_everything() -> None:
    one, two = (Digits("train", 48, seed=5, length=12) for _ in range(2))
    assert torch.equal(one.images, two.images)
    assert torch.equal(one.boxes, two.boxes)
    assert torch.equal(one.targets, two.targets)
    assert not torch.equal(one.images, Digits("train", 48, seed=6, length=12).images)
    # a longer set begins with the shorter one
    assert torch.equal(one.images, Digits("train", 48, seed=5, length=15).images[:12])


def test_the_splits_share_no_scan() -> None:
    train, test = (scans(split, 0)[0] for split in ("train", "test"))
    assert len(train) + len(test) == 1797
    keys = [{scan.tobytes() for scan in split} for split in (train, test)]
    assert not keys[0] & keys[1]


def test_the_box_holds_the_digit() -> None:
    """Two canvases that differ in the scan alone differ inside the boxes alone."""
    images, labels = scans("train", 0)
    first, second = images[labels == 0][0], images[labels == 1][0]
    a, box_a = compose(generator(1), first, images, 64)
    empty = np.zeros((8, 8))
    empty[2:6, 2:6] = 1e-3  # no ink to speak of
    top, left, height, width = box_a
    inside = np.zeros((64, 64), bool)
    inside[top : top + height, left : left + width] = True
    assert a[inside].mean() > 2 * a[~inside].mean()
    assert a[top].max() > 0.1 * 255  # tight: ink in the first and last row and column
    _, box_b = compose(generator(1), second, images, 64)
    assert box_b[3] < box_a[3]  # a one is narrower than a zero


def test_boxes_lie_on_the_canvas_and_move() -> None:
    data = Digits("test", 64, length=60)
    top, left, height, width = data.boxes.unbind(1)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 64).all()
    assert (left + width <= 64).all()
    assert (height >= 8).all()
    assert top.std() > 8
    assert left.std() > 8
    assert data.images.dtype == torch.uint8
    assert set(data.targets.tolist()) == set(range(10))
    item = data[3]
    assert item["images"].shape == (3, 64, 64)


def test_a_canvas_too_small_is_refused() -> None:
    with pytest.raises(CamtrainError, match="image_size"):
        Digits("train", 16, length=1)
