"""The Lightning module: a classifier with CAM entropy in its loss."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

import camkernels as ck
from camkernels import backends
from camtrain.config import FitConfig
from camtrain.errors import CamtrainError
from camtrain.measures import EpochMeasures
from camtrain.models import default_layer


class Classifier(pl.LightningModule):
    """Trains ``model`` by cross-entropy + beta x regulariser and measures its maps.

    With beta = 0 the same criterion measures the same figures, so runs can be compared.

    Args:
        model: the network, with a head for ``classes``.
        config: of the run.
        classes: number of classes.
    """

    def __init__(self, model: nn.Module, config: FitConfig, classes: int) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.layer = config.layer or default_layer(config.arch)
        self.measures = nn.ModuleDict(
            {"train_": EpochMeasures(classes), "test_": EpochMeasures(classes)}
        )
        self.damaged: set[str] = set()
        # in a list, so that Lightning does not register it (and the model) a second time
        self._criterion: list[Any] = [self._make_criterion()]

    def _make_criterion(self) -> Any:
        config = self.config
        try:
            return ck.CAMEntropyLoss(
                self.model,
                self.layer,
                beta=config.beta,
                regularizer=config.regularizer,
                target=config.target,
                other_classes=config.other_classes,
                normalize=config.normalize,
                label_smoothing=config.label_smoothing,
                head=config.head_path,
            )
        except ValueError as error:  # the layer's name, with the near ones
            raise CamtrainError(str(error)) from error

    @property
    def criterion(self) -> Any:
        """The criterion; it taps the model from the start."""
        return self._criterion[0]

    def close(self) -> None:
        """Take the hooks off the model."""
        self.criterion.close()

    def split(self, name: str) -> EpochMeasures:
        """Measures of ``train`` or ``test``."""
        measures = self.measures[f"{name}_"]
        assert isinstance(measures, EpochMeasures)
        return measures

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam at a constant rate, as in the paper."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        return torch.optim.Adam(parameters, lr=self.config.lr)

    def on_train_epoch_start(self) -> None:
        """Set beta of the epoch, and the random state, so that dropout repeats after a resume."""
        warm = self.current_epoch >= self.config.warmup_epochs
        self.criterion.beta = self.config.beta if warm else 0.0
        torch.manual_seed(self.config.seed * 1_000_003 + self.current_epoch)

    def _step(self, batch: dict[str, Any], split: str) -> Tensor | None:
        self.damaged.update(batch.get("damaged", ()))
        if "images" not in batch:
            return None  # every picture of the batch was damaged
        images, targets = batch["images"], batch["targets"]
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        logits = self.model(images)
        criterion = self.criterion
        loss: Tensor = criterion(logits, targets)
        self.split(split).update(
            logits,
            targets,
            loss,
            criterion.terms["cross_entropy"],
            criterion.statistics,
            criterion.maps,
            batch.get("boxes"),
            images.shape[-2:],
        )
        return loss

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor | None:
        """Loss of a batch."""
        loss = self._step(batch, "train")
        if loss is not None:
            self.log("step_loss", loss, prog_bar=True, on_step=True, on_epoch=False)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Measures of a batch of test data."""
        self._step(batch, "test")

    def describe(self) -> dict[str, str]:
        """Which path of the head and which backend ran."""
        weight = next(self.model.parameters())
        try:
            backend = backends.resolve(weight.device, weight.dtype)
        except Exception as error:
            backend = f"none ({error})"
        return {"head": str(self.criterion.head), "backend": backend}
