"""Stanford Dogs: exact reading of lists, labels and boxes, and what is told about what is wrong."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from camtrain.config import FitConfig
from camtrain.data import dogs
from camtrain.data.labelled import LabelledPictures
from camtrain.data.module import CamtrainData
from camtrain.data.pictures import Box
from camtrain.errors import CamtrainError, DamagedDataError
from camtrain.fit import fit
from dog_files import BREEDS, TinyDogs, make_png
from scipy.io import savemat

Tiny = Callable[..., FitConfig]


@pytest.fixture
def kennel(tmp_path: Path) -> TinyDogs:
    return TinyDogs(tmp_path / "dogs")


def test_the_official_split(kennel: TinyDogs) -> None:
    splits = dogs.read(kennel.root)
    assert splits.classes == ("Chihuahua", "Japanese_spaniel")
    assert [s.target for s in splits.train] == [0, 0, 0, 1, 1, 1]
    assert [s.target for s in splits.test] == [0, 0, 1, 1]
    assert splits.test[0].path == kennel.picture("test", 0)
    assert splits.train[0].box == Box(top=8, left=6, height=20, width=30)
    assert (splits.note, splits.skipped) == ("", ())


def test_of_several_dogs_the_first_counts(kennel: TinyDogs) -> None:
    kennel.annotate(kennel.splits["test"][1][0], (0, 1, 60, 48), (2, 2, 9, 9))
    splits = dogs.read(kennel.root)
    assert splits.test[1].box == Box(1, 0, 47, 60)
    assert splits.note.startswith("stanford-dogs: 1 of 10 pictures show several dogs; the box of")


def test_labels_may_have_gaps(kennel: TinyDogs) -> None:
    for entries in kennel.splits.values():
        entries[:] = [(name, {1: 120, 2: 7}[label]) for name, label in entries]
    kennel.write_lists()
    splits = dogs.read(kennel.root)
    assert splits.classes == ("Japanese_spaniel", "Chihuahua")
    assert {s.target for s in splits.train if "Chihuahua" in str(s.path)} == {1}


def test_a_png_named_jpg_is_read(kennel: TinyDogs) -> None:
    make_png(kennel.picture("test", 0))
    splits = dogs.read(kennel.root)
    item = LabelledPictures(splits.test, splits.classes, 42)[0]
    assert item["images"].shape == (3, 42, 42)
    # 60 x 48: the middle square of 42 pixels begins at 3, 9
    torch.testing.assert_close(item["boxes"], torch.tensor([5.0, 0.0, 20.0, 27.0]))


@pytest.mark.parametrize(
    ("name", "archive"),
    [
        ("Images", "images.tar"),
        ("Annotation", "annotation.tar"),
        ("train_list.mat", "lists.tar"),
        ("test_list.mat", "lists.tar"),
    ],
)
def test_what_is_missing_is_named_with_its_source(
    kennel: TinyDogs, name: str, archive: str
) -> None:
    path = kennel.root / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(CamtrainError, match=rf"no f.* .*{name}.*{archive} of http"):
        dogs.read(kennel.root)


def test_missing_pictures_and_annotations_are_named(kennel: TinyDogs, tmp_path: Path) -> None:
    with pytest.raises(CamtrainError, match=r"no folder .*nowhere"):
        dogs.read(tmp_path / "nowhere")
    note = kennel.annotation(kennel.splits["train"][1][0])
    note.rename(note.with_name("elsewhere"))
    with pytest.raises(CamtrainError, match=rf"no file .*{note.name}, which .*train_list\.mat"):
        dogs.read(kennel.root)
    kennel.picture("test", 2).unlink()
    kennel.picture("test", 3).unlink()
    note.with_name("elsewhere").rename(note)
    with pytest.raises(CamtrainError, match=r"_103\.jpg \(and 1 more\), which .*test_list\.mat"):
        dogs.read(kennel.root)


FIRST = f"{BREEDS[0]}/n02085620_100.jpg"


@pytest.mark.parametrize(
    ("name", "label", "message"),
    [
        (FIRST, 0, r"train_list\.mat, entry 1: .*_100\.jpg has label 0.*, allowed are 1 to 120"),
        (FIRST, 121, r"has label 121.*, allowed are 1 to 120"),
        (FIRST, 1.5, r"has label 1\.5, allowed"),
        (FIRST, 2, r"give both labels 2 and 1 to n02085620-Chihuahua"),
        (f"{BREEDS[1]}/n02085782_100.jpg", 1, "give label 1 to both n02085782-Jap.* and n02085620"),
        ("n02085620_100.jpg", 1, r"entry 1: expected breed/file, got 'n02085620_100\.jpg'"),
        (f"{BREEDS[0]}/n02085620_103.jpg", 1, r"_103\.jpg is in both train_list\.mat and test_l"),
    ],
)
def test_entries_that_do_not_fit_are_refused(
    kennel: TinyDogs, name: str, label: float, message: str
) -> None:
    names, labels = (list(part) for part in zip(*kennel.splits["train"], strict=True))
    kennel.write_list("train", [name, *names[1:]], [label, *labels[1:]])
    with pytest.raises(CamtrainError, match=message):
        dogs.read(kennel.root)


def test_lists_that_cannot_be_read_are_named(kennel: TinyDogs) -> None:
    path = kennel.root / "train_list.mat"
    content = path.read_bytes()
    for broken in (b"", b"no matrix at all", content[: len(content) // 2]):
        path.write_bytes(broken)
        with pytest.raises(CamtrainError, match=r"train_list\.mat is no MATLAB 5 file"):
            dogs.read(kennel.root)
    savemat(path, {"file_list": [1], "annotation_list": [2]})
    with pytest.raises(CamtrainError, match=r"no variable labels \(there: file_list, annot"):
        dogs.read(kennel.root)
    kennel.write_list("train", [name for name, _ in kennel.splits["train"]], [1])
    with pytest.raises(CamtrainError, match=r"6 entries in file_list and 1 in labels"):
        dogs.read(kennel.root)


def test_without_scipy_the_error_says_so(kennel: TinyDogs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(CamtrainError, match=r"train_list\.mat needs scipy, which does not import"):
        dogs.read(kennel.root)


BROKEN = {
    "half": lambda text: text[: len(text) // 2],
    "no object": lambda text: text.replace("object>", "thing>"),
    "no area": lambda text: text.replace("<xmax>36<", "<xmax>6<"),
    "no number": lambda text: text.replace("<ymin>8<", "<ymin>eight<"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_annotation_is_an_error_or_skipped(
    kennel: TinyDogs, tiny: Tiny, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = kennel.annotation(kennel.splits["train"][0][0])
    path.write_text(BROKEN[how](path.read_text()))
    with pytest.raises(DamagedDataError, match=path.name):
        dogs.read(kennel.root)
    config = tiny(data="stanford-dogs", root=str(kennel.root), arch="smallresnet", damaged="skip")
    data = CamtrainData(config)
    assert (len(data.train), len(data.test)) == (5, 4)
    assert len(data.skipped) == 1
    assert path.name in data.skipped[0]
    assert "1 damaged file skipped" in caplog.text


def test_a_run_scores_the_boxes(kennel: TinyDogs, tiny: Tiny) -> None:
    config = tiny(data="stanford-dogs", root=str(kennel.root), arch="smallresnet", workers=0)
    run = fit(config, quiet=True)
    assert run.classes == ("Chihuahua", "Japanese_spaniel")
    assert 0 <= run.rows[-1]["test/energy"] <= 1
