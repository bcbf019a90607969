"""Any image folder: the split that is there or one by the seed, and what is told of mistakes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from camtrain.config import FitConfig
from camtrain.data import folder
from camtrain.data.labelled import LabelledPictures
from camtrain.data.module import CamtrainData, collate
from camtrain.data.pictures import read_picture
from camtrain.errors import CamtrainError, DamagedDataError
from camtrain.fit import fit
from picture_files import write_picture
from PIL import Image

Tiny = Callable[..., FitConfig]


def fill(place: Path, *names: str, count: int = 3) -> Path:
    for tone, name in enumerate(names):
        for number in range(count):
            write_picture(place / name / f"{number}.jpg", 50 * tone)
    return place


@pytest.fixture
def split(tmp_path: Path) -> Path:
    root = tmp_path / "split"
    fill(root / "train", "cat", "dog")
    fill(root / "val", "cat", "dog", count=2)
    return root


@pytest.mark.parametrize("held", ["val", "test"])
def test_the_split_that_is_there(split: Path, held: str) -> None:
    (split / "val").rename(split / held)
    splits = folder.read(split)
    assert splits.classes == ("cat", "dog")
    assert [s.target for s in splits.train] == [0, 0, 0, 1, 1, 1]
    assert [s.path.parent for s in splits.test[:2]] == [split / held / "cat"] * 2
    assert splits.note == ""


def test_of_test_and_val_test_is_taken_and_told(split: Path) -> None:
    fill(split / "test", "cat", "dog", count=1)
    splits = folder.read(split)
    assert len(splits.test) == 2
    assert "tested on test/; val/ is left alone" in splits.note


def test_a_test_folder_without_classes_is_none(split: Path) -> None:
    write_picture(split / "test" / "unlabelled.jpg", 0)  # as ImageNet has it
    assert len(folder.read(split).test) == 4


def test_nested_files_suffixes_and_what_is_no_class(split: Path) -> None:
    write_picture(split / "train" / "dog" / "puppies" / "young" / "A.JPEG", 9)
    write_picture(split / "train" / "dog" / "b.png", 9)
    write_picture(split / "train" / ".cache" / "c.png", 9)
    write_picture(split / "train" / "__MACOSX" / "c.png", 9)
    write_picture(split / "train" / "beside.png", 9)
    (split / "train" / "dog" / "notes.txt").write_text("no picture")
    (split / "train" / "dog" / "._0.jpg").write_text("what a Mac leaves")
    splits = folder.read(split)
    assert splits.classes == ("cat", "dog")
    names = [s.path.name for s in splits.train if s.target == 1]
    assert names == ["0.jpg", "1.jpg", "2.jpg", "b.png", "A.JPEG"]
    assert "1 pictures lie in no class folder of" in splits.note


def test_classes_only_in_the_test_data_are_named(split: Path) -> None:
    (split / "val" / "dog").rename(split / "val" / "Dog")
    with pytest.raises(
        CamtrainError,
        match=r"val holds 1 class: 'Dog', which .* does not hold; only .* holds 1 class: 'dog'",
    ):
        folder.read(split)


def test_classes_without_pictures_are_named(split: Path) -> None:
    shutil.rmtree(split / "val" / "cat")
    assert "no test picture of 1 class: 'cat'" in folder.read(split).note
    for path in (split / "train" / "dog").iterdir():
        path.unlink()
    with pytest.raises(CamtrainError, match=r"2 classes, and 1 of them have no training pict.*dog"):
        folder.read(split)


def test_a_test_folder_of_empty_classes_is_refused(split: Path) -> None:
    for path in (split / "val").rglob("*.jpg"):
        path.unlink()
    with pytest.raises(CamtrainError, match=r"no picture in the class folders of .*val"):
        folder.read(split)


def test_a_single_class_is_refused(tmp_path: Path) -> None:
    fill(tmp_path / "a" / "train", "cat")
    fill(tmp_path / "a" / "test", "cat")
    fill(tmp_path / "b", "cat")
    for root in (tmp_path / "a", tmp_path / "b"):
        with pytest.raises(CamtrainError, match=r"holds a single class, 'cat'; there is nothing"):
            folder.read(root)


def test_missing_folders_are_named(split: Path, tmp_path: Path) -> None:
    with pytest.raises(CamtrainError, match=r"no folder .*nowhere"):
        folder.read(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CamtrainError, match=r"no class folder in .*empty; expected train/<class>"):
        folder.read(tmp_path / "empty")
    shutil.rmtree(split / "train")
    with pytest.raises(CamtrainError, match=r"val holds class folders, but .*train holds none"):
        folder.read(split)


def test_a_class_folder_that_may_not_be_read_is_no_empty_one(
    split: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refused)  # for root nothing is forbidden
    with pytest.raises(PermissionError):
        folder.pictures(split / "train" / "dog")


def test_without_a_split_the_seed_decides_and_it_is_told(tmp_path: Path) -> None:
    fill(tmp_path, "cat", "dog", count=10)
    splits = folder.read(tmp_path, 3)
    assert splits == folder.read(tmp_path, 3)
    assert splits.test != folder.read(tmp_path, 4).test
    assert (len(splits.train), len(splits.test)) == (16, 4)
    assert not {s.path for s in splits.train} & {s.path for s in splits.test}
    assert "is split 4 : 1 by seed 3: 16 pictures to train on, 4 to test on" in splits.note
    # a class is split the same way whatever else is there
    fill(tmp_path, "ape")
    assert [s.path for s in folder.read(tmp_path, 3).test if s.path.parent.name == "dog"] == [
        s.path for s in splits.test if s.path.parent.name == "dog"
    ]


def test_a_training_folder_alone_is_split(split: Path) -> None:
    shutil.rmtree(split / "val")
    splits = folder.read(split)
    assert (len(splits.train), len(splits.test)) == (4, 2)
    assert str(split / "train") in splits.note


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    fill(tmp_path, "plane", "train")
    assert folder.read(tmp_path).classes == ("plane", "train")


def test_a_class_with_one_picture_cannot_be_split(tmp_path: Path) -> None:
    fill(tmp_path, "cat", "dog")
    fill(tmp_path, "ape", count=1)
    with pytest.raises(CamtrainError, match=r"ape holds 1 pictures; a class takes 2"):
        folder.read(tmp_path)


def test_grey_and_sixteen_bit_pictures(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 32).astype(np.uint8)[None].repeat(32, 0)
    Image.fromarray(ramp).save(tmp_path / "grey.png")
    Image.fromarray(ramp.astype(np.uint16) * 256 + 255).save(tmp_path / "deep.png")
    for name in ("grey", "deep"):
        read = np.asarray(read_picture(tmp_path / f"{name}.png"))
        np.testing.assert_array_equal(read, ramp[..., None].repeat(3, 2))
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "floats.tif")
    with pytest.raises(DamagedDataError, match=r"floats\.tif: its pixels are floats"):
        read_picture(tmp_path / "floats.tif")


def test_a_header_that_claims_gigabytes_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "bomb.bmp"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)
    content = bytearray(path.read_bytes())
    content[18:26] = (60000).to_bytes(4, "little") * 2  # width and height
    path.write_bytes(content)
    with pytest.raises(DamagedDataError, match=r"bomb\.bmp: Image size"):
        read_picture(path)


def test_unreadable_files_are_skipped_and_named_or_an_error(split: Path, tiny: Tiny) -> None:
    (split / "train" / "cat" / "1.jpg").write_text("no picture")
    config = tiny(data="folder", root=str(split), arch="smallresnet", workers=0, damaged="skip")
    data = CamtrainData(config)
    batch = collate([data.train[index] for index in range(3)])
    assert len(batch["images"]) == 2
    assert "cat/1.jpg" in batch["damaged"][0]
    splits = folder.read(split)
    with pytest.raises(DamagedDataError, match=r"cat/1\.jpg"):
        LabelledPictures(splits.train, splits.classes, 16, damaged="error")[1]
    run = fit(config, quiet=True)
    assert ["cat/1.jpg" in message for message in run.summary["damaged"]] == [True]
    assert torch.isfinite(torch.tensor(run.rows[-1]["train/loss"]))
