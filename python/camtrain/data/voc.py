"""The boxes of PASCAL VOC as a classification set: each cropped and resized to a square.

Layout, as the organisers ship it, under ``root`` or ``root/VOCdevkit``::

    VOC2007/ImageSets/Main/trainval.txt    VOC2007/Annotations/*.xml    VOC2007/JPEGImages/*.jpg

Source: Schoettl, A light-weight method to foster the (Grad)CAM interpretability, section IV.A:
boxes of VOC at 192 x 192; for each epoch and sample one box drawn at random.
"""

from __future__ import annotations

import logging
import math
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from camtrain.data.labelled import read_lines
from camtrain.data.pictures import MEAN, STD, Box, crop
from camtrain.data.sampling import Draw, generator
from camtrain.errors import CamtrainError, DamagedDataError

log = logging.getLogger("camtrain")

CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)


@dataclass(frozen=True)
class VOCObject:
    """One annotated object of a picture."""

    target: int
    box: Box
    difficult: bool


@dataclass(frozen=True)
class VOCSample:
    """One picture and its objects."""

    image: Path
    objects: tuple[VOCObject, ...]


class Described(NamedTuple):
    """An object as its XML file describes it."""

    name: str
    corners: tuple[float, float, float, float]
    """xmin, ymin, xmax, ymax, as they stand there."""
    difficult: bool


def read_objects(path: Path) -> list[Described]:
    """The objects of one XML file; parts of persons are no objects.

    Raises:
        DamagedDataError: not XML, or an object without name or box.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, UnicodeDecodeError, OSError) as error:
        raise DamagedDataError(f"broken XML {path}: {error}") from error
    found = []
    for node in root.findall("object"):
        name = (node.findtext("name") or "").strip()
        box = node.find("bndbox")  # a direct child: part/bndbox is another thing
        if box is None:
            raise DamagedDataError(f"{path}: object {name!r} has no bndbox")
        try:
            x0, y0, x1, y1 = (
                float(box.findtext(key) or "") for key in ("xmin", "ymin", "xmax", "ymax")
            )
        except ValueError:
            raise DamagedDataError(f"{path}: object {name!r}: a coordinate is no number") from None
        difficult = (node.findtext("difficult") or "0").strip() == "1"
        found.append(Described(name, (x0, y0, x1, y1), difficult))
    return found


def read_annotation(path: Path) -> tuple[VOCObject, ...]:
    """The objects of one XML file of VOC.

    Coordinates in the file count from 1, both ends inclusive, and are floats in some files.

    Raises:
        DamagedDataError: as :func:`read_objects`; an unknown class, a box of no area.
    """
    objects = []
    for name, (x0, y0, x1, y1), difficult in read_objects(path):
        if name not in CLASSES:
            raise DamagedDataError(f"{path}: object of unknown class {name!r}")
        height, width = y1 - y0 + 1, x1 - x0 + 1
        if not (0 < height < math.inf and 0 < width < math.inf):
            raise DamagedDataError(f"{path}: object {name!r}: box of no area")
        objects.append(
            VOCObject(CLASSES.index(name), Box(y0 - 1, x0 - 1, height, width), difficult)
        )
    return tuple(objects)


def find_devkit(root: Path) -> Path:
    """The folder that holds VOC2007 and VOC2012: ``root`` or ``root/VOCdevkit``."""
    if not root.is_dir():
        raise CamtrainError(f"root: no folder {root}")
    for folder in (root / "VOCdevkit", root):
        if any(folder.glob("VOC20[0-9][0-9]")):
            return folder
    raise CamtrainError(
        f"root: neither {root} nor {root / 'VOCdevkit'} holds a folder VOC2007 etc."
    )


def read_names(devkit: Path, year: str, split: str) -> tuple[Path, list[str]]:
    """Folder of one year and the names of the pictures of one split."""
    folder = devkit / f"VOC{year}"
    if not folder.is_dir():
        there = ", ".join(sorted(p.name for p in devkit.glob("VOC*"))) or "nothing"
        raise CamtrainError(f"VOC: no folder {folder} (there: {there})")
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        if not (folder / part).is_dir():
            raise CamtrainError(f"VOC: no folder {folder / part}")
    file = folder / "ImageSets" / "Main" / f"{split}.txt"
    if not file.is_file():
        there = sorted(p.stem for p in file.parent.glob("*.txt") if "_" not in p.stem)
        raise CamtrainError(f"VOC: no file {file} (splits there: {', '.join(there) or 'none'})")
    return folder, [line.split()[0] for line in read_lines("VOC", file) if line.strip()]


class VOCBoxes(Dataset[dict[str, Any]]):
    """One sample per picture, or with ``draw="all"`` one per box.

    Args:
        root: folder of VOCdevkit, or VOCdevkit itself.
        sets: ``year:split`` by commas, e.g. ``"2007:trainval,2012:trainval"``.
        image_size: side of the square that a box is resized to, in pixels.
        draw: ``"random"`` draws one box per epoch and sample, ``"one"`` the same box in every
            epoch, ``"all"`` makes a sample of every box.
        difficult: keep objects marked as difficult.
        damaged: ``"skip"`` leaves out files that cannot be read and counts them, ``"error"``
            raises. A file that is missing is always an error.
        seed: decides the draws, together with epoch and index.
        limit: at most so many pictures, spread over the sets.

    Items: ``images`` (3, size, size) uint8, ``targets`` () int64; or, for a picture that cannot be
    decoded, ``damaged``: its path.
    """

    classes = CLASSES
    mean, std = MEAN, STD

    def __init__(
        self,
        root: Path | str,
        sets: str,
        image_size: int = 192,
        *,
        draw: str = "random",
        difficult: bool = False,
        damaged: str = "skip",
        seed: int = 0,
        limit: int | None = None,
    ) -> None:
        self.image_size, self.draw, self.damaged, self.seed = image_size, draw, damaged, seed
        self.skipped: list[str] = []
        devkit = find_devkit(Path(root))
        entries: list[tuple[Path, str]] = []
        for entry in sets.split(","):
            year, _, split = entry.strip().partition(":")
            if not year or not split:
                raise CamtrainError(f"sets: expected year:split by commas, got {sets!r}")
            folder, names = read_names(devkit, year, split)
            entries += [(folder, name) for name in names]
        if limit is not None and limit < len(entries):
            chosen = np.linspace(0, len(entries), limit, endpoint=False).astype(int)
            entries = [entries[index] for index in chosen]
        self.samples = self._read(entries, difficult)
        if draw == "all":
            self.samples = [VOCSample(s.image, (o,)) for s in self.samples for o in s.objects]
        if not self.samples:
            raise CamtrainError(f"VOC: no object to learn from in {devkit} ({sets})")
        if self.skipped:
            log.warning("%s", describe_skipped(self.skipped))

    def _read(self, entries: list[tuple[Path, str]], difficult: bool) -> list[VOCSample]:
        samples = []
        for folder, name in entries:
            annotation = folder / "Annotations" / f"{name}.xml"
            image = folder / "JPEGImages" / f"{name}.jpg"
            for path in (annotation, image):
                if not path.is_file():
                    raise CamtrainError(f"VOC: no file {path}, which a set in {folder} names")
            try:
                objects = read_annotation(annotation)
            except DamagedDataError as error:
                if self.damaged == "error":
                    raise
                self.skipped.append(str(error))
                continue
            kept = tuple(o for o in objects if difficult or not o.difficult)
            if kept:
                samples.append(VOCSample(image, kept))
        return samples

    def __len__(self) -> int:
        return len(self.samples)

    def choose(self, draw: Draw) -> VOCObject:
        """The object that stands for sample ``draw.index`` in epoch ``draw.epoch``."""
        objects = self.samples[draw.index].objects
        if len(objects) == 1:
            return objects[0]
        epoch = draw.epoch + 1 if self.draw == "random" else 0
        return objects[int(generator(self.seed, 5, epoch, draw.index).integers(len(objects)))]

    def __getitem__(self, draw: Draw | int) -> dict[str, Any]:
        draw = draw if isinstance(draw, Draw) else Draw(0, draw)
        chosen = self.choose(draw)
        path = self.samples[draw.index].image
        try:
            picture = crop(path, chosen.box, self.image_size)
        except DamagedDataError as error:
            if self.damaged == "error":
                raise
            return {"damaged": str(error)}
        return {"images": picture, "targets": torch.tensor(chosen.target)}


def describe_skipped(skipped: list[str]) -> str:
    """One line with the count and the first few."""
    shown = "; ".join(skipped[:3]) + ("; ..." if len(skipped) > 3 else "")
    return f"{len(skipped)} damaged file{'s' * (len(skipped) != 1)} skipped: {shown}"
