"""Pictures with one class each: what all data sets but VOC and the digits have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

import camkernels as ck
from camtrain.data.pictures import MEAN, STD, Box, centre, random_crop, read_picture, resized
from camtrain.data.sampling import Draw, generator
from camtrain.errors import CamtrainError, DamagedDataError


class Sample(NamedTuple):
    """One picture file, its class, and where the object is, if that is known."""

    path: Path
    target: int
    box: Box | None = None


class Splits(NamedTuple):
    """What the reader of a data set found."""

    classes: tuple[str, ...]
    train: list[Sample]
    test: list[Sample]
    note: str = ""
    """What the user should know about the split."""
    skipped: tuple[str, ...] = ()
    """Messages on annotations that cannot be read, whose pictures are left out."""


class LabelledPictures(Dataset[dict[str, Any]]):
    """Pictures resized to a square, by a random crop for training or by their centre.

    Args:
        samples: of the split. classes: their names.
        image_size: side of the square, in pixels.
        augment: a random crop with at least ``crop_scale`` of the picture, mirrored with
            probability 0.5, drawn anew in each epoch; else the middle of the picture, always the
            same, with ``boxes`` where every sample has one.
        crop_scale: see ``augment``.
        augment_on: ``"loader"`` cuts crops out of the picture itself; ``"device"`` hands on the
            whole picture, resized to a square of 8/7 of ``image_size``, and the crop drawn, for
            :func:`cut_out` to make it of a batch on the device. Less sharp where a crop is small;
            no gain where the device is the CPU that loads.
        damaged: ``"error"`` raises for a file that cannot be decoded, ``"skip"`` leaves it out and
            counts it.
        seed: decides the crops, together with epoch and index.
        limit: at most so many pictures, spread over the samples.

    Items: ``images`` (3, size, size) uint8, ``targets`` () int64, ``boxes`` (4,) float32: top,
    left, height, width in pixels of ``images``; or, for a file that cannot be decoded, ``damaged``.
    With ``augment_on="device"`` those to train on have ``images`` of another size, ``crops`` (4,)
    int64: top, left, height, width in its pixels, and ``flips`` () bool.
    """

    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    note = ""
    skipped: tuple[str, ...] | list[str] = ()

    def __init__(
        self,
        samples: Sequence[Sample],
        classes: tuple[str, ...],
        image_size: int,
        *,
        augment: bool = False,
        crop_scale: float = 0.08,
        augment_on: str = "loader",
        damaged: str = "error",
        seed: int = 0,
        limit: int | None = None,
    ) -> None:
        self.classes, self.image_size = classes, image_size
        self.augment, self.crop_scale, self.augment_on = augment, crop_scale, augment_on
        self.damaged, self.seed = damaged, seed
        self.chosen = np.arange(len(samples))
        if limit is not None and limit < len(samples):
            self.chosen = np.linspace(0, len(samples), limit, endpoint=False).astype(int)
        self.samples = [samples[index] for index in self.chosen]
        self.boxed = not augment and all(sample.box is not None for sample in self.samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, draw: Draw | int) -> dict[str, Any]:
        draw = draw if isinstance(draw, Draw) else Draw(0, draw)
        sample = self.samples[draw.index]
        try:
            picture = self._picture(draw.index)
        except DamagedDataError as error:
            if self.damaged == "error":
                raise
            return {"damaged": str(error)}
        item: dict[str, Any] = {"targets": torch.tensor(sample.target)}
        if self.augment:
            rng = generator(self.seed, 6, draw.epoch, draw.index)
            item |= (self._uncut if self.augment_on == "device" else self._drawn)(picture, rng)
            return item
        cut = self._cut(picture)
        item["images"] = resized(picture, cut, self.image_size)
        if self.boxed:
            assert sample.box is not None
            item["boxes"] = moved(sample.box, cut, self.image_size)
        return item

    def _picture(self, index: int) -> Image.Image:
        return read_picture(self.samples[index].path)

    def _drawn(self, picture: Image.Image, rng: np.random.Generator) -> dict[str, Tensor]:
        """What is trained on."""
        cut = random_crop(rng, picture.height, picture.width, (self.crop_scale, 1.0))
        image = resized(picture, cut, self.image_size)
        return {"images": image.flip(2) if rng.random() < 0.5 else image}

    def _uncut(self, picture: Image.Image, rng: np.random.Generator) -> dict[str, Tensor]:
        """The same for the device to cut out; the draws are those of :meth:`_drawn`."""
        height, width, side = picture.height, picture.width, round(self.image_size * 8 / 7)
        cut = random_crop(rng, height, width, (self.crop_scale, 1.0))
        top, left = round(cut.top * side / height), round(cut.left * side / width)
        bottom = max(top + 1, round((cut.top + cut.height) * side / height))
        right = max(left + 1, round((cut.left + cut.width) * side / width))
        return {
            "images": resized(picture, Box(0, 0, height, width), side),
            "crops": torch.tensor([top, left, bottom - top, right - left]),
            "flips": torch.tensor(rng.random() < 0.5),
        }

    def _cut(self, picture: Image.Image) -> Box:
        """The part that is tested on."""
        return centre(picture.height, picture.width)

    def name(self, index: int) -> str:
        """Class folder and file, for tables."""
        path = self.samples[index].path
        return f"{path.parent.name}/{path.name}"


def cut_out(batch: dict[str, Any], size: int) -> dict[str, Any]:
    """A batch whose ``images`` (B, 3, size, size) float32 are the crops that ``crops`` names."""
    crops, flips = batch["crops"], batch["flips"]
    images = ck.warp(batch["images"].float(), crops, flips, (size, size))
    kept = {key: value for key, value in batch.items() if key not in ("crops", "flips")}
    return {**kept, "images": images}


def moved(box: Box, cut: Box, size: int) -> Tensor:
    """A box of the picture in pixels of the square that ``cut`` was resized to, within it."""
    down, across = size / cut.height, size / cut.width
    top, left = (box.top - cut.top) * down, (box.left - cut.left) * across
    bottom, right = top + box.height * down, left + box.width * across
    top, bottom, left, right = (min(max(edge, 0.0), size) for edge in (top, bottom, left, right))
    return torch.tensor([top, left, bottom - top, right - left])


def read_lines(name: str, path: Path) -> list[str]:
    """Lines of a list of a data set."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise CamtrainError(f"{name}: {path} is no text: {error}") from None


def check_classes(name: str, source: Path, splits: Splits) -> None:
    """Labels name a class, every class has something to learn from, something is left to test."""
    strange = [s for s in splits.train + splits.test if not 0 <= s.target < len(splits.classes)]
    if strange:
        more = f" (and {len(strange) - 1} more)" if len(strange) > 1 else ""
        raise CamtrainError(
            f"{name}: {strange[0].path} has label {strange[0].target}{more}; {source} names "
            f"{len(splits.classes)} classes, labels 0 to {len(splits.classes) - 1}"
        )
    counts = Counter(sample.target for sample in splits.train)
    bare = [title for index, title in enumerate(splits.classes) if not counts[index]]
    if bare:
        shown = ", ".join(bare[:3]) + ", ..." * (len(bare) > 3)
        raise CamtrainError(
            f"{name}: {source} names {len(splits.classes)} classes, and {len(bare)} of them have "
            f"no training picture: {shown}"
        )
    if not splits.test:
        raise CamtrainError(f"{name}: no test picture in {source.parent}")


def check_files(name: str, samples: Sequence[Sample], source: Path) -> None:
    """Every picture that a list names must be there."""
    missing = [sample.path for sample in samples if not sample.path.is_file()]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CamtrainError(f"{name}: no file {missing[0]}{more}, which {source} names")


def check_apart(name: str, splits: Splits, train: str, test: str) -> None:
    """No picture may be both learnt from and tested on."""
    both = {sample.path for sample in splits.train} & {sample.path for sample in splits.test}
    if both:
        more = f" and {len(both) - 1} more are" if len(both) > 1 else " is"
        raise CamtrainError(f"{name}: {min(both)}{more} in both {train} and {test}")


def check_several(name: str, root: Path | str, classes: Sequence[str]) -> None:
    """A classifier needs two classes."""
    if len(classes) == 1:
        raise CamtrainError(
            f"{name}: {root} holds a single class, {classes[0]!r}; there is nothing to tell apart, "
            "a classifier needs at least 2"
        )
