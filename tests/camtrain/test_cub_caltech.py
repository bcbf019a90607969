"""CUB-200-2011 and Caltech-101: exact reading, crops, and what is told about what is not there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from camtrain.config import FitConfig
from camtrain.data import caltech, cub
from camtrain.data.labelled import LabelledPictures, moved
from camtrain.data.module import CamtrainData, collate
from camtrain.data.pictures import Box, centre, random_crop
from camtrain.data.sampling import Draw, generator
from camtrain.errors import CamtrainError, DamagedDataError
from picture_files import BIRDS, TinyCaltech, TinyCUB
from PIL import Image
from scipy.io import savemat

Tiny = Callable[..., FitConfig]


@pytest.fixture
def birds(tmp_path: Path) -> TinyCUB:
    return TinyCUB(tmp_path)


@pytest.fixture
def objects(tmp_path: Path) -> TinyCaltech:
    return TinyCaltech(tmp_path)


def test_the_official_split_of_cub(birds: TinyCUB) -> None:
    splits = cub.read(birds.root)
    assert splits == cub.read(birds.folder)
    assert splits.classes == tuple(bird[4:] for bird in BIRDS)
    assert [s.target for s in splits.train] == [0, 0, 0, 1, 1, 1]
    assert [s.target for s in splits.test] == [0, 0, 1, 1]
    assert splits.test[0].path == birds.picture(3)
    assert splits.train[0].box == Box(top=8.0, left=6.0, height=20.0, width=30.5)


def test_labels_are_joined_by_id_and_not_by_line(birds: TinyCUB) -> None:
    before = cub.read(birds.root)
    for table in ("image_class_labels", "train_test_split", "bounding_boxes", "classes"):
        birds.write(table, birds.lines(table)[::-1])
    assert cub.read(birds.root) == before


def test_classes_are_numbered_by_their_ids(birds: TinyCUB) -> None:
    kept = [line for line in birds.lines("images") if BIRDS[1] in line]
    birds.write("images", kept)
    birds.write("classes", birds.lines("classes")[1:])
    splits = cub.read(birds.root)
    assert splits.classes == (BIRDS[1][4:],)
    assert {s.target for s in splits.train} == {0}


@pytest.mark.parametrize(
    "name", ["images", "image_class_labels", "train_test_split", "bounding_boxes", "classes"]
)
def test_a_missing_table_is_named(birds: TinyCUB, name: str) -> None:
    birds.table(name).unlink()
    with pytest.raises(CamtrainError, match=rf"no file .*{name}\.txt|holds a file {name}\.txt"):
        cub.read(birds.root)


def test_missing_folders_and_pictures_are_named(birds: TinyCUB, tmp_path: Path) -> None:
    with pytest.raises(CamtrainError, match=r"no folder .*nowhere"):
        cub.read(tmp_path / "nowhere")
    birds.picture(2).unlink()
    with pytest.raises(CamtrainError, match=rf"{birds.picture(2).name}, which .*images\.txt names"):
        cub.read(birds.root)
    shutil.rmtree(birds.folder / "images")
    with pytest.raises(CamtrainError, match=r"no folder .*images"):
        cub.read(birds.root)


@pytest.mark.parametrize(
    ("table", "line", "message"),
    [
        ("images", "one two.jpg", r"images\.txt, line 1: expected 'id path', got 'one two\.jpg'"),
        ("image_class_labels", "3 first", r"line 1: expected 'id class', two whole numbers"),
        ("train_test_split", "3 2", r"line 1: expected 'id 1' or 'id 0', got '3 2'"),
        ("bounding_boxes", "3 1 2 3", r"line 1: expected 'id x y width height'"),
        ("bounding_boxes", "3 1 2 0 4", r"line 1: expected 'id x y width height' with an area"),
        ("image_class_labels", "5 1", r"line 2: id 5 comes twice"),
        ("bounding_boxes", "99 1 2 3 4", r"lacks 1 of the images of images\.txt \(id 3\)"),
    ],
)
def test_broken_lines_are_named(birds: TinyCUB, table: str, line: str, message: str) -> None:
    birds.write(table, [line, *birds.lines(table)[1:]])
    with pytest.raises(CamtrainError, match=message):
        cub.read(birds.root)


def test_a_class_list_that_does_not_fit_is_refused(birds: TinyCUB) -> None:
    whole = birds.lines("classes")
    birds.write("classes", whole[:1])
    with pytest.raises(CamtrainError, match=r"image 13 has class 2, which .*it names 1 classes"):
        cub.read(birds.root)
    birds.write("classes", [*whole, "3 003.Sooty_Albatross"])
    with pytest.raises(CamtrainError, match=r"1 of them have no training picture: Sooty_Alb"):
        cub.read(birds.root)
    birds.write("classes", [f"{k} {name}" for k, name in enumerate(reversed(BIRDS), 1)])
    with pytest.raises(CamtrainError, match=r"lies in '001.* which .*classes\.txt calls '002"):
        cub.read(birds.root)


def test_a_rule_splits_caltech_and_says_so(objects: TinyCaltech) -> None:
    splits = caltech.read(objects.root)
    assert splits == caltech.read(objects.folder)
    assert splits.classes == ("Faces", "ant")
    assert (len(splits.train), len(splits.test)) == (8, 4)
    assert "split 2 : 1 by a fixed rule: 8 pictures" in splits.note
    assert not {s.path for s in splits.train} & {s.path for s in splits.test}
    # a class is split the same way whatever else is there
    shutil.rmtree(objects.folder / "Faces")
    ants = [s.path for s in splits.test if s.target == 1]
    assert [s.path for s in caltech.read(objects.root).test] == ants


def test_annotations_of_caltech_give_boxes(objects: TinyCaltech) -> None:
    assert all(s.box is None for s in caltech.read(objects.root).test)
    objects.annotate()
    splits = caltech.read(objects.root)
    # rows 9 to 28 and columns 7 to 36, from 1 and both ends inside; Faces has its boxes in Faces_2
    assert {s.box for s in splits.train + splits.test} == {Box(8, 6, 20, 30)}
    assert LabelledPictures(splits.test, splits.classes, 16)[0]["boxes"].shape == (4,)
    caltech.annotation(splits.test[0].path).unlink()
    splits = caltech.read(objects.root)
    assert "4 to test on; 1 pictures have no annotation in " in splits.note
    assert "boxes" not in LabelledPictures(splits.test, splits.classes, 16)[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no MATLAB 5 file"),
        ({"obj_contour": [1]}, r"no variable box_coord \(there: obj_contour\)"),
        ({"box_coord": [1, 2, 3]}, "box_coord must be 4 numbers"),
        ({"box_coord": [9, 8, 1, 2]}, "box of no area"),
    ],
)
def test_a_damaged_annotation_is_an_error_or_skipped(
    objects: TinyCaltech, content: dict[str, list[int]] | None, message: str
) -> None:
    objects.annotate()
    path = objects.root / "Annotations" / "ant" / "annotation_0003.mat"
    path.write_text("") if content is None else savemat(path, content)
    with pytest.raises(DamagedDataError, match=message):
        caltech.read(objects.root)
    splits = caltech.read(objects.root, damaged="skip")
    assert len(splits.train + splits.test) == 11
    assert [path.name in line for line in splits.skipped] == [True]


def test_lists_decide_where_they_are(objects: TinyCaltech) -> None:
    train = ["Faces/image_0001.jpg", "ant/image_0002.jpg", "BACKGROUND_Google/image_0001.jpg"]
    objects.lists(train, ["ant/image_0001.jpg"])
    splits = caltech.read(objects.root)
    assert [(s.path.name, s.target) for s in splits.train] == [
        ("image_0001.jpg", 0),
        ("image_0002.jpg", 1),
    ]
    assert splits.note == ""
    (objects.root / "test.txt").unlink()
    with pytest.raises(CamtrainError, match=r"train\.txt is there, but no file .*test\.txt"):
        caltech.read(objects.root)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ("ant/image_0001.jpg", "ant/image_0001.jpg", r"image_0001\.jpg is in both"),
        (
            "ant/image_0001.jpg",
            "bee/image_0001.jpg",
            r"test\.txt, line 1: expected .*bee",
        ),
        ("ant/image_0001.jpg", "image_0002.jpg", r"test\.txt, line 1: expected class/file"),
        ("ant/image_0001.jpg", "ant/image_0099.jpg", r"image_0099\.jpg, which .*test\.txt names"),
        ("Faces/image_0002.jpg", "ant/image_0001.jpg", "no training picture: ant"),
    ],
)
def test_lists_that_do_not_fit_are_refused(
    objects: TinyCaltech, train: str, test: str, message: str
) -> None:
    objects.lists(["Faces/image_0001.jpg", train], [test])
    with pytest.raises(CamtrainError, match=message):
        caltech.read(objects.root)


def test_a_single_class_is_refused_before_training(objects: TinyCaltech, tiny: Tiny) -> None:
    shutil.rmtree(objects.folder / "Faces")
    with pytest.raises(CamtrainError, match=r"caltech101: .* holds a single class, 'ant'"):
        CamtrainData(tiny(data="caltech101", root=str(objects.root), arch="smallresnet"))


def test_lists_that_are_no_text_are_named(birds: TinyCUB, objects: TinyCaltech) -> None:
    birds.table("classes").write_bytes(b"1 \xff")
    with pytest.raises(CamtrainError, match=r"CUB: .*classes\.txt is no text"):
        cub.read(birds.root)
    objects.lists([], [])
    (objects.root / "test.txt").write_bytes(b"\xff")
    with pytest.raises(CamtrainError, match=r"Caltech-101: .*test\.txt is no text"):
        caltech.read(objects.root)


def test_missing_caltech_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(CamtrainError, match=r"no folder .*nowhere"):
        caltech.read(tmp_path / "nowhere")
    with pytest.raises(CamtrainError, match="101_ObjectCategories"):
        caltech.read(tmp_path)
    (tmp_path / "101_ObjectCategories" / "ant").mkdir(parents=True)
    with pytest.raises(CamtrainError, match="ant holds 0 pictures"):
        caltech.read(tmp_path)


def test_a_damaged_picture_is_an_error_or_skipped(birds: TinyCUB, tiny: Tiny) -> None:
    content = birds.picture(0).read_bytes()
    birds.picture(0).write_bytes(content[: len(content) // 2])
    config = tiny(recipe="consistency", data="cub", root=str(birds.root), arch="smallresnet")
    assert config.damaged == "error"
    with pytest.raises(DamagedDataError, match=birds.picture(0).name):
        CamtrainData(config).train[0]
    splits = cub.read(birds.root)
    data = LabelledPictures(splits.train, splits.classes, 16, damaged="skip")
    batch = collate([data[i] for i in range(3)])
    assert len(batch["images"]) == 2
    assert birds.picture(0).name in batch["damaged"][0]


def test_crops_hang_on_seed_epoch_and_index(birds: TinyCUB) -> None:
    splits = cub.read(birds.root)

    def made(seed: int) -> LabelledPictures:
        return LabelledPictures(splits.train, splits.classes, 16, augment=True, seed=seed)

    one, two, other = made(3), made(3), made(4)
    images = [one[Draw(epoch, 0)]["images"] for epoch in range(6)]
    assert all(torch.equal(image, two[Draw(e, 0)]["images"]) for e, image in enumerate(images))
    assert not all(torch.equal(images[0], image) for image in images)
    assert not torch.equal(images[0], other[Draw(0, 0)]["images"])
    assert images[0].shape == (3, 16, 16)
    assert "boxes" not in one[0]
    # red grows to the right: crops are mirrored now and then
    rising = [bool(image[0, :, -1].float().mean() > image[0, :, 0].float().mean())
              for image in images]  # fmt: skip
    assert 0 < sum(rising) < 6


def test_test_pictures_are_their_middle(birds: TinyCUB) -> None:
    splits = cub.read(birds.root)
    data = LabelledPictures(splits.test, splits.classes, 42)
    item = data[1]
    # 60 x 48: the middle square of 42 pixels, not resized
    with Image.open(splits.test[1].path) as image:
        expected = np.array(image)[3:45, 9:51]
    torch.testing.assert_close(item["images"], torch.from_numpy(expected).permute(2, 0, 1))
    # top 8, left 6, 20 x 30.5 in the picture
    torch.testing.assert_close(item["boxes"], torch.tensor([5.0, 0.0, 20.0, 27.5]))
    assert data.name(1) == f"{BIRDS[0]}/{splits.test[1].path.name}"
    assert [len(LabelledPictures(splits.test, splits.classes, 8, limit=n)) for n in (1, 9)] == [
        1,
        4,
    ]


def test_a_grey_picture_is_read_as_rgb(objects: TinyCaltech) -> None:
    path = objects.folder / "ant" / "image_0001.jpg"
    Image.open(path).convert("L").save(path)
    splits = caltech.read(objects.root)
    samples = [s for s in splits.train + splits.test if s.path == path]
    assert LabelledPictures(samples, splits.classes, 16)[0]["images"].shape == (3, 16, 16)


def test_random_crops_keep_their_bounds() -> None:
    boxes = [random_crop(generator(1, k), 90, 120, (0.08, 1.0)) for k in range(400)]
    shares = [box.height * box.width / (90 * 120) for box in boxes]
    ratios = [box.width / box.height for box in boxes]
    assert all(box.top >= 0 and box.top + box.height <= 90 for box in boxes)
    assert all(box.left >= 0 and box.left + box.width <= 120 for box in boxes)
    assert min(shares) >= 0.075
    assert min(shares) < 0.15
    assert max(shares) > 0.8
    assert 0.7 < min(ratios) < 0.8 < 1.25 < max(ratios) < 1.4
    # nothing fits: the largest box in the middle
    assert random_crop(generator(1), 10, 100, (0.9, 1.0)) == Box(0, 43, 10, 13)


def test_boxes_move_with_the_crop() -> None:
    assert moved(Box(10, 20, 30, 40), Box(0, 0, 100, 100), 50).tolist() == [5, 10, 15, 20]
    assert moved(Box(10, 20, 30, 40), Box(20, 20, 20, 20), 40).tolist() == [0, 0, 40, 40]
    assert moved(Box(0, 0, 5, 5), Box(50, 50, 10, 10), 10).tolist() == [0, 0, 0, 0]
    assert centre(100, 200) == Box(6.25, 56.25, 87.5, 87.5)


def test_the_real_cub_subset(shared_data: Path) -> None:
    splits = cub.read(shared_data / "cub200_subset")
    assert len(splits.classes) == 10
    assert (len(splits.train), len(splits.test)) == (200, 161)
    first = next(s for s in splits.train if s.path.name == "Black_Footed_Albatross_0009_34.jpg")
    assert first.box == Box(15.36, 71.17, 135.14, 78.34)
    data = LabelledPictures(splits.train + splits.test, splits.classes, 32, augment=False)
    items = [data[i] for i in range(len(data))]  # every file decodes
    boxes = torch.stack([item["boxes"] for item in items])
    assert (boxes[:, 2:] > 0).all()


def test_the_real_caltech_subset(shared_data: Path) -> None:
    splits = caltech.read(shared_data / "caltech101_subset")
    assert len(splits.classes) == 20
    assert (len(splits.train), len(splits.test)) == (527, 273)
    data = LabelledPictures(splits.train + splits.test, splits.classes, 16, augment=True)
    assert all(data[i]["images"].shape == (3, 16, 16) for i in range(len(data)))
