"""The Lightning data module: loaders, collation and normalisation."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from camtrain.config import FitConfig
from camtrain.data import caltech, cifar, cub, dogs, folder
from camtrain.data.digits import SIZES, Digits
from camtrain.data.labelled import LabelledPictures, Splits, check_several, cut_out
from camtrain.data.pictures import MEAN, STD, normalised
from camtrain.data.sampling import EpochSampler
from camtrain.data.voc import VOCBoxes, describe_skipped
from camtrain.errors import CamtrainError

log = logging.getLogger("camtrain")


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
        try:
            self.train, self.test = _datasets(config)
        except OSError as error:  # permissions, a disk that is gone
            raise CamtrainError(f"root: {config.root} cannot be read: {error}") from error
        if config.normalization == "imagenet":
            for part in (self.train, self.test):
                part.mean, part.std = MEAN, STD
        self.classes = self.train.classes

    @property
    def skipped(self) -> list[str]:
        """Messages on annotation files that could not be read."""
        return [
            message for part in (self.train, self.test) for message in getattr(part, "skipped", ())
        ]

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
        if trainer is not None and training:
            # Lightning does so when the epoch starts; in a resumed run the workers have been given
            # their first batches by then
            sampler.set_epoch(trainer.fit_loop.epoch_progress.current.processed)
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
        return normalised(images, self.train.mean, self.train.std)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Lightning's hook: cut crops out and normalise on the device."""
        if "crops" in batch:
            batch = cut_out(batch, self.config.image_size)
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
    if config.data == "voc":
        return _voc(config)
    if config.data in cifar.KINDS:
        return _cifar(config, Path(config.root))
    return _labelled(config, Path(config.root))


def _voc(config: FitConfig) -> tuple[VOCBoxes, VOCBoxes]:
    assert config.root is not None
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
    if config.limit_train is None:
        targets = {thing.target for sample in train.samples for thing in sample.objects}
        check_several("VOC", config.sets, [train.classes[target] for target in targets])
    return train, test


_READERS: dict[str, Callable[[Path, FitConfig], Splits]] = {
    "cub": lambda root, config: cub.read(root),
    "caltech101": lambda root, config: caltech.read(root, damaged=config.damaged),
    "stanford-dogs": lambda root, config: dogs.read(root, damaged=config.damaged),
    "folder": lambda root, config: folder.read(root, config.seed),
}


def _options(config: FitConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """What :class:`LabelledPictures` takes, for training and for testing."""
    common: dict[str, Any] = {"damaged": config.damaged, "seed": config.seed}
    train = {
        "augment": config.augment,
        "augment_on": config.augment_on,
        "crop_scale": config.crop_scale,
    }
    return (
        {**common, **train, "limit": config.limit_train},
        {**common, "limit": config.limit_test},
    )


def _labelled(config: FitConfig, root: Path) -> tuple[LabelledPictures, LabelledPictures]:
    splits = _READERS[config.data](root, config)
    check_several(config.data, root, splits.classes)
    train, test = (
        LabelledPictures(samples, splits.classes, config.image_size, **options)
        for samples, options in zip((splits.train, splits.test), _options(config), strict=True)
    )
    train.note, train.skipped = splits.note, splits.skipped
    if splits.skipped:
        log.warning("%s", describe_skipped(list(splits.skipped)))
    return train, test


def _cifar(config: FitConfig, root: Path) -> tuple[LabelledPictures, LabelledPictures]:
    found = cifar.read(root, config.data)
    parts = ((found.splits.train, found.train), (found.splits.test, found.test))
    train, test = (
        cifar.CifarPictures(samples, pixels, config.data, config.image_size, **options)
        for (samples, pixels), options in zip(parts, _options(config), strict=True)
    )
    train.note = found.splits.note
    return train, test
