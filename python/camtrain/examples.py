"""Fixed test pictures with the maps of a run, for its figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

import camkernels as ck
from camtrain.data.module import CamtrainData
from camtrain.training import Classifier, ConsistencyClassifier


@dataclass
class Examples:
    """Fixed test pictures with maps at the end of training: of the true class, or in a consistency
    run of the predicted one, without ReLU and stretched from their minimum, as its loss sees them.
    """

    images: Tensor
    """(N, 3, H, W) uint8."""
    targets: Tensor
    """(N,)"""
    predictions: Tensor
    """(N,)"""
    boxes: Tensor | None
    """(N, 4)"""
    maps: Tensor
    """(N, h, w)"""
    entropy: Tensor
    """(N,) of the maps."""


class ExampleCollector(Callback):
    """At the end of training, maps of fixed test pictures: the first of each class, at most 8."""

    def __init__(self, data: CamtrainData, count: int = 8) -> None:
        self.data = data
        self.items = example_items(data, count)
        self.found: dict[str, Any] = {}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The model is still on its device here."""
        assert isinstance(pl_module, Classifier)
        self.collect(pl_module)

    def collect(self, module: Classifier) -> None:
        """Describe the criterion, take it off the model, and explain.

        Lightning calls no hook where a run is resumed after its last epoch: :func:`fit` does.
        """
        description = module.describe()
        module.close()  # without gradients two taps of one layer stand in each other's way
        consistency = isinstance(module, ConsistencyClassifier)
        examples = explain(module.model, module.layer, self.items, self.data, consistency)
        self.found = {**description, "examples": examples}


def example_items(data: CamtrainData, count: int) -> list[dict[str, Tensor]]:
    """The first sound test picture of each class, in the order of the data."""
    found: dict[int, dict[str, Tensor]] = {}
    for index in range(len(data.test)):
        if len(found) == min(count, len(data.classes)):
            break
        item = data.test[index]
        if "damaged" not in item:
            found.setdefault(int(item["targets"]), item)
    return list(found.values())


@torch.no_grad()
def explain(
    model: torch.nn.Module,
    layer: str,
    items: list[dict[str, Tensor]],
    data: CamtrainData,
    consistency: bool = False,
) -> Examples:
    """Maps of each item, in evaluation mode, see :class:`Examples`; the mode is put back."""
    parameter = next(model.parameters())
    images = torch.stack([item["images"] for item in items])
    targets = torch.stack([item["targets"] for item in items])
    training = model.training
    model.eval()
    try:
        with ck.GradCAM(model, layer, relu=not consistency) as cam:
            logits = model(data.normalise(images.to(parameter.device)).to(parameter.dtype))
            maps = cam(logits, None if consistency else targets.to(parameter.device))
    finally:
        model.train(training)
    assert isinstance(maps, Tensor)  # of one layer
    if consistency:
        maps = stretched(maps)
    boxes = torch.stack([item["boxes"] for item in items]) if "boxes" in items[0] else None
    entropy = ck.map_statistics(maps).entropy
    return Examples(images, targets, logits.argmax(1).cpu(), boxes, maps.cpu(), entropy.cpu())


def stretched(maps: Tensor) -> Tensor:
    """Maps (B, h, w) from 0 to 1; a constant map is all 0."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / torch.where(high > low, high - low, 1.0)


def describe_example(examples: Examples, index: int, classes: tuple[str, ...]) -> str:
    """One line under a map."""
    name = classes[int(examples.predictions[index])]
    if not bool(examples.maps[index].any()):
        return f"says {name}, dead map"
    return f"says {name}, ce {max(float(examples.entropy[index]), 0.0):.2f}"
