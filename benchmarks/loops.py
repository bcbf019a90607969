"""The training loops that users write today: cross-entropy plus CAM entropy or plus the
interpretable-gradient term.

Names as in the results of CAM entropy: ``separate`` is the published loop, a second forward for the
map; ``careful`` shares the forward; ``closed_form`` also takes alpha from the last layer's weights,
which is exact for a head of pooling and one linear layer.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import eager


def mean_over_live(entropies: Tensor, maps: Tensor) -> Tensor:
    """Mean over maps that are not all zero: dead ones have entropy 0, which would look good."""
    live = (maps.detach() > 0).flatten(1).any(1)
    return torch.where(live, entropies, 0.0).sum() / live.sum().clamp_min(1)


class Kept:
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
    kept = Kept(model.get_submodule(layer))

    def loss(images: Tensor, targets: Tensor) -> Tensor:
        cross_entropy = F.cross_entropy(model(images), targets)
        scores = model(images)
        return cross_entropy + beta * _penalty(kept.take(), scores, targets)

    return loss, kept.handle.remove


def careful(model: nn.Module, layer: str, beta: float) -> tuple[Loop, Callable[[], None]]:
    """One forward, its activations kept by a hook, ``create_graph=True``."""
    kept = Kept(model.get_submodule(layer))

    def loss(images: Tensor, targets: Tensor) -> Tensor:
        logits = model(images)
        penalty = _penalty(kept.take(), logits, targets)
        return F.cross_entropy(logits, targets) + beta * penalty

    return loss, kept.handle.remove


def closed_form(
    model: nn.Module, layer: str, linear: str, beta: float
) -> tuple[Loop, Callable[[], None]]:
    """One forward, alpha = W[c] / Z: no inner backward at all."""
    kept = Kept(model.get_submodule(layer))

    def loss(images: Tensor, targets: Tensor) -> Tensor:
        logits = model(images)
        activations = kept.take()
        weight = model.get_submodule(linear).weight
        alpha = weight[targets] / activations[0, 0].numel()
        maps = eager.cam(activations, alpha)
        penalty = mean_over_live(eager.entropy(maps), maps)
        return F.cross_entropy(logits, targets) + beta * penalty

    return loss, kept.handle.remove


class Rule:
    """Which rule the ReLUs of one model follow in the backward that runs now."""

    guided = False


class SwitchedReLUFunction(torch.autograd.Function):
    """ReLU in eager PyTorch with the guided rule on demand, closed under differentiation."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, inplace: bool, rule: Rule) -> Tensor:
        v = u.relu_() if inplace else u.relu()
        if inplace:
            ctx.mark_dirty(u)
        ctx.save_for_backward(v)
        ctx.rule = rule
        return v

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (v,) = ctx.saved_tensors
        grad = grad.clamp_min(0) if ctx.rule.guided else grad
        # detached: a mask has no derivative, and autograd would carry zeros through the network
        return torch.ops.aten.threshold_backward(grad, v.detach(), 0), None, None


class SwitchedReLU(nn.Module):
    def __init__(self, inplace: bool, rule: Rule) -> None:
        super().__init__()
        self.inplace, self.rule = inplace, rule

    def forward(self, u: Tensor) -> Tensor:
        v: Tensor = SwitchedReLUFunction.apply(u, self.inplace, self.rule)
        return v


def _switch_relus(model: nn.Module, rule: Rule) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.ReLU):
                setattr(parent, name, SwitchedReLU(child.inplace, rule))


def interpretable(
    model: nn.Module,
    weight: float,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[Loop, Callable[[], None]]:
    """Cross-entropy plus ``weight`` times the cosine error between the input gradient and the
    guided one, by eager double backpropagation with care: one forward, both gradients from its
    graph, no weight gradients in either (autograd leaves them out where only x is asked for).

    ``precision``: context of the forward, such as autocast. The model's ReLUs are replaced.
    """
    rule = Rule()
    _switch_relus(model, rule)

    def loss(images: Tensor, targets: Tensor) -> Tensor:
        leaf = images.detach().requires_grad_()
        with precision():
            cross_entropy = F.cross_entropy(model(leaf), targets)
        rule.guided = True
        try:
            (guided,) = torch.autograd.grad(cross_entropy, leaf, retain_graph=True)
        finally:
            rule.guided = False
        (gradients,) = torch.autograd.grad(cross_entropy, leaf, create_graph=True)
        return cross_entropy + weight * eager.gradient_error(gradients, guided, "cosine").mean()

    return loss, lambda: None
