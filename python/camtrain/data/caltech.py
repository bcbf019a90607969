"""Caltech-101: one folder of pictures per class.

Layout under ``root``, ``root/caltech101`` (as torchvision has it), or ``root`` itself::

    101_ObjectCategories/<class>/image_0001.jpg      train.txt, test.txt: lines of <class>/<file>
    Annotations/<class>/annotation_0001.mat          box_coord: top, bottom, left, right, from 1

Where ``Annotations`` is there, boxes are read from it. There is no official split. Where both lists
lie beside the folder they decide; else each class is split 2 : 1 by a fixed rule, the same on every
machine and for every seed. ``BACKGROUND_Google`` is no class.
"""

from __future__ import annotations

import math
import zlib
from pathlib import Path

from camtrain.data.labelled import (
    Sample,
    Splits,
    check_apart,
    check_classes,
    check_files,
    read_lines,
)
from camtrain.data.matlab import read_mat
from camtrain.data.pictures import Box
from camtrain.data.sampling import generator
from camtrain.errors import CamtrainError, DamagedDataError

FOLDER = "101_ObjectCategories"
BACKGROUND = "BACKGROUND_Google"
SUFFIXES = (".jpg", ".jpeg", ".png")
LISTS = ("train.txt", "test.txt")
ANNOTATIONS = "Annotations"
# Folders of annotations whose names are not those of the pictures.
RENAMED = {
    "Faces": "Faces_2",
    "Faces_easy": "Faces_3",
    "Motorbikes": "Motorbikes_16",
    "airplanes": "Airplanes_Side_2",
}


def find(root: Path) -> Path:
    """The folder 101_ObjectCategories."""
    if not root.is_dir():
        raise CamtrainError(f"root: no folder {root}")
    for folder in (root / FOLDER, root / "caltech101" / FOLDER, root):
        if folder.resolve().name == FOLDER and folder.is_dir():
            return folder
    raise CamtrainError(f"root: no folder {root / FOLDER}")


def read(root: Path, *, damaged: str = "error") -> Splits:
    """Classes, in the order of their names, and both splits.

    Args:
        root: see above.
        damaged: ``"skip"`` leaves out pictures whose annotation cannot be read and names them in
            ``skipped``, ``"error"`` raises.

    Raises:
        CamtrainError: a folder or file that is missing, one list without the other, a line that
            names no class, a picture in both splits, a class with nothing to learn from.
    """
    folder = find(root)
    classes = tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name != BACKGROUND))
    if not classes:
        raise CamtrainError(f"Caltech-101: no class folder in {folder}")
    lists = [folder.parent / name for name in LISTS]
    there = [path for path in lists if path.is_file()]
    if len(there) == 1:
        (missing,) = set(lists) - set(there)
        raise CamtrainError(f"Caltech-101: {there[0]} is there, but no file {missing}")
    splits = _listed(folder, classes, lists) if there else _ruled(folder, classes)
    if (folder.parent / ANNOTATIONS).is_dir():
        splits = _boxed(splits, folder, damaged)
    check_classes("Caltech-101", folder, splits)
    return splits


def annotation(picture: Path) -> Path:
    """The annotation that belongs to a picture."""
    label = picture.parent.name
    number = picture.stem.rpartition("_")[2]
    place = picture.parent.parent.parent / ANNOTATIONS / RENAMED.get(label, label)
    return place / f"annotation_{number}.mat"


def read_box(path: Path) -> Box:
    """The box of one annotation.

    Raises:
        DamagedDataError: no MATLAB file, no box_coord of four numbers, a box of no area.
    """
    (coordinates,) = read_mat(path, "box_coord")
    try:
        y0, y1, x0, x1 = (float(value) for value in coordinates.ravel())
    except (TypeError, ValueError):
        raise DamagedDataError(f"{path}: box_coord must be 4 numbers, got {coordinates}") from None
    height, width = y1 - y0 + 1, x1 - x0 + 1
    if not (0 < height < math.inf and 0 < width < math.inf):
        raise DamagedDataError(f"{path}: box of no area")
    return Box(y0 - 1, x0 - 1, height, width)


def _boxed(splits: Splits, folder: Path, damaged: str) -> Splits:
    skipped: list[str] = []
    bare = 0
    parts: list[list[Sample]] = []
    for samples in (splits.train, splits.test):
        parts.append([])
        for sample in samples:
            path = annotation(sample.path)
            if not path.is_file():
                bare += 1
                parts[-1].append(sample)
                continue
            try:
                parts[-1].append(sample._replace(box=read_box(path)))
            except DamagedDataError as error:
                if damaged == "error":
                    raise
                skipped.append(str(error))
    note = splits.note
    if bare:
        note += "; " if note else "caltech101: "
        note += f"{bare} pictures have no annotation in {folder.parent / ANNOTATIONS}"
    return Splits(splits.classes, *parts, note, tuple(skipped))


def _listed(folder: Path, classes: tuple[str, ...], lists: list[Path]) -> Splits:
    train, test = (_read_list(folder, classes, path) for path in lists)
    splits = Splits(classes, train, test)
    check_apart("Caltech-101", splits, lists[0].name, f"{lists[1].name} of {folder.parent}")
    return splits


def _read_list(folder: Path, classes: tuple[str, ...], path: Path) -> list[Sample]:
    samples: dict[Path, Sample] = {}
    for number, line in enumerate(read_lines("Caltech-101", path), 1):
        name = line.strip()
        label, slash, file = name.partition("/")
        if not name or label == BACKGROUND:
            continue
        if not slash or not file or label not in classes:
            raise CamtrainError(
                f"Caltech-101: {path}, line {number}: expected class/file with a class folder of "
                f"{folder}, got {name!r}"
            )
        samples[folder / name] = Sample(folder / name, classes.index(label))
    found = list(samples.values())
    check_files("Caltech-101", found, path)
    return found


def _ruled(folder: Path, classes: tuple[str, ...]) -> Splits:
    train: list[Sample] = []
    test: list[Sample] = []
    for target, name in enumerate(classes):
        files = sorted(p for p in (folder / name).iterdir() if p.suffix.lower() in SUFFIXES)
        if len(files) < 2:
            raise CamtrainError(
                f"Caltech-101: {folder / name} holds {len(files)} pictures; a class takes 2"
            )
        # by the name, so that it does not matter which other classes are there
        order = generator(7, zlib.crc32(name.encode())).permutation(len(files))
        held = {int(index) for index in order[: max(1, len(files) // 3)]}
        for index, path in enumerate(files):
            (test if index in held else train).append(Sample(path, target))
    note = (
        f"caltech101: no {' and '.join(LISTS)} in {folder.parent}, so each class is split 2 : 1 by "
        f"a fixed rule: {len(train)} pictures to train on, {len(test)} to test on"
    )
    return Splits(classes, train, test, note)
