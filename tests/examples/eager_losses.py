"""The criteria of the examples in plain autograd, as their papers write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from networks import Switched
from torch import Tensor, nn

Loss = Callable[[Any, Tensor, Tensor, Any], Tensor]
"""Of a model, images, targets and what was drawn."""


def eager_maps(
    model: nn.Module, layer: str, images: Tensor, classes: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, classes (None: the predicted ones), and weighted sums without a ReLU."""
    kept: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda m, i, out: kept.append(out))
    output = model(images)
    handle.remove()
    logits = output if isinstance(output, Tensor) else output.logits
    classes = logits.detach().argmax(1) if classes is None else classes
    score = logits.gather(1, classes[:, None]).sum()
    (gradients,) = torch.autograd.grad(score, kept[0], create_graph=True)
    return logits, classes, (gradients.mean((2, 3), keepdim=True) * kept[0]).sum(1)


def eager_entropy(layer: str, summed: bool = False, smoothing: float = 0.0) -> Loss:
    def loss(model: Any, images: Tensor, targets: Tensor, drawn: Any) -> Tensor:
        logits, _, maps = eager_maps(model, layer, images, targets)
        maps = maps.relu()
        total = maps.sum((1, 2))
        p = maps / torch.where(total > 0, total, 1.0)[:, None, None]
        entropy = -(p * torch.where(p > 0, p, 1.0).log()).sum((1, 2))
        count = 1 if summed else max(int((total > 0).sum()), 1)
        cross_entropy = F.cross_entropy(
            logits, targets, reduction="sum" if summed else "mean", label_smoothing=smoothing
        )
        return cross_entropy + 0.1 * entropy.sum() / count

    return loss


def eager_interpretable(model: Any, images: Tensor, targets: Tensor, drawn: Any) -> Tensor:
    found = []
    for guided in (True, False):
        for module in model.modules():
            if isinstance(module, Switched):
                module.guided = guided
        x = images.clone().requires_grad_()
        loss = F.cross_entropy(model(x), targets)
        found.append(torch.autograd.grad(loss, x, create_graph=not guided)[0].flatten(1))
    similarity = (found[0] * found[1]).sum(1) / (found[0].norm(dim=1) * found[1].norm(dim=1))
    return loss - 0.01 * similarity.mean()


def eager_ssim(a: Tensor, b: Tensor) -> Tensor:
    """Per sample, of maps in [0, 1]: a Gaussian window of 11 pixels inside the picture."""
    x = torch.arange(11.0) - 5
    window = torch.exp(-(x**2) / (2 * 1.5**2))
    window = window[:, None] * window[None] / window.sum() ** 2

    def blur(t: Tensor) -> Tensor:
        return F.conv2d(t[:, None], window[None, None])

    m, n = blur(a), blur(b)
    va, vb, ab = blur(a * a) - m * m, blur(b * b) - n * n, blur(a * b) - m * n
    c, d = 0.01**2, 0.03**2
    value = (2 * m * n + c) * (2 * ab + d) / ((m * m + n * n + c) * (va + vb + d))
    return value.mean((1, 2, 3))


def eager_consistency(model: Any, images: Tensor, targets: Tensor, drawn: Any) -> Tensor:
    size = tuple(images.shape[2:])

    def enlarged(t: Tensor) -> Tensor:
        return F.interpolate(t, size, mode="bilinear")

    def warped(t: Tensor) -> Tensor:
        parts = zip(t, drawn[0].tolist(), drawn[1].tolist(), strict=True)
        views = [(enlarged(u[None, :, a : a + h, b : b + w]), f) for u, (a, b, h, w), f in parts]
        return torch.cat([v.flip(-1) if flip else v for v, flip in views])

    def normal(m: Tensor) -> Tensor:
        low, high = m.amin((1, 2), True), m.amax((1, 2), True)
        return (m - low) / (high - low)

    logits, classes, first = eager_maps(model, "layer4", images, None)
    _, _, second = eager_maps(model, "layer4", warped(images), classes)
    first = enlarged(normal(first)[:, None])
    distance = 1 - eager_ssim(warped(first)[:, 0], enlarged(normal(second)[:, None])[:, 0])
    norm = first.abs().sum((1, 2, 3)).mean()
    return F.cross_entropy(logits, targets) + 0.1 * distance.mean() + 1e-6 * norm
