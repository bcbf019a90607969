"""Crops that are cut out on the device are those of the loader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from camtrain.config import FitConfig
from camtrain.data import cifar
from camtrain.data.labelled import LabelledPictures, Sample, cut_out
from camtrain.data.module import CamtrainData, collate
from camtrain.data.sampling import Draw
from camtrain.errors import CamtrainError
from camtrain.models import build_model
from camtrain.training import make_classifier
from picture_files import TinyCUB, write_picture

Tiny = Callable[..., FitConfig]


def test_of_cifar_they_are_the_same_to_the_byte() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    samples = [Sample(Path("none"), index) for index in range(9)]
    loader, device = (
        cifar.CifarPictures(samples, pixels, "cifar10", augment=True, augment_on=place, seed=4)
        for place in ("loader", "device")
    )
    draws = [Draw(epoch, index) for epoch in range(9) for index in range(9)]
    expected = collate([loader[draw] for draw in draws])
    got = cut_out(collate([device[draw] for draw in draws]), 32)
    assert got.keys() == expected.keys()
    torch.testing.assert_close(got["images"], expected["images"].float(), rtol=0, atol=1e-3)


def test_of_pictures_they_are_the_same_to_bilinear_tolerance(tmp_path: Path) -> None:
    write_picture(tmp_path / "smooth.png", 90, (96, 64))
    samples = [Sample(tmp_path / "smooth.png", 0)]
    loader, device = (
        LabelledPictures(
            samples, ("one",), 56, augment=True, augment_on=place, crop_scale=0.3, seed=4
        )
        for place in ("loader", "device")
    )
    draws = [Draw(epoch, 0) for epoch in range(40)]
    expected = collate([loader[draw] for draw in draws])["images"].float()
    batch = collate([device[draw] for draw in draws])
    assert batch["images"].shape == (40, 3, 64, 64)
    flips = batch["flips"]
    assert 8 < flips.sum() < 32
    got = cut_out(batch, 56)["images"]
    # red grows by 4 per pixel of the square of 64, green as well: half a pixel of rounding, and
    # what the two ways to resize make of it
    assert (got - expected).abs().max() < 4
    assert (got - expected).abs().mean() < 1


@pytest.mark.parametrize("place", ["loader", "device"])
def test_training_sees_crops_and_testing_the_middle(place: str, tiny: Tiny, tmp_path: Path) -> None:
    birds = TinyCUB(tmp_path / "data")
    config = tiny(data="cub", root=str(birds.root), arch="smallresnet", beta=0.0, augment_on=place)
    data = CamtrainData(config)
    assert ("crops" in data.train[0]) == (place == "device")
    module = make_classifier(build_model(config, 2), config, 2)
    batch = data.on_after_batch_transfer(collate([data.train[Draw(0, i)] for i in range(4)]), 0)
    assert batch["images"].shape == (4, 3, 32, 32)
    assert -3 < batch["images"].min() < batch["images"].max() < 3
    assert set(batch) == {"images", "targets", "damaged"}
    assert torch.isfinite(module.model(batch["images"])).all()
    other = data.on_after_batch_transfer(collate([data.train[Draw(1, i)] for i in range(4)]), 0)
    assert not torch.equal(batch["images"], other["images"])
    again = CamtrainData(config)
    same = again.on_after_batch_transfer(collate([again.train[Draw(0, i)] for i in range(4)]), 0)
    assert torch.equal(batch["images"], same["images"])
    assert set(data.test[0]) == {"images", "targets", "boxes"}
    module.close()


def test_another_place_is_refused(tiny: Tiny) -> None:
    with pytest.raises(CamtrainError, match="augment_on: got 'gpu', allowed are loader, device"):
        tiny(augment_on="gpu")
