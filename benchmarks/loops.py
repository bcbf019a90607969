"""The training loops that users write today for cross-entropy plus CAM entropy.

Names as in the results: ``separate`` is the published loop, a second forward for the map;
``careful`` shares the forward; ``closed_form`` also takes alpha from the last layer's weights,
which is exact for a head of pooling and one linear layer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import eager


def mean_over_live(entropies: Tensor, maps: Tensor) -> Tensor:
    """Mean over maps that are not all zero: dead ones have entropy 0, which would look good."""
    live = (maps.detach() > 0).flatten(1).any(1)
    return torch.where(live, entropies, 0.0).sum() / live.sum().clamp_min(1)


class _Kept:
    """Holds the output of a layer for as long as one loss needs it."""

    activations: Tensor | None = None

    def __init__(self, layer: nn.Module) -> None:
        self.handle = layer.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self.activations = output

    def take(self) -> Tensor:
        activations, self.activations = self.activations, None
        assert activations is not None
        return activations


Loop = Callable[[Tensor, Tensor], Tensor]


def plain(model: nn.Module) -> tuple[Loop, Callable[[], None]]:
    """Cross-entropy alone."""
    return lambda images, targets: F.cross_entropy(model(images), targets), lambda: None


def _penalty(activations: Tensor, scores: Tensor, targets: Tensor) -> Tensor:
    score = scores.gather(1, targets[:, None]).sum()
    (gradients,) = torch.autograd.grad(score, activations, create_graph=True)
    maps = eager.cam(activations, gradients)
    return mean_over_live(eager.entropy(maps), maps)


def separate(model: nn.Module, layer: str, beta: float) -> tuple[Loop, Callable[[], None]]:
    """A second forward for the map, as the published loops do."""
    kept = _Kept(model.get_submodule(layer))

    def loss(images: Tensor, targets: Tensor) -> Tensor:
        cross_entropy = F.cross_entropy(model(images), targets)
        scores = model(images)
        return cross_entropy + beta * _penalty(kept.take(), scores, targets)

    return loss, kept.handle.remove


def careful(model: nn.Module, layer: str, beta: float) -> tuple[Loop, Callable[[], None]]:
    """One forward, its activations kept by a hook, ``create_graph=True``."""
    kept = _Kept(model.get_submodule(layer))

    def loss(images: Tensor, targets: Tensor) -> Tensor:
        logits = model(images)
        penalty = _penalty(kept.take(), logits, targets)
        return F.cross_entropy(logits, targets) + beta * penalty

    return loss, kept.handle.remove


def closed_form(
    model: nn.Module, layer: str, linear: str, beta: float
) -> tuple[Loop, Callable[[], None]]:
    """One forward, alpha = W[c] / Z: no inner backward at all."""
    kept = _Kept(model.get_submodule(layer))

    def loss(images: Tensor, targets: Tensor) -> Tensor:
        logits = model(images)
        activations = kept.take()
        weight = model.get_submodule(linear).weight
        alpha = weight[targets] / activations[0, 0].numel()
        maps = eager.cam(activations, alpha)
        penalty = mean_over_live(eager.entropy(maps), maps)
        return F.cross_entropy(logits, targets) + beta * penalty

    return loss, kept.handle.remove
