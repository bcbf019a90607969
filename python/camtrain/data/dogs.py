"""Stanford Dogs: 120 breeds, with the official split and boxes.

Layout, as its authors ship it, under ``root``::

    Images/n02085620-Chihuahua/n02085620_7.jpg      train_list.mat, test_list.mat: file_list, labels
    Annotation/n02085620-Chihuahua/n02085620_7      XML as that of VOC

Labels count from 1 and need not be contiguous, so that a part of the data set works too. Where a
picture shows several dogs, its box is that of the first. One of the pictures is a PNG with the name
of a JPEG. Boxes are edges in pixels: they begin at 0 and end at the width of the picture.

Source: Khosla et al., Novel dataset for fine-grained image categorization, 2011.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from camtrain.data.labelled import Sample, Splits, check_apart, check_classes, check_files
from camtrain.data.matlab import read_mat
from camtrain.data.pictures import Box
from camtrain.data.voc import read_objects
from camtrain.errors import CamtrainError, DamagedDataError

NAME = "Stanford Dogs"
FOLDERS = ("Images", "Annotation")
LISTS = ("train_list.mat", "test_list.mat")
ARCHIVES = {"Images": "images.tar", "Annotation": "annotation.tar"}
URL = "http://vision.stanford.edu/aditya86/ImageNetDogs/"
BREEDS = 120


def find(root: Path) -> Path:
    """The folder that holds Images: ``root``."""
    if not root.is_dir():
        raise CamtrainError(f"root: no folder {root}")
    for name in FOLDERS:
        if not (root / name).is_dir():
            raise CamtrainError(
                f"{NAME}: no folder {root / name}; {ARCHIVES[name]} of {URL} holds it"
            )
    for name in LISTS:
        if not (root / name).is_file():
            raise CamtrainError(
                f"{NAME}: no file {root / name}, which says what to train and to test on; "
                f"lists.tar of {URL} holds it"
            )
    return root


def read(root: Path, *, damaged: str = "error") -> Splits:
    """Classes, in the order of their labels, and both splits.

    Args:
        root: see above.
        damaged: ``"skip"`` leaves out pictures whose annotation cannot be read and names them in
            ``skipped``, ``"error"`` raises.

    Raises:
        CamtrainError: a folder or file that is missing, a list that cannot be read, a label that is
            not 1 to 120 or that does not fit the folder, a picture in both lists.
    """
    folder = find(root)
    lists = [read_list(folder / name) for name in LISTS]
    labels = _match(folder, [entry for entries in lists for entry in entries])
    order = {label: index for index, label in enumerate(sorted(labels))}
    skipped: list[str] = []
    several = 0
    splits = Splits(tuple(labels[key].partition("-")[2] or labels[key] for key in order), [], [])
    for name, entries, samples in zip(LISTS, lists, splits[1:3], strict=True):
        there = [Sample(folder / "Images" / file, order[label]) for file, label in entries]
        check_files(NAME, there, folder / name)
        notes = [_annotation(folder, file) for file, _ in entries]
        check_files(NAME, [Sample(path, 0) for path in notes], folder / name)
        for sample, path in zip(there, notes, strict=True):
            try:
                boxes = read_boxes(path)
            except DamagedDataError as error:
                if damaged == "error":
                    raise
                skipped.append(str(error))
                continue
            several += len(boxes) > 1
            samples.append(sample._replace(box=boxes[0]))
    note = (
        f"stanford-dogs: {several} of {len(splits.train) + len(splits.test)} pictures show several "
        "dogs; the box of the first is taken"
    )
    splits = splits._replace(note=note * bool(several), skipped=tuple(skipped))
    check_apart(NAME, splits, LISTS[0], f"{LISTS[1]} of {folder}")
    check_classes(NAME, folder / LISTS[0], splits)
    return splits


def read_list(path: Path) -> list[tuple[str, int]]:
    """Pictures, below Images, and labels of one list."""
    names, labels = (values.ravel() for values in read_mat(path, "file_list", "labels"))
    if len(names) != len(labels):
        raise CamtrainError(
            f"{NAME}: {path} has {len(names)} entries in file_list and {len(labels)} in labels"
        )
    found = []
    for number, (cell, label) in enumerate(zip(names, labels, strict=True), 1):
        name = str(np.asarray(cell).ravel()[0]) if np.size(cell) == 1 else ""
        if "/" not in name:
            raise CamtrainError(
                f"{NAME}: {path}, entry {number}: expected breed/file, got {name!r}"
            )
        if not 1 <= label <= BREEDS or label != int(label):
            raise CamtrainError(
                f"{NAME}: {path}, entry {number}: {name} has label {label}, allowed are 1 to "
                f"{BREEDS}"
            )
        found.append((name, int(label)))
    return found


def read_boxes(path: Path) -> list[Box]:
    """The boxes of one annotation, at least one.

    Raises:
        DamagedDataError: not XML, no object, an object without a box, a box of no area.
    """
    boxes = []
    for name, (x0, y0, x1, y1), _ in read_objects(path):
        if not (0 < y1 - y0 < math.inf and 0 < x1 - x0 < math.inf):
            raise DamagedDataError(f"{path}: object {name!r}: box of no area")
        boxes.append(Box(y0, x0, y1 - y0, x1 - x0))
    if not boxes:
        raise DamagedDataError(f"{path}: no object")
    return boxes


def _annotation(folder: Path, file: str) -> Path:
    return (folder / "Annotation" / file).with_suffix("")


def _match(folder: Path, entries: list[tuple[str, int]]) -> dict[int, str]:
    """Folders by label; each of one must have one of the other."""
    labels: dict[int, str] = {}
    folders: dict[str, int] = {}
    for file, label in entries:
        breed = file.partition("/")[0]
        if labels.setdefault(label, breed) != breed:
            raise CamtrainError(
                f"{NAME}: the lists in {folder} give label {label} to both {labels[label]} and "
                f"{breed}"
            )
        if folders.setdefault(breed, label) != label:
            raise CamtrainError(
                f"{NAME}: the lists in {folder} give both labels {folders[breed]} and {label} to "
                f"{breed}"
            )
    return labels
