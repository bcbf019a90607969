"""camtrain data check: what is recognised, what is counted, and what is told to be missing."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from camtrain import cli_data
from camtrain.config import HOLDS, FitConfig
from camtrain.data import recognise as recognition
from camtrain.data.check import Report, Row, check
from camtrain.data.cifar import KINDS
from camtrain.data.module import CamtrainData
from camtrain.data.recognise import recognise
from camtrain.errors import CamtrainError
from dog_files import TinyDogs
from picture_files import TinyCaltech, TinyCUB, write_picture
from voc_files import TinyVOC


def run(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    cli_data.add_data(parser.add_subparsers(dest="command", required=True))
    return cli_data.run_data(parser.parse_args(["data", "check", *argv]))


def make_folder(root: Path) -> None:
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            for number in range(2):
                write_picture(root / part / name / f"{number}.jpg", 90)


def make_cifar(root: Path) -> None:
    for part in ("train", "test"):
        for name in KINDS["cifar10"].classes:
            write_picture(root / part / name / "0.png", 90, (32, 32))


def make_voc(root: Path) -> None:
    made = TinyVOC(root)
    made.add("1", {"name": "dog", "box": (1, 1, 9, 9)}, {"name": "cat", "box": (9, 9, 20, 20)})
    made.add("2", {"name": "cow", "box": (1, 1, 9, 9)})
    made.split("trainval", "1", "2")
    made.split("test", "1")
    made.split("dog_test", "1")


def make_caltech(root: Path) -> None:
    TinyCaltech(root).annotate()


MAKERS: dict[str, tuple[Callable[[Path], object], list[Row]]] = {
    "voc": (make_voc, [Row("2007:test", 1, 2, 2, 0), Row("2007:trainval", 2, 3, 3, 0)]),
    "cub": (TinyCUB, [Row("train", 6, 2, 6, 0), Row("test", 4, 2, 4, 0)]),
    "caltech101": (make_caltech, [Row("train", 8, 2, 8, 0), Row("test", 4, 2, 4, 0)]),
    "stanford-dogs": (TinyDogs, [Row("train", 6, 2, 6, 0), Row("test", 4, 2, 4, 0)]),
    "cifar10": (make_cifar, [Row("train", 10, 10, 0, 0), Row("test", 10, 10, 0, 0)]),
    "folder": (make_folder, [Row("train", 4, 2, 0, 0), Row("test", 4, 2, 0, 0)]),
}


@pytest.mark.parametrize("name", MAKERS)
def test_every_data_set_is_recognised_and_counted(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, rows = MAKERS[name]
    make(tmp_path)
    report = check(tmp_path, progress=False)
    assert (report.name, report.rows) == (name, rows)
    assert (report.usable, report.damaged) == (True, [])
    assert check(tmp_path, name, progress=False) == report
    assert run(str(tmp_path), "--no-progress") == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{name} in {tmp_path}")
    assert printed.endswith("usable\n")
    assert ["".join(line.split()) for line in printed.splitlines()[1:4]] == [
        "splitpicturesclassesboxesdamaged",
        *("".join(map(str, row)) for row in rows),
    ]


@pytest.mark.parametrize("name", MAKERS)
def test_damaged_pictures_are_counted_and_named(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    MAKERS[name][0](tmp_path)
    shutil.rmtree(tmp_path / "101_ObjectCategories" / "BACKGROUND_Google", ignore_errors=True)
    path = sorted(p for p in tmp_path.rglob("*") if p.suffix in (".jpg", ".png"))[-1]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    if name == "cifar10":
        shutil.copy(path.parent.parent / "bird" / "0.png", path.with_name("1.png"))
    assert run(str(tmp_path), "--no-progress") == 0
    printed = capsys.readouterr().out
    assert "1 damaged file:\n  damaged picture " in printed
    assert str(path) in printed
    assert "usable; --damaged skip leaves the damaged files out" in printed
    assert sum(row.damaged for row in check(tmp_path).rows) == 1


def test_nothing_sound_is_not_usable(tmp_path: Path) -> None:
    make_folder(tmp_path)
    for number in range(2):
        (tmp_path / "train" / "dog" / f"{number}.jpg").write_text("no picture")
    assert check(tmp_path).problems == ["all training pictures of 1 classes are damaged"]
    shutil.rmtree(tmp_path / "train")
    shutil.copytree(tmp_path / "val", tmp_path / "train")
    for path in (tmp_path / "val").rglob("*.jpg"):
        path.write_text("no picture")
    report = check(tmp_path)
    assert report.problems == ["all test pictures are damaged"]
    assert report.rows[1] == Row("test", 4, 2, 0, 4)


def test_broken_annotations_are_named(tmp_path: Path) -> None:
    dogs = TinyDogs(tmp_path / "dogs")
    note = dogs.annotation(dogs.splits["test"][0][0])
    note.write_text("<annotation>")
    report = check(dogs.root)
    assert report.usable
    assert [f"broken XML {note}" in message for message in report.damaged] == [True]
    make_voc(tmp_path / "voc")
    note = tmp_path / "voc" / "VOCdevkit" / "VOC2007" / "Annotations" / "1.xml"
    note.write_text(note.read_text().replace("dog", "unicorn"))
    report = check(tmp_path / "voc")
    assert [f"{note}: object of unknown class" in message for message in report.damaged] == [True]
    # 2007:trainval keeps the cow alone, 2007:test nothing
    assert report.problems == ["no set holds sound pictures of two classes"]


def test_a_box_outside_its_picture_is_told(tmp_path: Path) -> None:
    dogs = TinyDogs(tmp_path)
    dogs.annotate(dogs.splits["test"][0][0], (60, 0, 70, 9))
    dogs.annotate(dogs.splits["test"][1][0], (50, 0, 70, 9))
    report = check(tmp_path)
    (message,) = report.damaged
    assert f"{dogs.picture('test', 0)}: box (0.0, 60.0, 9.0, 10.0) lies outside" in message
    assert report.rows[1].damaged == 1


@pytest.mark.parametrize(
    ("name", "parts", "source"),
    [
        ("cub", ["classes.txt", "bounding_boxes.txt"], "CUB_200_2011.tgz of https://www.vision"),
        ("stanford-dogs", ["train_list.mat"], "lists.tar of http://vision.stanford"),
        ("stanford-dogs", ["test_list.mat", "Annotation"], "annotation.tar of http://vision"),
        ("voc", ["Annotations"], "http://host.robots.ox.ac.uk/pascal/VOC/"),
        ("voc", ["1.xml"], "2007:test names "),
        ("caltech101", ["Annotations"], "https://data.caltech.edu"),
    ],
)
def test_what_is_missing_is_told_with_its_source(
    name: str, parts: list[str], source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    MAKERS[name][0](tmp_path)
    for part in parts:
        (found,) = tmp_path.rglob(part)
        shutil.rmtree(found) if found.is_dir() else found.unlink()
    # Caltech's boxes are no condition
    assert run(str(tmp_path)) == (0 if name == "caltech101" else 1)
    printed = capsys.readouterr().out
    assert all(part in printed for part in parts)
    assert source in printed


def test_voc_2012_alone_is_usable_and_told(tmp_path: Path) -> None:
    made = TinyVOC(tmp_path, "2012")
    for name, label in (("a", "dog"), ("b", "cat")):
        made.add(name, {"name": label, "box": (1, 1, 9, 9)})
    made.split("trainval", "a", "b")
    made.split("test", "c", "d")  # pictures without boxes, which were not published
    report = check(tmp_path)
    assert report.rows == [Row("2012:trainval", 2, 2, 2, 0)]
    assert report.usable
    assert "2012:test is left out" in report.notes[0]
    assert "name 2007:trainval, 2007:test by default, which is not here" in report.notes[1]


def test_a_single_class_is_not_usable(tmp_path: Path) -> None:
    for number in range(4):
        write_picture(tmp_path / "images" / f"{number}.jpg", 90)
    report = check(tmp_path)
    assert (report.name, report.usable) == ("folder", False)
    assert "a single class, 'images'" in report.problems[0]
    objects = TinyCaltech(tmp_path / "objects")
    shutil.rmtree(objects.folder / "ant")
    report = check(objects.root)
    assert (report.name, report.usable) == ("caltech101", False)
    assert "a single class, 'Faces'" in report.problems[0]


def test_what_is_not_recognised_lists_what_is(tmp_path: Path) -> None:
    with pytest.raises(CamtrainError, match=r"root: no folder .*nowhere"):
        check(tmp_path / "nowhere")
    with pytest.raises(CamtrainError, match="holds no data set; looked for") as raised:
        check(tmp_path)
    for name in HOLDS:
        assert f"\n  {name}: {HOLDS[name]}, from {recognition.URLS.get(name, 'you')}" in str(
            raised.value
        )
    make_voc(tmp_path)
    TinyCUB(tmp_path)
    with pytest.raises(CamtrainError, match="holds voc and cub; choose one with --data"):
        check(tmp_path)
    assert check(tmp_path, "cub").name == "cub"
    with pytest.raises(CamtrainError, match="data: got 'digits', allowed are voc, cub"):
        check(tmp_path, "digits")


def test_a_wrong_name_is_not_usable(tmp_path: Path) -> None:
    make_folder(tmp_path)
    for name in ("voc", "cub", "caltech101", "stanford-dogs", "cifar10", "cifar100"):
        report = check(tmp_path, name)
        assert not report.usable
        assert recognition.URLS[name] in report.text()
        assert report.text().endswith("not usable")


def test_a_folder_that_cannot_be_read_is_told(
    tmp_path: Path, tiny: Callable[..., FitConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder(tmp_path)

    def refused(self: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refused)  # for root nothing is forbidden
    config = tiny(data="folder", root=str(tmp_path))
    for read in (lambda: check(tmp_path), lambda: CamtrainData(config)):
        with pytest.raises(CamtrainError, match=r"root: .* cannot be read: .*Permission denied"):
            read()


def test_an_archive_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "cifar-100-python").mkdir()
    assert recognise(tmp_path) == recognise(tmp_path / "cifar-100-python") == "cifar100"


def test_the_table_aligns() -> None:
    report = Report(
        "folder", Path("x"), [Row("2007:trainval", 1, 2, 3, 4), Row("test", 10, 9, 8, 7)]
    )
    lines = report.text().splitlines()[1:4]
    assert len({len(line) for line in lines}) == 1


def test_the_real_subsets(shared_data: Path) -> None:
    report = check(shared_data / "voc_subset")
    counts = {row.split: (row.pictures, row.classes, row.damaged) for row in report.rows}
    assert counts["2007:trainval"] == (300, 20, 0)
    assert counts["2007:test"] == (100, 20, 0)
    assert counts["2012:trainval"] == (64, 20, 0)
    assert (report.usable, report.damaged, report.notes) == (True, [], [])
