"""Metrics over a data set, as torchmetrics Metrics."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from camkernels.explain._run import Logits, Targets, check_images, chosen, evaluating, logits_of
from camkernels.metrics import confidence, curves
from camkernels.metrics import regions as shapes
from camkernels.taps.modules import unwrap


class _Means(Metric):
    """Means of values per sample, by name. A sample without a number makes them NaN."""

    full_state_update = False
    is_differentiable = False
    NAMES: tuple[str, ...] = ("value",)
    count: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name in (*self.NAMES, "count"):
            zero = torch.zeros((), dtype=torch.float64)
            self.add_state(name, default=zero, dist_reduce_fx="sum")

    def _add(self, **values: Tensor) -> None:
        for name, value in values.items():
            setattr(self, name, getattr(self, name) + value.detach().double().sum())
        self.count = self.count + len(next(iter(values.values())))

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
        self._add(
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
        self._add(value=value)


class InsertionAUC(_OfModel):
    """Mean insertion AUC, see :func:`camkernels.metrics.insertion_auc`; the more, the better."""

    def __init__(self, model: nn.Module, *, steps: int = 224, **options: Any) -> None:
        super().__init__(model, **options)
        self._steps = steps

    def _measure(self, score: curves.Score, images: Tensor, maps: Tensor) -> None:
        options = {"steps": self._steps, "batch_size": self._batch_size}
        self._add(value=curves.insertion_auc(score, images, maps, **options))


class DeletionAUC(InsertionAUC):
    """Mean deletion AUC, see :func:`camkernels.metrics.deletion_auc`; the less, the better."""

    def _measure(self, score: curves.Score, images: Tensor, maps: Tensor) -> None:
        area = curves.deletion_auc(
            score, images, maps, steps=self._steps, batch_size=self._batch_size,
            background=self._background,
        )  # fmt: skip
        self._add(value=area)


class PointingGame(_Means):
    """Share of maps whose maximum lies in the region; a dead map misses."""

    def update(self, maps: Tensor, regions: Tensor, size: tuple[int, int]) -> None:
        """Add a batch: maps (B, h, w), boxes (B, 4) or masks (B, H, W), size of the picture."""
        self._add(value=shapes.localisation(maps, regions, size)[0])


class EnergyInRegion(_Means):
    """Mean share of the energy of maps (not negative) that lies in the region; 0 for a dead map."""

    def update(self, maps: Tensor, regions: Tensor, size: tuple[int, int]) -> None:
        """Add a batch: maps (B, h, w), boxes (B, 4) or masks (B, H, W), size of the picture."""
        self._add(value=shapes.localisation(maps, regions, size)[1])


class BoxIoU(_Means):
    """Mean intersection over union of boxes made from maps with true ones.

    Args:
        threshold: share of the map's maximum, see :func:`camkernels.metrics.box_of_map`.
    """

    def __init__(self, threshold: float = 0.15, **options: Any) -> None:
        super().__init__(**options)
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold: expected a share in (0, 1], got {threshold}")
        self._threshold = threshold

    def update(self, maps: Tensor, boxes: Tensor, size: tuple[int, int]) -> None:
        """Add a batch: maps (B, h, w), boxes (B, 4) as top, left, height, width, in pixels."""
        found = shapes.box_of_map(maps, size, self._threshold)
        self._add(value=shapes.box_iou(found, boxes))
