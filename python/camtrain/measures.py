"""Metric state over an epoch: means over live maps, and how well maps find the object."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from camkernels import MapStatistics
from camkernels.metrics.regions import localisation

STATISTICS = ("entropy", "area", "dispersion")


class MapMeasures(Metric):
    """Means of entropy, area and dispersion over live maps, and the fraction of dead maps.

    A dead map has the least entropy there is, so a mean that counted it would look like success.
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        for name in (*STATISTICS, "pointing", "energy", "live", "maps", "boxed"):
            zero = torch.zeros((), dtype=torch.float64)
            self.add_state(name, default=zero, dist_reduce_fx="sum")

    def update(
        self, statistics: MapStatistics, maps: Tensor, boxes: Tensor | None, size: tuple[int, int]
    ) -> None:
        """Add a batch: statistics of maps (B, h, w), boxes (B, 4) or None, size of the picture."""
        live = statistics.live
        for name in STATISTICS:
            values = getattr(statistics, name).double()
            setattr(self, name, getattr(self, name) + values[live].sum())
        self.live += live.sum()
        self.maps += live.numel()
        if boxes is not None:
            pointing, energy = localisation(maps, boxes, size)
            self.pointing += pointing[live].sum()
            self.energy += energy[live].double().sum()
            self.boxed += live.sum()

    def compute(self) -> dict[str, Tensor]:
        """Means over live maps (NaN where there is none), ``dead``, and with boxes the scores."""
        result = {name: getattr(self, name) / self.live for name in STATISTICS}
        result["dead"] = 1 - self.live / self.maps
        if self.boxed > 0:
            result["pointing"] = self.pointing / self.boxed
            result["energy"] = self.energy / self.boxed
        return result


# Not finite where a value was not, which stops a run. Weights are ignored under "disable" (1.9):
# a batch's mean is given once per sample.
SampleMean = functools.partial(MeanMetric, nan_strategy="disable")


class SplitMeasures(torch.nn.Module):
    """What every recipe measures on one split in one epoch."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(classes, average="micro")
        self.loss = SampleMean()
        self.cross_entropy = SampleMean()

    def update_classes(
        self, logits: Tensor, targets: Tensor, loss: Tensor, cross_entropy: Tensor
    ) -> None:
        """Add what a batch says of the classes."""
        self.accuracy.update(logits.detach(), targets)
        self.loss.update(loss.detach().expand(len(targets)))
        self.cross_entropy.update(cross_entropy.detach().expand(len(targets)))

    def of_maps(self) -> dict[str, Tensor]:
        """What the recipe measures of the maps."""
        return {}

    def compute(self) -> dict[str, float]:
        """All values of the epoch; empty where no batch came."""
        if self.loss.weight == 0:
            return {}
        values = {
            "accuracy": self.accuracy.compute(),
            "loss": self.loss.compute(),
            "cross_entropy": self.cross_entropy.compute(),
            **self.of_maps(),
        }
        return {name: float(value) for name, value in values.items()}

    def reset(self) -> None:
        """Begin an epoch."""
        for metric in self.children():
            assert isinstance(metric, Metric)
            metric.reset()


class EpochMeasures(SplitMeasures):
    """With the statistics of the maps."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.maps = MapMeasures()

    def update(
        self,
        logits: Tensor,
        targets: Tensor,
        loss: Tensor,
        cross_entropy: Tensor,
        statistics: MapStatistics,
        maps: Tensor,
        boxes: Tensor | None,
        size: tuple[int, int],
    ) -> None:
        """Add a batch."""
        self.update_classes(logits, targets, loss, cross_entropy)
        self.maps.update(statistics, maps, boxes, size)

    def of_maps(self) -> dict[str, Tensor]:
        """See :class:`MapMeasures`."""
        return self.maps.compute()


class TermMeasures(SplitMeasures):
    """With terms of the loss, as means over samples; what the loss does not measure is left out."""

    TERMS: tuple[str, ...] = ()

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        for name in self.TERMS:
            setattr(self, name, SampleMean())

    def update(
        self, logits: Tensor, targets: Tensor, loss: Tensor, terms: Mapping[str, Tensor]
    ) -> None:
        """Add a batch and the criterion's terms of it."""
        self.update_classes(logits, targets, loss, terms["cross_entropy"])
        for name in terms.keys() & set(self.TERMS):
            getattr(self, name).update(terms[name].expand(len(targets)))

    def of_maps(self) -> dict[str, Tensor]:
        """The means."""
        metrics = {name: getattr(self, name) for name in self.TERMS}
        return {name: metric.compute() for name, metric in metrics.items() if metric.weight > 0}


class ConsistencyMeasures(TermMeasures):
    """Of the consistency loss; with alpha = 0 there is no consistency in training."""

    TERMS = ("consistency", "sparsity", "dead", "uniform")


class GradientMeasures(TermMeasures):
    """Of the interpretable-gradient loss, which takes no gradient in test."""

    TERMS = ("gradient_error", "gradient_norm", "guided_gradient_norm", "zero_gradients")


class CombinedMeasures(TermMeasures):
    """Of several regularisers, by the names that each has alone."""

    # name in the table: the criterion's own
    NAMES: Mapping[str, str] = {
        **{name: f"entropy/{name}" for name in (*STATISTICS, "dead")},
        **{name: f"consistency/{name}" for name in ("consistency", "sparsity", "uniform")},
        "dead_views": "consistency/dead",
        **{name: f"gradient/{name}" for name in GradientMeasures.TERMS},
    }
    TERMS = tuple(NAMES)

    def update(
        self, logits: Tensor, targets: Tensor, loss: Tensor, terms: Mapping[str, Tensor]
    ) -> None:
        """Add a batch and the terms of :class:`camkernels.CombinedLoss`."""
        own = {name: terms[key] for name, key in self.NAMES.items() if key in terms}
        super().update(logits, targets, loss, {**own, "cross_entropy": terms["cross_entropy"]})
