"""Scores of a trained network, picture by picture, that ``camtrain evaluate`` does not take."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

import camkernels as ck
from camkernels import metrics
from camtrain.data.module import CamtrainData, collate
from camtrain.evaluation import crops
from camtrain.trained import Trained


def _batches(network: Trained, limit: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Test pictures (B, 3, S, S), normalised, and their classes (B,)."""
    assert network.config is not None
    config = dataclasses.replace(network.config, limit_test=limit)
    data = CamtrainData(config)
    loader: Any = DataLoader(data.test, config.batch_size, collate_fn=collate)  # type: ignore[arg-type]
    for batch in loader:
        if "images" in batch:
            yield network.normalise(batch["images"]), batch["targets"]


def _consistency(network: Trained, images: Tensor, seen: int) -> list[float]:
    """SSIM under the crops of the pictures from number ``seen`` on."""
    boxes, flips = crops(torch.arange(seen, seen + len(images)), images.shape[-1])
    place = (boxes.to(images.device), flips.to(images.device))
    alike = ck.consistency_scores(network.model, network.layer, images, *place)
    found: list[float] = alike.tolist()
    return found


def consistency(network: Trained, limit: int | None) -> list[float]:
    """SSIM of the crop of the map and the map of the crop, of the first ``limit`` pictures."""
    found: list[float] = []
    for images, _ in _batches(network, limit):
        found += _consistency(network, images, len(found))
    return found


def means(network: Trained, limit: int | None) -> dict[str, Any]:
    """Consistency of maps, and smoothness of input gradients, of the first ``limit`` pictures."""
    values: dict[str, list[float]] = {"consistency": [], "variation": [], "agreement": []}
    for images, targets in _batches(network, limit):
        values["consistency"] += _consistency(network, images, len(values["consistency"]))
        gradients = ck.InputGradient(network.model)(images, targets)
        smooth = ck.SmoothGrad(network.model, samples=10)(images, targets)
        values["variation"] += metrics.total_variation(gradients).tolist()
        values["agreement"] += metrics.gradient_agreement(gradients, smooth).tolist()
    found = {name: _mean(scores) for name, scores in values.items()}
    return {
        "consistency %": None if found["consistency"] is None else 100 * found["consistency"],
        "gradient TV": found["variation"],
        "agreement with SmoothGrad": found["agreement"],
    }


def _mean(values: Sequence[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None
