"""The Lightning modules: classifiers with a term of their maps in the loss."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

import camkernels as ck
from camkernels import backends
from camtrain import criteria
from camtrain.config import FitConfig
from camtrain.errors import CamtrainError
from camtrain.measures import (
    CombinedMeasures,
    ConsistencyMeasures,
    EpochMeasures,
    GradientMeasures,
    SplitMeasures,
)
from camtrain.models import default_layer
from camtrain.weighting import Balance, scheduled


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
        self.model = self._swapped(model, config)
        self.config = config
        self.layer = config.layer or default_layer(config.arch)
        self.measures = nn.ModuleDict(
            {f"{split}_": self._make_measures(classes) for split in ("train", "test")}
        )
        self.damaged: set[str] = set()
        self.balance = Balance(config.balance, config.balance_every) if config.balance else None
        self._now = 1.0  # of the schedule
        # in a list, so that Lightning does not register it (and the model) a second time
        try:
            self._criterion: list[Any] = [self._make_criterion()]
        except ValueError as error:  # the layer's name, with the near ones; an option
            raise CamtrainError(str(error)) from error

    @staticmethod
    def _swapped(model: nn.Module, config: FitConfig) -> nn.Module:
        """``model`` with what the recipe needs in place of its own modules."""
        return model if config.engine == "off" else criteria.swapped(model, config)

    def _make_measures(self, classes: int) -> SplitMeasures:
        return EpochMeasures(classes)

    def _make_criterion(self) -> Any:
        return criteria.entropy(self.model, self.layer, self.config)

    def _weights(self) -> dict[str, float]:
        """Attributes of the criterion that weight a regulariser, at their full values."""
        return {"beta": self.config.beta}

    def _set_weights(self, share: float) -> None:
        for name, value in self._weights().items():
            owner, _, attribute = name.rpartition(".")
            setattr(self.criterion[owner] if owner else self.criterion, attribute, share * value)

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

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """Step, and free the gradients at once: Lightning keeps them through the next forward."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()

    def on_train_epoch_start(self) -> None:
        """What a recipe draws or counts anew."""

    @property
    def _batches_before(self) -> int:
        """Of training, in the epochs before this one."""
        return self.current_epoch * int(self.trainer.num_training_batches)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set the random state of the epoch, so that dropout repeats after a resume.

        Not when the epoch starts: its loader is made before or after that, depending on whether
        the run was resumed, and draws a number.
        """
        if batch_idx == 0:
            torch.manual_seed(self.config.seed * 1_000_003 + self.current_epoch)

    def _share(self, batch_idx: int) -> float:
        """Of their weights that the regularisers have at this step, by the schedule."""
        done = (batch_idx + 1) / max(int(self.trainer.num_training_batches), 1)
        return scheduled(self.config, self.current_epoch + done)

    def _step(self, batch: dict[str, Any], split: str) -> Tensor | None:
        self.damaged.update(batch.get("damaged", ()))
        if "images" not in batch:
            return None  # every picture of the batch was damaged
        logits, loss = self.loss_of(batch, split)
        self._measure(split, batch, logits, loss)
        return loss

    def loss_of(self, batch: dict[str, Any], split: str) -> tuple[Tensor, Tensor]:
        """Logits and loss of ``images`` and ``targets``: all of a step that takes memory by the
        sample, which :mod:`camtrain.planning` counts."""
        images, targets = batch["images"], batch["targets"]
        if self.config.precision == "64-true":
            images = images.double()  # they come as bytes, which Lightning does not convert
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        logits = self.model(images)
        cross_entropy, regularizer = self.criterion.parts(logits, targets)
        loss: Tensor = cross_entropy
        if regularizer is not None:
            if split == "train" and self.balance is not None:
                regularizer = regularizer * self._balanced((cross_entropy, regularizer))
            loss = loss + regularizer
        return logits, loss

    def _balanced(self, parts: tuple[Tensor, Tensor]) -> float:
        """By what this step's regulariser is multiplied, beyond the weights that are set."""
        assert self.balance is not None
        if not self.balance.due(self.global_step):
            return 1.0
        weights = [p for p in self.model.parameters() if p.requires_grad]
        return self.balance.measure(
            parts, weights, self._now, self.global_step, self._mean_over_processes
        )

    @property
    def scale(self) -> float:
        """Of the weights, by their balance."""
        return 1.0 if self.balance is None else self.balance.scale

    def _mean_over_processes(self, values: Tensor) -> Tensor:
        gathered: Tensor = self.all_gather(values)  # type: ignore[assignment]
        return gathered.reshape(-1, len(values)).mean(0)

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
        self._now = self._share(batch_idx)
        self._set_weights(self._now * self.scale)
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


class ConsistencyClassifier(Classifier):
    """Trains ``model`` by cross-entropy + alpha x (1 - SSIM) + beta x norm of the maps.

    Source: Staying consistent with GradCAM, eqs. 1 to 4.
    """

    def _make_measures(self, classes: int) -> SplitMeasures:
        return ConsistencyMeasures(classes)

    def _make_criterion(self) -> Any:
        return criteria.consistency(self.model, self.layer, self.config, self.config.beta)

    def _weights(self) -> dict[str, float]:
        return {"alpha": self.config.alpha, "beta": self.config.beta}

    def on_train_epoch_start(self) -> None:
        """Other crops than in the epoch before."""
        self.criterion.transform = criteria.views(
            self.config, self.current_epoch + 1, self.global_rank
        )

    def on_validation_epoch_start(self) -> None:
        """The same crops of the test data in every epoch."""
        self.criterion.transform = criteria.views(self.config, 0)

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

    @staticmethod
    def _swapped(model: nn.Module, config: FitConfig) -> nn.Module:
        return criteria.swapped(model, config)

    def _make_measures(self, classes: int) -> SplitMeasures:
        return GradientMeasures(classes)

    def _make_criterion(self) -> Any:
        return criteria.interpretable(self.model, self.config)

    def _weights(self) -> dict[str, float]:
        return {"weight": self.config.gradient_weight}

    def on_train_epoch_start(self) -> None:
        """Count from the start, so that a resumed run takes the error at the same batches."""
        self.criterion.calls = self._batches_before

    def _measure(self, split: str, batch: dict[str, Any], logits: Tensor, loss: Tensor) -> None:
        measures = self.split(split)
        assert isinstance(measures, GradientMeasures)
        measures.update(logits, batch["targets"], loss, self.criterion.terms)

    def describe(self) -> dict[str, str]:
        """There is no head between a layer and the logits that would be asked."""
        return {**super().describe(), "head": f"input gradient, engine {self.config.engine}"}


class CombinedClassifier(Classifier):
    """Trains ``model`` by cross-entropy and every regulariser that has a weight: ``beta`` that of
    the CAM entropy, ``alpha`` and ``norm_weight`` those of consistency and norm,
    ``gradient_weight`` that of the input gradient's error."""

    @staticmethod
    def _swapped(model: nn.Module, config: FitConfig) -> nn.Module:
        wanted = config.gradient_weight or config.engine != "off"
        return criteria.swapped(model, config) if wanted else model

    def _make_measures(self, classes: int) -> SplitMeasures:
        return CombinedMeasures(classes)

    def _make_criterion(self) -> Any:
        config, found = self.config, {}
        if config.beta:
            found["entropy"] = criteria.entropy(self.model, self.layer, config)
        if config.gradient_weight:
            found["gradient"] = criteria.interpretable(self.model, config)
        if config.alpha or config.norm_weight:
            found["consistency"] = criteria.consistency(
                self.model, self.layer, config, config.norm_weight
            )
        return ck.CombinedLoss(found)

    def _weights(self) -> dict[str, float]:
        config = self.config
        weights = {
            "entropy.beta": config.beta,
            "gradient.weight": config.gradient_weight,
            "consistency.alpha": config.alpha,
            "consistency.beta": config.norm_weight,
        }
        return {k: v for k, v in weights.items() if k.partition(".")[0] in self.criterion}

    def on_train_epoch_start(self) -> None:
        """As each regulariser needs it."""
        if "gradient" in self.criterion:
            self.criterion["gradient"].calls = self._batches_before
        self._draw_views(self.current_epoch + 1, self.global_rank)

    def on_validation_epoch_start(self) -> None:
        """The same crops of the test data in every epoch."""
        self._draw_views(0)

    def _draw_views(self, *key: int) -> None:
        if "consistency" in self.criterion:
            self.criterion["consistency"].transform = criteria.views(self.config, *key)

    def _measure(self, split: str, batch: dict[str, Any], logits: Tensor, loss: Tensor) -> None:
        measures = self.split(split)
        assert isinstance(measures, CombinedMeasures)
        measures.update(logits, batch["targets"], loss, self.criterion.terms)

    def describe(self) -> dict[str, str]:
        """The head of the maps, where there are any, and the regularisers."""
        heads = [getattr(self.criterion[name], "head", "") for name in self.criterion]
        head = next(filter(None, heads), "none")
        return {**super().describe(), "head": f"{head}; {', '.join(self.criterion)}"}


def make_classifier(model: nn.Module, config: FitConfig, classes: int) -> Classifier:
    """The module of ``config.recipe``."""
    kinds: dict[str, type[Classifier]] = {
        "consistency": ConsistencyClassifier,
        "interpretable": InterpretableClassifier,
        "combined": CombinedClassifier,
    }
    return kinds.get(config.recipe, Classifier)(model, config, classes)
