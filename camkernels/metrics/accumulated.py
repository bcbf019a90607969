"""Metrics over a data set, as torchmetrics Metrics: the base, and those that ask a model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from camkernels.explain._run import Logits, Targets, check_images, chosen, evaluating, logits_of
from camkernels.metrics import confidence, curves
from camkernels.metrics.road import PERCENTILES, ROADScores, check_road, road
from camkernels.taps.modules import unwrap


class _Sums(Metric):
    """Sums over a data set, by name; shared over processes."""

    full_state_update = False
    is_differentiable = False
    SUMS: tuple[str, ...] = ()

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name in self.SUMS:
            zero = torch.zeros((), dtype=torch.float64)
            self.add_state(name, default=zero, dist_reduce_fx="sum")

    def _add(self, **values: Tensor) -> None:
        """Add values (B,) of a batch."""
        for name, value in values.items():
            setattr(self, name, getattr(self, name) + value.detach().double().sum())


class _Means(_Sums):
    """Means of values per sample, by name. A sample without a number makes them NaN."""

    NAMES: tuple[str, ...] = ("value",)
    count: Tensor

    def __init__(self, **options: Any) -> None:
        self.SUMS = (*self.NAMES, "count", *self.SUMS)
        super().__init__(**options)

    def _add_values(self, **values: Tensor) -> None:
        """Add values (B,) of a batch, and how many they are."""
        one = next(iter(values.values()))
        self._add(**values, count=torch.ones_like(one))

    def compute(self) -> Any:
        """The mean; NaN where nothing came."""
        means = {name: getattr(self, name) / self.count for name in self.NAMES}
        return means["value"] if self.NAMES == ("value",) else means


class _OfModel(_Means):
    """Asks a model about changed pictures, in evaluation mode and without gradients.

    The model is held, not registered: it is no part of the metric's state, and stays where it is.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        batch_size: int = 64,
        logits: Logits | None = None,
        background: Tensor | float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if batch_size < 1:
            raise ValueError(f"batch_size: expected a positive number, got {batch_size}")
        self._held = (unwrap(model),)
        self._batch_size, self._logits, self._background = batch_size, logits, background

    def update(self, images: Tensor, maps: Tensor, targets: Targets = None) -> None:
        """Add a batch.

        Args:
            images: (B, C, H, W), as the model takes them.
            maps: (B, h, w) on the device of the images.
            targets: classes that the maps are of, see :class:`camkernels.InputGradient`; None for
                the predicted ones.
        """
        check_images(images)
        if maps.dim() != 3 or len(maps) != len(images):
            raise ValueError(f"maps: expected ({len(images)}, h, w), got {tuple(maps.shape)}")
        if callable(targets) and not isinstance(targets, Tensor):
            raise TypeError("targets: expected class indices, got a callable")
        (model,) = self._held
        with evaluating(model), torch.no_grad():
            parts = images.split(self._batch_size) if len(images) else (images,)
            logits = torch.cat([logits_of(model(part), self._logits) for part in parts])
            classes = chosen(logits, targets)
            one = curves.class_score(model, classes, self._logits)

            def score(pictures: Tensor, owner: Tensor) -> Tensor:
                pairs = zip(
                    pictures.split(self._batch_size), owner.split(self._batch_size), strict=True
                )
                found = [one(part, whose) for part, whose in pairs]
                return torch.cat(found) if found else pictures.new_empty(0)

            self._measure(score, images, maps)

    @abstractmethod
    def _measure(self, score: curves.Score, images: Tensor, maps: Tensor) -> None:
        """Add what this metric takes of a batch."""


class ConfidenceChange(_OfModel):
    """Average drop, increase and gain, in percent, of pictures masked by their maps.

    Args:
        model: the classifier. batch_size: pictures per forward. logits: takes the logits out of
            what the model returns. background: see :func:`camkernels.metrics.masked`.
        gain: ``"headroom"`` or ``"relative"``, see :func:`camkernels.metrics.gain`.

    ``compute()`` gives ``average_drop`` (the less, the better), ``average_increase`` and
    ``average_gain``.
    """

    NAMES = ("average_drop", "average_increase", "average_gain")

    def __init__(self, model: nn.Module, *, gain: str = "headroom", **options: Any) -> None:
        super().__init__(model, **options)
        if gain not in confidence.GAINS:
            raise ValueError(f"gain: expected one of {', '.join(confidence.GAINS)}, got {gain!r}")
        self._gain = gain

    def _measure(self, score: curves.Score, images: Tensor, maps: Tensor) -> None:
        before, after = confidence.confidence_change(
            score, images, maps, background=self._background
        )
        self._add_values(
            average_drop=confidence.drop(before, after),
            average_increase=confidence.increase(before, after),
            average_gain=confidence.gain(before, after, self._gain),
        )


class RemovalChange(_OfModel):
    """Mean change of the score without the top ``share`` of each map; the less, the better.

    See :func:`camkernels.metrics.removal_change`; other arguments as for
    :class:`ConfidenceChange`.
    """

    def __init__(self, model: nn.Module, *, share: float = 0.25, **options: Any) -> None:
        super().__init__(model, **options)
        if not 0 < share < 1:
            raise ValueError(f"share: expected between 0 and 1, got {share}")
        self._share = share

    def _measure(self, score: curves.Score, images: Tensor, maps: Tensor) -> None:
        value = confidence.removal_change(
            score, images, maps, share=self._share, background=self._background
        )
        self._add_values(value=value)


class InsertionAUC(_OfModel):
    """Mean insertion AUC, see :func:`camkernels.metrics.insertion_auc`; the more, the better."""

    def __init__(self, model: nn.Module, *, steps: int = 224, **options: Any) -> None:
        super().__init__(model, **options)
        self._steps = steps

    def _measure(self, score: curves.Score, images: Tensor, maps: Tensor) -> None:
        options = {"steps": self._steps, "batch_size": self._batch_size}
        self._add_values(value=curves.insertion_auc(score, images, maps, **options))


class DeletionAUC(InsertionAUC):
    """Mean deletion AUC, see :func:`camkernels.metrics.deletion_auc`; the less, the better."""

    def _measure(self, score: curves.Score, images: Tensor, maps: Tensor) -> None:
        area = curves.deletion_auc(
            score, images, maps, steps=self._steps, batch_size=self._batch_size,
            background=self._background,
        )  # fmt: skip
        self._add_values(value=area)


class ROAD(_OfModel):
    """Means of :class:`camkernels.metrics.ROADScores`, by their names.

    Args:
        model, batch_size, logits: as for :class:`ConfidenceChange`.
        percentiles, noise, seed: see :func:`camkernels.metrics.road`.
    """

    NAMES = ROADScores._fields

    def __init__(
        self,
        model: nn.Module,
        *,
        percentiles: Sequence[float] = PERCENTILES,
        noise: float = 0.01,
        seed: int = 0,
        batch_size: int = 64,
        logits: Logits | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, batch_size=batch_size, logits=logits, **options)
        check_road(percentiles, noise)
        self._road: dict[str, Any] = {
            "percentiles": tuple(percentiles),
            "noise": noise,
            "seed": seed,
        }

    def _measure(self, score: curves.Score, images: Tensor, maps: Tensor) -> None:
        found = road(score, images, maps, batch_size=self._batch_size, **self._road)
        self._add_values(**found._asdict())
