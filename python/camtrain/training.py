"""The Lightning modules: classifiers with a term of their maps in the loss."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

import camkernels as ck
from camkernels import backends
from camtrain.config import FitConfig
from camtrain.data.sampling import generator
from camtrain.errors import CamtrainError
from camtrain.measures import (
    ConsistencyMeasures,
    EpochMeasures,
    GradientMeasures,
    SplitMeasures,
)
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
            {f"{split}_": self._make_measures(classes) for split in ("train", "test")}
        )
        self.damaged: set[str] = set()
        # in a list, so that Lightning does not register it (and the model) a second time
        try:
            self._criterion: list[Any] = [self._make_criterion()]
        except ValueError as error:  # the layer's name, with the near ones; an option
            raise CamtrainError(str(error)) from error

    def _make_measures(self, classes: int) -> SplitMeasures:
        return EpochMeasures(classes)

    def _make_criterion(self) -> Any:
        config = self.config
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

    @property
    def criterion(self) -> Any:
        """The criterion; it taps the model from the start."""
        return self._criterion[0]

    def close(self) -> None:
        """Take the hooks off the model."""
        self.criterion.close()

    def split(self, name: str) -> SplitMeasures:
        """Measures of ``train`` or ``test``."""
        measures = self.measures[f"{name}_"]
        assert isinstance(measures, SplitMeasures)
        return measures

    def configure_optimizers(self) -> Any:
        """Adam or SGD, at a constant rate or one that falls by steps of epochs."""
        config = self.config
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        shared: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
        optimizer: torch.optim.Optimizer
        if config.optimizer == "sgd":
            optimizer = torch.optim.SGD(parameters, momentum=config.momentum, **shared)
        else:
            optimizer = torch.optim.Adam(parameters, **shared)
        if config.lr_step == 0:
            return optimizer
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, config.lr_step, config.lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_train_epoch_start(self) -> None:
        """Set beta of the epoch, and the random state, so that dropout repeats after a resume."""
        self._begin_epoch()
        torch.manual_seed(self.config.seed * 1_000_003 + self.current_epoch)

    def _begin_epoch(self) -> None:
        warm = self.current_epoch >= self.config.warmup_epochs
        self.criterion.beta = self.config.beta if warm else 0.0

    def _step(self, batch: dict[str, Any], split: str) -> Tensor | None:
        self.damaged.update(batch.get("damaged", ()))
        if "images" not in batch:
            return None  # every picture of the batch was damaged
        images, targets = batch["images"], batch["targets"]
        if self.config.precision == "64-true":
            images = images.double()  # they come as bytes, which Lightning does not convert
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        logits = self.model(images)
        loss: Tensor = self.criterion(logits, targets)
        self._measure(split, batch, logits, loss)
        return loss

    def _measure(self, split: str, batch: dict[str, Any], logits: Tensor, loss: Tensor) -> None:
        criterion, images, targets = self.criterion, batch["images"], batch["targets"]
        measures = self.split(split)
        assert isinstance(measures, EpochMeasures)
        measures.update(
            logits,
            targets,
            loss,
            criterion.terms["cross_entropy"],
            criterion.statistics,
            criterion.maps,
            batch.get("boxes"),
            images.shape[-2:],
        )

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
        head = getattr(self.criterion, "head", "none")
        return {"head": str(head), "backend": backend}


def ssim_options(config: FitConfig) -> dict[str, Any]:
    """How maps are compared, as :func:`camkernels.ssim` takes it."""
    return {name: getattr(config, name) for name in ("window", "window_size", "sigma", "padding")}


class ConsistencyClassifier(Classifier):
    """Trains ``model`` by cross-entropy + alpha x (1 - SSIM) + beta x norm of the maps.

    Source: Staying consistent with GradCAM, eqs. 1 to 4.
    """

    def _make_measures(self, classes: int) -> SplitMeasures:
        return ConsistencyMeasures(classes)

    def _make_criterion(self) -> Any:
        config = self.config
        return ck.CAMConsistencyLoss(
            self.model,
            self.layer,
            alpha=config.alpha,
            beta=config.beta,
            p=config.norm,
            target=config.target,
            relu=config.map_relu,
            transform=self._views(0),
            size=(config.image_size, config.image_size),
            **ssim_options(config),
        )

    def _views(self, *key: int) -> Any:
        """What draws the second view, by ``key`` alone, so that a resumed run repeats it."""
        seed = int(generator(self.config.seed, 9, *key).integers(1 << 62))
        return ck.RandomResizedCropFlip((self.config.view_scale, 1.0), seed=seed)

    def _begin_epoch(self) -> None:
        """There is no warm-up: the paper begins with a trained network."""
        self.criterion.transform = self._views(self.current_epoch + 1, self.global_rank)

    def on_validation_epoch_start(self) -> None:
        """The same crops of the test data in every epoch."""
        self.criterion.transform = self._views(0)

    def _measure(self, split: str, batch: dict[str, Any], logits: Tensor, loss: Tensor) -> None:
        measures = self.split(split)
        assert isinstance(measures, ConsistencyMeasures)
        measures.update(logits, batch["targets"], loss, self.criterion.terms)


class InterpretableClassifier(Classifier):
    """Trains ``model`` by cross-entropy + weight x error of the input gradient.

    The model's ReLUs, BatchNorms and convolutions are swapped for camkernels' in place; its
    ``state_dict`` keeps its names. Under test no gradient is taken, so there the errors are not
    measured.

    Source: A learning paradigm for interpretable gradients, Algorithm 1.
    """

    def __init__(self, model: nn.Module, config: FitConfig, classes: int) -> None:
        options = {} if config.engine == "off" else {"engine": True, "memory": config.engine}
        try:
            model = ck.swap_in(model, **options)
        except ck.EngineError as error:
            raise CamtrainError(f"engine: {error}") from error
        super().__init__(model, config, classes)

    def _make_measures(self, classes: int) -> SplitMeasures:
        return GradientMeasures(classes)

    def _make_criterion(self) -> Any:
        config = self.config
        return ck.InterpretableGradientLoss(
            self.model,
            config.error,  # type: ignore[arg-type]
            config.gradient_weight,
            every=config.every,
            label_smoothing=config.label_smoothing,
        )

    def _begin_epoch(self) -> None:
        warm = self.current_epoch >= self.config.warmup_epochs
        self.criterion.weight = self.config.gradient_weight if warm else 0.0
        # so that a resumed run takes the error at the same steps
        self.criterion.calls = self.trainer.global_step

    def _measure(self, split: str, batch: dict[str, Any], logits: Tensor, loss: Tensor) -> None:
        measures = self.split(split)
        assert isinstance(measures, GradientMeasures)
        measures.update(logits, batch["targets"], loss, self.criterion.terms)

    def describe(self) -> dict[str, str]:
        """There is no head between a layer and the logits that would be asked."""
        return {**super().describe(), "head": f"input gradient, engine {self.config.engine}"}


def make_classifier(model: nn.Module, config: FitConfig, classes: int) -> Classifier:
    """The module of ``config.recipe``."""
    kinds = {"consistency": ConsistencyClassifier, "interpretable": InterpretableClassifier}
    return kinds.get(config.recipe, Classifier)(model, config, classes)
