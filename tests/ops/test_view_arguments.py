"""Bad arguments of warp, ssim and warped_ssim, which no backend gets to see."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import camkernels as ck

GOOD = (torch.rand(2, 7, 7), torch.tensor([[0, 0, 7, 7]] * 2), torch.tensor([False, True]))


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([[0, 0, 7, 8], [0, 0, 7, 7]], "leaves a picture of 7 x 7"),
        ([[0, 0, 7, 7], [-1, 0, 7, 7]], "sample 1"),
        ([[0, 0, 0, 7], [0, 0, 7, 7]], "is empty"),
        ([[6, 6, 2, 2], [0, 0, 7, 7]], "leaves"),
        ([[5, 5, 2, -2], [0, 0, 7, 7]], "is empty"),
        ([[1, 1, 2**63 - 1, 2], [0, 0, 7, 7]], "leaves"),  # top + height overflows
        ([[1, 1, 2, 2**63 - 1], [0, 0, 7, 7]], "leaves"),
        ([[2**63 - 1, 0, 1, 1], [0, 0, 7, 7]], "leaves"),
        ([[-(2**63), 0, 7, 7], [0, 0, 7, 7]], "leaves"),
        ([[0, 0, 7, 7]], r"expected \(2, 4\) for this batch"),
    ],
)
def test_boxes_that_are_none(boxes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ck.warp(GOOD[0], torch.tensor(boxes))
    with pytest.raises(ValueError, match=message):
        ck.warped_ssim(GOOD[0], GOOD[0], torch.tensor(boxes), size=(7, 7))


def test_the_end_of_an_int32_box_does_not_overflow() -> None:
    boxes = torch.tensor([[1, 1, 2**31 - 1, 2], [0, 0, 7, 7]], dtype=torch.int32)
    with pytest.raises(ValueError, match="leaves a picture of 7 x 7"):
        ck.warp(GOOD[0], boxes)


def test_wrong_arguments() -> None:
    maps, boxes, flips = GOOD
    with pytest.raises(TypeError, match="boxes: expected an int64"):
        ck.warp(maps, boxes.float())
    with pytest.raises(TypeError, match="boxes: expected an int64 or int32"):
        ck.warp(maps, boxes.short())
    with pytest.raises(TypeError, match="flips: expected a bool"):
        ck.warp(maps, boxes, flips.long())
    with pytest.raises(ValueError, match="flips: expected"):
        ck.warp(maps, boxes, flips[:1])
    with pytest.raises(TypeError, match="images: expected float32"):
        ck.warp(maps.long(), boxes)
    with pytest.raises(ValueError, match="images"):
        ck.warp(maps[0], boxes)
    for size in ((0, 4), (4,), (4.0, 4), 7):
        with pytest.raises(ValueError, match="size: expected two positive integers"):
            ck.warp(maps, boxes, flips, size)  # type: ignore[arg-type]
    for options, name in (
        ({"window_size": 4}, "window_size"),
        ({"window_size": 0}, "window_size"),
        ({"sigma": 0.0}, "sigma"),
        ({"data_range": -1.0}, "data_range"),
        ({"window": "box"}, "window"),
        ({"padding": "reflect"}, "padding"),
        ({"k1": -1.0}, "k1"),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            ck.ssim(maps, maps, **options)
    with pytest.raises(ValueError, match="y: expected the shape of x"):
        ck.ssim(maps, maps[:, :3])
    with pytest.raises(TypeError, match="float64 goes with float64"):
        ck.ssim(maps, maps.double())
    with pytest.raises(ValueError, match="others: expected a batch of 2"):
        ck.warped_ssim(maps, maps[:1], boxes)
