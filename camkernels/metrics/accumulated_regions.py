"""Metrics over a data set of how well maps find objects whose box, or mask, is known.

Pictures without a region are left out of the means and counted in ``missing``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from camkernels.metrics import regions as shapes
from camkernels.metrics.accumulated import _Means
from camkernels.metrics.boxes import LEVELS, THRESHOLDS, best_box_ious


class _OfRegions(_Means):
    """Means over the pictures that have a region; ``missing`` is the number of the others."""

    SUMS = ("missing",)
    missing: Tensor

    def _add_found(self, value: Tensor, maps: Tensor, regions: Tensor) -> None:
        """NaN where the map is not finite, whatever was found in it."""
        finite = maps.flatten(1).isfinite().all(1)
        gone = shapes.missing(regions)
        value = torch.where(gone, 0.0, torch.where(finite, value.double(), math.nan))
        self._add(value=value, count=~gone, missing=gone)


class PointingGame(_OfRegions):
    """Share of maps whose maximum lies in the region; a dead map misses.

    ``missing`` counts pictures whose box has no area or is NaN, or whose mask is empty.
    """

    def update(self, maps: Tensor, regions: Tensor, size: tuple[int, int]) -> None:
        """Add a batch: maps (B, h, w), boxes (B, 4) or masks (B, H, W), size of the picture."""
        self._add_found(shapes.localisation(maps, regions, size)[0], maps, regions)


class EnergyInRegion(_OfRegions):
    """Mean share of the energy of maps (not negative) that lies in the region; 0 for a dead map.

    ``missing`` as for :class:`PointingGame`.
    """

    def update(self, maps: Tensor, regions: Tensor, size: tuple[int, int]) -> None:
        """Add a batch: maps (B, h, w), boxes (B, 4) or masks (B, H, W), size of the picture."""
        self._add_found(shapes.localisation(maps, regions, size)[1], maps, regions)


class BoxIoU(_OfRegions):
    """Mean intersection over union of boxes made from maps with true ones.

    Args:
        threshold: share of the map's maximum, see :func:`camkernels.metrics.box_of_map`.

    ``missing`` counts pictures whose box has no area or is NaN.
    """

    def __init__(self, threshold: float = 0.15, **options: Any) -> None:
        super().__init__(**options)
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold: expected a share in (0, 1], got {threshold}")
        self._threshold = threshold

    def update(self, maps: Tensor, boxes: Tensor, size: tuple[int, int]) -> None:
        """Add a batch: maps (B, h, w), boxes (B, 4) as top, left, height, width, in pixels."""
        found = shapes.box_of_map(maps, size, self._threshold)
        self._add_found(shapes.box_iou(found, boxes), maps, boxes)


class MaxBoxAccV2(Metric):
    """Share of pictures whose best box has an IoU of at least d with the true one, at the threshold
    that is best over the data set; the mean over d.

    ``compute()`` gives ``max_box_acc`` (the mean), and ``max_box_acc_30``, ``_50``, ``_70`` of each
    d; NaN where nothing came, or a map was not finite. ``missing`` counts pictures whose box has no
    area or is NaN: they are left out.

    Args:
        levels: d, each in (0, 1]. thresholds: see :func:`camkernels.metrics.best_box_ious`, which
            lists what the code of the paper does otherwise.

    Source: as :func:`camkernels.metrics.best_box_ious`.
    """

    full_state_update = False
    is_differentiable = False
    hits: Tensor
    count: Tensor
    missing: Tensor

    def __init__(
        self, levels: Sequence[float] = LEVELS, thresholds: int = THRESHOLDS, **options: Any
    ) -> None:
        super().__init__(**options)
        if not levels or not all(0 < level <= 1 for level in levels):
            raise ValueError(f"levels: expected some, each in (0, 1], got {levels}")
        if thresholds < 2:
            raise ValueError(f"thresholds: expected at least 2, got {thresholds}")
        self._levels, self._thresholds = tuple(levels), thresholds
        for name, shape in (("hits", (len(levels), thresholds)), ("count", ()), ("missing", ())):
            zeros = torch.zeros(shape, dtype=torch.float64)
            self.add_state(name, default=zeros, dist_reduce_fx="sum")

    def update(self, maps: Tensor, boxes: Tensor, size: tuple[int, int]) -> None:
        """Add a batch: maps (B, h, w), boxes (B, 4) as top, left, height, width, in pixels."""
        found = best_box_ious(maps, boxes, size, thresholds=self._thresholds)
        gone = shapes.missing(boxes)
        levels = torch.tensor(self._levels, dtype=found.dtype, device=found.device)
        hits = torch.where(found.isnan(), math.nan, (found >= levels[:, None, None]).double())
        hits = torch.where(gone[:, None], 0.0, hits).sum(1)
        self.hits = self.hits.to(hits.device) + hits
        self.count = self.count + (~gone).sum()
        self.missing = self.missing + gone.sum()

    def compute(self) -> dict[str, Tensor]:
        """The accuracies, as shares of the pictures that have a box."""
        best = self.hits.amax(1) / self.count
        named = {
            f"max_box_acc_{100 * level:g}": share
            for level, share in zip(self._levels, best, strict=True)
        }
        return {"max_box_acc": best.mean(), **named}
