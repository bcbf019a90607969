"""PASCAL VOC: exact reading, draws, and what is told about files that are missing or damaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from camtrain.config import FitConfig
from camtrain.data.module import CamtrainData
from camtrain.data.sampling import Draw, EpochSampler
from camtrain.data.voc import CLASSES, Box, VOCBoxes, crop, read_annotation
from camtrain.errors import CamtrainError, DamagedDataError
from PIL import Image
from voc_files import PART, TinyVOC

Tiny = Callable[..., FitConfig]


def test_coordinates_count_from_one_and_both_ends_are_inside(voc: TinyVOC) -> None:
    first = read_annotation(voc.annotation("000001"))
    assert [CLASSES[o.target] for o in first] == ["dog", "cat", "bird"]
    assert first[0].box == Box(0, 0, 20, 20)
    assert first[2].box == Box(0, 40, 40, 20)


def test_float_coordinates_and_parts(voc: TinyVOC) -> None:
    voc.add("000009", {"name": "person", "box": ("3.5", "2.25", "12.5", "9.75"), "extra": PART})
    (person,) = read_annotation(voc.annotation("000009"))
    assert person.box == Box(1.25, 2.5, 8.5, 10.0)


def test_the_crop_is_the_box(voc: TinyVOC) -> None:
    left = crop(voc.image("000001"), Box(0, 0, 40, 20), 16).float()
    right = crop(voc.image("000001"), Box(0, 40, 40, 20), 16).float()
    assert left.shape == (3, 16, 16)
    # red grows from 0 to 255 over the width of 60: the box from 40 to 60 is the last third
    assert left[0].mean() == pytest.approx(42, abs=4)
    assert right[0].mean() == pytest.approx(213, abs=4)
    assert right[0, :, 0].mean() < right[0, :, -1].mean()


def test_a_box_over_the_border_is_cut(voc: TinyVOC) -> None:
    over = crop(voc.image("000001"), Box(-5, -5, 60, 80), 16)
    assert torch.equal(over, crop(voc.image("000001"), Box(0, 0, 40, 60), 16))


def test_difficult_objects_are_kept_by_option(voc: TinyVOC) -> None:
    voc.add("000002", {"name": "cow", "box": (1, 1, 9, 9), "difficult": 1})
    plain = VOCBoxes(voc.root, "2007:trainval", 16)
    assert [s.image.stem for s in plain.samples] == ["000001", "000003"]
    assert len(VOCBoxes(voc.root, "2007:trainval", 16, difficult=True)) == 3


def test_one_box_is_drawn_per_epoch_and_sample(voc: TinyVOC) -> None:
    data = VOCBoxes(voc.root, "2007:trainval", 16, seed=3)
    again = VOCBoxes(voc.root / "VOCdevkit", "2007:trainval", 16, seed=3)
    draws = [int(data[Draw(epoch, 0)]["targets"]) for epoch in range(30)]
    assert draws == [int(again[Draw(epoch, 0)]["targets"]) for epoch in range(30)]
    assert {CLASSES[t] for t in draws} == {"dog", "cat", "bird"}
    other = VOCBoxes(voc.root, "2007:trainval", 16, seed=4)
    assert draws != [int(other[Draw(epoch, 0)]["targets"]) for epoch in range(30)]


def test_test_boxes_are_fixed_or_all(voc: TinyVOC) -> None:
    one = VOCBoxes(voc.root, "2007:test", 16, draw="one")
    assert len({int(one[Draw(epoch, 0)]["targets"]) for epoch in range(9)}) == 1
    every = VOCBoxes(voc.root, "2007:test", 16, draw="all")
    assert [CLASSES[int(every[i]["targets"])] for i in range(4)] == ["dog", "cat", "bird", "dog"]


@pytest.mark.parametrize("missing", ["Annotations/000002.xml", "JPEGImages/000002.jpg"])
@pytest.mark.parametrize("damaged", ["skip", "error"])
def test_a_missing_file_is_named(voc: TinyVOC, missing: str, damaged: str) -> None:
    (voc.folder / missing).unlink()
    with pytest.raises(CamtrainError, match=missing):
        VOCBoxes(voc.root, "2007:trainval", 16, damaged=damaged)


def test_missing_folders_and_splits_are_named(voc: TinyVOC, tmp_path: Path) -> None:
    with pytest.raises(CamtrainError, match=r"no folder .*nowhere"):
        VOCBoxes(tmp_path / "nowhere", "2007:trainval")
    with pytest.raises(CamtrainError, match=r"VOC2012 \(there: VOC2007\)"):
        VOCBoxes(voc.root, "2012:trainval")
    with pytest.raises(CamtrainError, match=r"val\.txt \(splits there: test, trainval\)"):
        VOCBoxes(voc.root, "2007:val")
    with pytest.raises(CamtrainError, match="year:split"):
        VOCBoxes(voc.root, "trainval")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CamtrainError, match="VOCdevkit"):
        VOCBoxes(tmp_path / "empty", "2007:trainval")


BROKEN = {
    "half": lambda text: text[: len(text) // 2],
    "no box": lambda text: text.replace("bndbox", "box"),
    "no number": lambda text: text.replace("<xmin>5<", "<xmin>five<"),
    "no area": lambda text: text.replace("<xmax>30<", "<xmax>2<"),
    "unknown class": lambda text: text.replace("dog", "unicorn"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_annotation_is_skipped_and_counted_or_an_error(
    voc: TinyVOC, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = voc.annotation("000002")
    path.write_text(BROKEN[how](path.read_text()))
    data = VOCBoxes(voc.root, "2007:trainval", 16)
    assert [s.image.stem for s in data.samples] == ["000001", "000003"]
    assert len(data.skipped) == 1
    assert "1 damaged file skipped" in caplog.text
    assert "000002.xml" in caplog.text
    with pytest.raises(DamagedDataError, match=r"000002\.xml"):
        VOCBoxes(voc.root, "2007:trainval", 16, damaged="error")


def test_a_truncated_picture_is_skipped_and_named_or_an_error(voc: TinyVOC) -> None:
    from camtrain.data.module import collate

    content = voc.image("000002").read_bytes()
    voc.image("000002").write_bytes(content[: len(content) // 2])
    data = VOCBoxes(voc.root, "2007:trainval", 16)
    batch = collate([data[i] for i in range(3)])
    assert len(batch["images"]) == len(batch["targets"]) == 2
    assert len(batch["damaged"]) == 1
    assert "000002.jpg" in batch["damaged"][0]
    assert collate([data[1]]).keys() == {"damaged"}
    strict = VOCBoxes(voc.root, "2007:trainval", 16, damaged="error")
    with pytest.raises(DamagedDataError, match=r"000002\.jpg"):
        strict[1]


def test_a_greyscale_picture_is_read_as_rgb(voc: TinyVOC) -> None:
    Image.open(voc.image("000002")).convert("L").save(voc.image("000002"))
    assert VOCBoxes(voc.root, "2007:trainval", 16)[1]["images"].shape == (3, 16, 16)


def test_the_order_hangs_on_seed_and_epoch_alone() -> None:
    sampler = EpochSampler(20, seed=1, shuffle=True)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[2]
    assert [d.index for d in orders[0]] != [d.index for d in orders[1]]
    assert sorted(d.index for d in orders[1]) == list(range(20))
    assert {d.epoch for d in orders[1]} == {1}


def test_replicas_share_the_samples() -> None:
    parts = [
        [d.index for d in EpochSampler(7, 1, shuffle=True, replicas=2, rank=r)] for r in (0, 1)
    ]
    assert len(parts[0]) == len(parts[1]) == 4
    assert set(parts[0]) | set(parts[1]) == set(range(7))


def test_a_set_that_is_no_text_is_named(voc: TinyVOC) -> None:
    (voc.folder / "ImageSets" / "Main" / "trainval.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(CamtrainError, match=r"VOC: .*trainval\.txt is no text"):
        VOCBoxes(voc.root, "2007:trainval")


@pytest.fixture
def both_years(voc: TinyVOC) -> TinyVOC:
    """VOC2007 of the fixture, and VOC2012 with one picture to train and one to test on."""
    later = TinyVOC(voc.root, "2012")
    later.add("2008_000001", {"name": "cow", "box": ("1.5", "1.5", "20.5", "20.5")})
    later.add("2008_000002", {"name": "car", "box": (1, 1, 20, 20)})
    later.split("train", "2008_000001")
    later.split("val", "2008_000002")
    later.split("trainval", "2008_000001", "2008_000002")
    return voc


def test_both_years_together_and_2012_alone(both_years: TinyVOC, tiny: Tiny) -> None:
    root = both_years.root
    config = tiny(data="voc", root=str(root), arch="smallresnet", limit_train=None)
    assert (config.sets, config.test_sets) == ("2007:trainval,2012:trainval", "2007:test")
    data = CamtrainData(config)
    assert (len(data.train), len(data.test)) == (5, 2)
    shutil.rmtree(root / "VOCdevkit" / "VOC2007")
    sets = {"sets": "2012:trainval", "test_sets": "2012:val"}
    data = CamtrainData(tiny(data="voc", root=str(root), arch="smallresnet", **sets))
    assert [CLASSES[s.objects[0].target] for s in data.train.samples] == ["cow", "car"]
    assert [CLASSES[s.objects[0].target] for s in data.test.samples] == ["car"]
    assert data.train.samples[0].objects[0].box == Box(0.5, 0.5, 20, 20)


def test_sets_of_a_single_class_are_refused(both_years: TinyVOC, tiny: Tiny) -> None:
    sets = {"sets": "2012:train", "test_sets": "2012:val", "limit_train": None}
    with pytest.raises(CamtrainError, match="VOC: 2012:train holds a single class, 'cow'"):
        CamtrainData(tiny(data="voc", root=str(both_years.root), arch="smallresnet", **sets))


def test_the_real_subset(shared_data: Path) -> None:
    data = VOCBoxes(shared_data / "voc_subset", "2007:trainval,2012:trainval", 64, difficult=True)
    assert not data.skipped
    assert len(data) == 364
    assert {o.target for s in data.samples for o in s.objects} == set(range(20))
    for sample in data.samples:
        with Image.open(sample.image) as image:
            width, height = image.size
        for thing in sample.objects:
            top, left, box_height, box_width = thing.box
            assert top >= 0
            assert left >= 0
            assert top + box_height <= height
            assert left + box_width <= width
    known = next(s for s in data.samples + VOCBoxes(shared_data / "voc_subset", "2007:test").samples
                 if s.image.stem == "000013")  # fmt: skip
    assert known.objects[0].box == Box(81, 153, 48, 75)
    assert CLASSES[known.objects[0].target] == "cow"
    assert data[0]["images"].shape == (3, 64, 64)
