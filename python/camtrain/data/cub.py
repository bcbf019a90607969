"""CUB-200-2011: birds, with the official split and a box each.

Layout, as its authors ship it, under ``root`` or ``root/CUB_200_2011``::

    images.txt              id path, below images/      train_test_split.txt    id 1 (training) or 0
    image_class_labels.txt  id class                    bounding_boxes.txt      id x y width height
    classes.txt             class name                  images/<class>/*.jpg

Ids need not be contiguous, so that a part of the data set works too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from camtrain.data.labelled import Sample, Splits, check_classes, check_files, read_lines
from camtrain.data.pictures import Box
from camtrain.errors import CamtrainError

FOLDER = "CUB_200_2011"
TABLES = (
    "images.txt",
    "image_class_labels.txt",
    "train_test_split.txt",
    "bounding_boxes.txt",
    "classes.txt",
)
Value = TypeVar("Value")


def find(root: Path) -> Path:
    """The folder that holds images.txt: ``root`` or ``root/CUB_200_2011``."""
    if not root.is_dir():
        raise CamtrainError(f"root: no folder {root}")
    for folder in (root / FOLDER, root):
        if (folder / TABLES[0]).is_file():
            return folder
    raise CamtrainError(f"root: neither {root} nor {root / FOLDER} holds a file {TABLES[0]}")


def read_table(path: Path, expected: str, parse: Callable[[str], Value]) -> dict[int, Value]:
    """Lines of an id and what ``parse`` makes of the rest.

    Raises:
        CamtrainError: a line of another form, with file, number and what is expected; an id twice.
    """
    found: dict[int, Value] = {}
    for number, line in enumerate(read_lines("CUB", path), 1):
        if not line.strip():
            continue
        key, _, rest = line.strip().partition(" ")
        try:
            identity, value = int(key), parse(rest.strip())
        except ValueError:
            raise CamtrainError(
                f"CUB: {path}, line {number}: expected {expected}, got {line.strip()!r}"
            ) from None
        if identity in found:
            raise CamtrainError(f"CUB: {path}, line {number}: id {identity} comes twice")
        found[identity] = value
    return found


def _name(text: str) -> str:
    if not text:
        raise ValueError
    return text


def _flag(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError
    return text == "1"


def _box(text: str) -> Box:
    x, y, width, height = (float(part) for part in text.split())
    if not (0 < width < math.inf and 0 < height < math.inf):
        raise ValueError
    return Box(y, x, height, width)


def read(root: Path) -> Splits:
    """Classes and both splits; classes are numbered in the order of their ids.

    Raises:
        CamtrainError: a folder, file or line that is missing, a line that cannot be read, a class
            list that does not fit the labels or the folders.
    """
    folder = find(root)
    for name in TABLES:
        if not (folder / name).is_file():
            raise CamtrainError(f"CUB: no file {folder / name}")
    if not (folder / "images").is_dir():
        raise CamtrainError(f"CUB: no folder {folder / 'images'}")
    paths = read_table(folder / TABLES[0], "'id path'", _name)
    labels = read_table(folder / TABLES[1], "'id class', two whole numbers", int)
    training = read_table(folder / TABLES[2], "'id 1' or 'id 0'", _flag)
    boxes = read_table(folder / TABLES[3], "'id x y width height' with an area", _box)
    names = read_table(folder / TABLES[4], "'class name'", _name)
    for table, ids in zip(TABLES[1:4], (set(labels), set(training), set(boxes)), strict=True):
        _check_ids(folder / table, ids, set(paths))
    order = {identity: index for index, identity in enumerate(sorted(names))}
    samples: dict[bool, list[Sample]] = {True: [], False: []}
    for identity, path in paths.items():
        label = labels[identity]
        _check_label(folder, identity, path, label, names)
        sample = Sample(folder / "images" / path, order[label], boxes[identity])
        samples[training[identity]].append(sample)
    classes = tuple(names[key].partition(".")[2] or names[key] for key in sorted(names))
    splits = Splits(classes, samples[True], samples[False])
    check_classes("CUB", folder / "classes.txt", splits)
    check_files("CUB", splits.train + splits.test, folder / TABLES[0])
    return splits


def _check_ids(path: Path, there: set[int], wanted: set[int]) -> None:
    missing = sorted(wanted - there)
    if missing:
        shown = ", ".join(map(str, missing[:3])) + ", ..." * (len(missing) > 3)
        raise CamtrainError(
            f"CUB: {path} lacks {len(missing)} of the images of images.txt (id {shown})"
        )


def _check_label(folder: Path, identity: int, path: str, label: int, names: dict[int, str]) -> None:
    if label not in names:
        raise CamtrainError(
            f"CUB: image {identity} has class {label}, which {folder / 'classes.txt'} does not "
            f"name (it names {len(names)} classes)"
        )
    if path.rpartition("/")[0] != names[label]:
        raise CamtrainError(
            f"CUB: image {identity} lies in {path.rpartition('/')[0]!r} and has class {label}, "
            f"which {folder / 'classes.txt'} calls {names[label]!r}"
        )
