"""Metrics over a data set of maps and of gradients by themselves, without a region."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from camkernels.explain.consistency import consistency_scores
from camkernels.functional import map_statistics, normalize_entropy
from camkernels.metrics.accumulated import _Means, _Sums
from camkernels.metrics.gradients import gradient_agreement, total_variation
from camkernels.taps.modules import LayerLike, unwrap


class MapStatisticsMeans(_Sums):
    """Mean entropy, area and dispersion over live maps, and the fraction of dead ones.

    A dead map has the least entropy there is: a mean that counted it would look like success.
    ``compute()`` gives ``entropy``, ``area``, ``dispersion``, NaN where no map is live or one is
    not finite, and ``dead_fraction``, NaN where nothing came.

    Args:
        normalize: entropy in [0, 1], as in :func:`camkernels.cam_entropy`.
        clamp: rectify maps first, see :func:`camkernels.map_statistics`; without it a map with
            negative values has no entropy and no area: NaN.

    Source: Schoettl, A light-weight method to foster the (Grad)CAM interpretability, eqs. 1 to 3.
    """

    SUMS = ("entropy", "area", "dispersion", "live", "count")
    entropy: Tensor
    area: Tensor
    dispersion: Tensor
    live: Tensor
    count: Tensor

    def __init__(self, *, normalize: bool = False, clamp: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self._normalize, self._clamp = normalize, clamp

    def update(self, maps: Tensor) -> None:
        """Add a batch of maps (B, h, w), at the size that they are to be judged at."""
        found = map_statistics(maps.detach(), clamp=self._clamp)
        entropy = found.entropy
        if self._normalize:
            entropy = normalize_entropy(entropy, maps.shape[1] * maps.shape[2])
        self._add(  # a dead map has 0 in each
            entropy=entropy, area=found.area, dispersion=found.dispersion,
            live=found.live, count=torch.ones_like(found.live),
        )  # fmt: skip

    def compute(self) -> dict[str, Tensor]:
        """The means over live maps, and the fraction of dead ones."""
        means = {name: getattr(self, name) / self.live for name in self.SUMS[:3]}
        return {**means, "dead_fraction": 1 - self.live / self.count}


class MapConsistency(_Means):
    """Mean of :func:`camkernels.consistency_scores`: 1 where crop and map commute.

    Args:
        model: the classifier, held and not registered. layer: name or module with output
            (B, K, h, w).
        score_options: what that function takes besides the batch: ``size``, ``relu``,
            ``normalize``, and options of the SSIM.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: LayerLike,
        *,
        score_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._held = (unwrap(model), layer)
        self._score_options = dict(score_options or {})

    def update(
        self,
        images: Tensor,
        boxes: Tensor,
        flips: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> None:
        """Add a batch.

        Args:
            images: (B, C, H, W), as the model takes them.
            boxes: (B, 4) int64 or int32, flips: (B,) bool, the crop and mirror of each picture.
            targets: (B,) int64, classes whose maps are compared; None for the predicted ones.
        """
        model, layer = self._held
        found = consistency_scores(
            model, layer, images, boxes, flips, targets=targets, **self._score_options
        )
        self._add_values(value=found)


class GradientSmoothness(_Sums):
    """How smooth input gradients are: means over those that are not zero.

    ``compute()`` gives ``total_variation`` (the less, the smoother), ``agreement`` with smooth
    gradients (the more, the better; NaN where none came) and ``dead_fraction``, of gradients that
    are zero everywhere; NaN where nothing came or a gradient is not finite. See
    :func:`camkernels.metrics.total_variation` and :func:`camkernels.metrics.gradient_agreement`.
    """

    SUMS = ("variation", "cosine", "compared", "live", "count")
    variation: Tensor
    cosine: Tensor
    compared: Tensor
    live: Tensor
    count: Tensor

    def update(self, gradients: Tensor, smooth_gradients: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            gradients: (B, C, H, W), as :class:`camkernels.InputGradient` makes them.
            smooth_gradients: (B, C, H, W), as :class:`camkernels.SmoothGrad` makes them of the same
                pictures and classes; None for pictures that take no part in the agreement.
        """
        variation = total_variation(gradients)
        live = (gradients != 0).flatten(1).any(1)
        self._add(variation=variation, live=live, count=torch.ones_like(live))  # 0 where not live
        if smooth_gradients is not None:
            self._add(cosine=gradient_agreement(gradients, smooth_gradients), compared=live)

    def compute(self) -> dict[str, Tensor]:
        """The means over gradients that are not zero, and the fraction of the others."""
        return {
            "total_variation": self.variation / self.live,
            "agreement": self.cosine / self.compared,
            "dead_fraction": 1 - self.live / self.count,
        }
