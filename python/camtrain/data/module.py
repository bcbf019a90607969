"""The Lightning data module: loaders, collation and normalisation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from camtrain.config import FitConfig
from camtrain.data import caltech, cub
from camtrain.data.digits import SIZES, Digits
from camtrain.data.labelled import LabelledPictures
from camtrain.data.sampling import EpochSampler
from camtrain.data.voc import VOCBoxes


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch without the damaged items, which are named under ``damaged``."""
    sound = [item for item in items if "damaged" not in item]
    batch: dict[str, Any] = default_collate(sound) if sound else {}
    batch["damaged"] = [item["damaged"] for item in items if "damaged" in item]
    return batch


class CamtrainData(pl.LightningDataModule):
    """Training and test data of a configuration.

    A batch holds ``images`` (B, 3, S, S), ``targets`` (B,), ``boxes`` (B, 4) where the object's
    place is known, and ``damaged``, a list of messages. Images are bytes on their way and are
    normalised on the device.
    """

    def __init__(self, config: FitConfig) -> None:
        super().__init__()
        self.config = config
        self.train, self.test = _datasets(config)
        self.classes = self.train.classes
        self.mean = torch.tensor(self.train.mean).view(-1, 1, 1)
        self.std = torch.tensor(self.train.std).view(-1, 1, 1)

    @property
    def skipped(self) -> list[str]:
        """Messages on annotation files that could not be read."""
        return getattr(self.train, "skipped", []) + getattr(self.test, "skipped", [])

    @property
    def note(self) -> str:
        """What the user should know about how the data was split; empty where nothing."""
        return getattr(self.train, "note", "")

    def _loader(self, dataset: Any, training: bool) -> DataLoader[dict[str, Any]]:
        trainer = self.trainer
        replicas = trainer.world_size if trainer is not None and training else 1
        rank = trainer.global_rank if trainer is not None and training else 0
        sampler = EpochSampler(
            len(dataset), self.config.seed, shuffle=training, replicas=replicas, rank=rank
        )
        return DataLoader(
            dataset,
            batch_size=self.config.batch_size,
            sampler=sampler,
            collate_fn=collate,
            num_workers=self.config.workers,
            persistent_workers=self.config.workers > 0,
            # BatchNorm cannot train on a single value per channel
            drop_last=training and len(sampler) % self.config.batch_size == 1 < len(sampler),
        )

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Shuffled by (seed, epoch)."""
        return self._loader(self.train, training=True)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The test data, in a fixed order; every process sees all of it."""
        return self._loader(self.test, training=False)

    def normalise(self, images: Tensor) -> Tensor:
        """Bytes (B, 3, S, S) to floats of about zero mean and unit variance."""
        mean, std = self.mean.to(images.device), self.std.to(images.device)
        return (images.float() / 255 - mean) / std

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Lightning's hook: normalise on the device."""
        if "images" in batch:
            batch = {**batch, "images": self.normalise(batch["images"])}
        return batch


def _datasets(config: FitConfig) -> tuple[Any, Any]:
    if config.data == "digits":
        lengths = {"train": config.limit_train, "test": config.limit_test}
        train, test = (
            Digits(split, config.image_size, config.seed, length or SIZES[split])
            for split, length in lengths.items()
        )
        return train, test
    assert config.root is not None  # config.validate
    if config.data in _READERS:
        return _labelled(config, Path(config.root))
    common: dict[str, Any] = {
        "difficult": config.difficult,
        "damaged": config.damaged,
        "seed": config.seed,
    }
    size = config.image_size
    train = VOCBoxes(
        config.root, config.sets, size, draw="random", limit=config.limit_train, **common
    )
    test = VOCBoxes(
        config.root,
        config.test_sets,
        size,
        draw=config.test_boxes,
        limit=config.limit_test,
        **common,
    )
    return train, test


_READERS = {"cub": cub.read, "caltech101": caltech.read}


def _labelled(config: FitConfig, root: Path) -> tuple[LabelledPictures, LabelledPictures]:
    splits = _READERS[config.data](root)
    common: dict[str, Any] = {"damaged": config.damaged, "seed": config.seed}
    size = config.image_size
    train = LabelledPictures(
        splits.train,
        splits.classes,
        size,
        augment=config.augment,
        crop_scale=config.crop_scale,
        limit=config.limit_train,
        **common,
    )
    test = LabelledPictures(splits.test, splits.classes, size, limit=config.limit_test, **common)
    train.note = splits.note
    return train, test
