"""Test data as whole pictures with the boxes of their objects, to score maps on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from camtrain.config import FitConfig
from camtrain.data.labelled import moved
from camtrain.data.module import CamtrainData
from camtrain.data.pictures import Box, read_picture, resized
from camtrain.data.voc import VOCBoxes, VOCSample
from camtrain.errors import DamagedDataError

SINGLE, SEVERAL = "one object", "several objects"


class WholePictures(Dataset[dict[str, Any]]):
    """Items of test data: a picture and one of the classes in it.

    Of VOC whole pictures, resized to a square, an item for each class that is in one; of other data
    the test pictures as they are.

    Items: ``images`` (3, S, S) uint8, ``targets`` () int64, ``boxes`` (n, 4) float32 of the objects
    of the class (top, left, height, width in pixels of ``images``; n = 0 where none is known),
    ``group``: :data:`SINGLE` or :data:`SEVERAL` by all objects in the picture, ``name``; or
    ``damaged``.

    Args:
        config: of the run. limit: at most so many pictures.
        test: test data of ``config`` made beforehand, but of VOC, which has crops there.
    """

    def __init__(self, config: FitConfig, limit: int | None = None, test: Any = None) -> None:
        if config.data == "voc":
            assert config.root is not None  # config.validate
            voc = VOCBoxes(
                config.root,
                config.test_sets,
                config.image_size,
                difficult=config.difficult,
                damaged=config.damaged,
                limit=limit,
            )
            self.classes: tuple[str, ...] = voc.classes
            self.entries: list[tuple[VOCSample, int]] = [
                (sample, target)
                for sample in voc.samples
                for target in sorted({found.target for found in sample.objects})
            ]
            self.test: Any = None
        else:
            self.test = CamtrainData(_limited(config, limit)).test if test is None else test
            self.classes = self.test.classes
            self.entries = []
        self.image_size, self.damaged = config.image_size, config.damaged

    def __len__(self) -> int:
        return len(self.entries) if self.test is None else len(self.test)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.test is not None:
            return self._labelled(index)
        sample, target = self.entries[index]
        try:
            picture = read_picture(sample.image)
        except DamagedDataError as error:
            if self.damaged == "error":
                raise
            return {"damaged": str(error)}
        whole = Box(0, 0, picture.height, picture.width)
        boxes = [
            moved(found.box, whole, self.image_size)
            for found in sample.objects
            if found.target == target
        ]
        return {
            "images": resized(picture, whole, self.image_size),
            "targets": torch.tensor(target),
            "boxes": torch.stack(boxes),
            "group": SINGLE if len(sample.objects) == 1 else SEVERAL,
            "name": self.name(index),
        }

    def name(self, index: int) -> str:
        """Of an item, for tables."""
        if self.test is None:
            sample, target = self.entries[index]
            return f"{sample.image.name} {self.classes[target]}"
        return str(self.test.name(index)) if hasattr(self.test, "name") else str(index)

    def _labelled(self, index: int) -> dict[str, Any]:
        item = self.test[index]
        if "damaged" in item:
            return dict(item)
        boxes = item["boxes"][None] if "boxes" in item else torch.zeros(0, 4)
        return {**item, "boxes": boxes, "group": SINGLE, "name": self.name(index)}


def _limited(config: FitConfig, limit: int | None) -> FitConfig:
    return config if limit is None else dataclasses.replace(config, limit_test=limit)


def collate_whole(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch; ``boxes`` (B, n, 4), NaN where a picture has fewer; lists ``group`` and ``name``.

    Damaged items are left out, and named under ``damaged``.
    """
    sound = [item for item in items if "damaged" not in item]
    batch: dict[str, Any] = {"damaged": [item["damaged"] for item in items if "damaged" in item]}
    if sound:
        batch |= default_collate([{k: item[k] for k in ("images", "targets")} for item in sound])
        batch["boxes"] = _padded([item["boxes"] for item in sound])
        batch |= {key: [item[key] for item in sound] for key in ("group", "name")}
    return batch


def _padded(boxes: list[Tensor]) -> Tensor:
    most = max((len(one) for one in boxes), default=0)
    padded = torch.full((len(boxes), most, 4), float("nan"))
    for row, one in zip(padded, boxes, strict=True):
        row[: len(one)] = one
    return padded


def samples_of(path: Path) -> list[Path]:
    """The picture files of a path: itself, or all below it, in the order of their names."""
    endings = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.suffix.lower() in endings and p.is_file())
    return [path]
