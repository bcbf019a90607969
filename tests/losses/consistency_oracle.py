"""The consistency loss as the paper writes it, in plain PyTorch; nothing of the package is in it.

Samples are cut out and resized one at a time, maps are enlarged and stored, SSIM is convolutions.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 12
BOXES = torch.tensor([[0, 0, 12, 12], [2, 3, 7, 6], [5, 1, 4, 9], [6, 6, 6, 6]])
FLIPS = torch.tensor([False, True, True, False])


def cropped(values: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Views (B, C, H, W) of (B, C, h, w)."""
    return torch.stack([
        (lambda c, f: c.flip(-1) if f else c)(
            F.interpolate(x[None, :, t : t + h, left : left + w], size, mode="bilinear")[0], flip
        )
        for x, (t, left, h, w), flip in zip(values, boxes.tolist(), FLIPS.tolist(), strict=True)
    ])  # fmt: skip


def eager_ssim(x: Tensor, y: Tensor, window: int, data_range: float) -> Tensor:
    """(B,) of planes (B, H, W): moments in each Gaussian window, sigma 1.5."""
    at = torch.arange(window, dtype=x.dtype) - window // 2
    weights = torch.exp(-(at**2) / (2 * 1.5**2))
    weights = weights / weights.sum()
    kernel = (weights[:, None] * weights)[None, None]

    def mean(values: Tensor) -> Tensor:
        return F.conv2d(values[:, None], kernel)[:, 0]

    mu, nu = mean(x), mean(y)
    xx, yy, xy = mean(x * x) - mu**2, mean(y * y) - nu**2, mean(x * y) - mu * nu
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    scores = (2 * mu * nu + c1) * (2 * xy + c2) / ((mu**2 + nu**2 + c1) * (xx + yy + c2))
    return scores.mean((1, 2))


def eager_maps(
    model: Any, images: Tensor, classes: Tensor, relu: bool, layer: str
) -> tuple[Tensor, Tensor]:
    body = model.body(images)
    pooled = model.pool(body)
    logits = model.fc(pooled)
    activations = body if layer == "body" else pooled
    score = logits.gather(1, classes[:, None]).sum()
    (gradients,) = torch.autograd.grad(score, activations, create_graph=True)
    maps = (gradients.mean((2, 3), keepdim=True) * activations).sum(1)
    return logits, maps.relu() if relu else maps


def _scaled(maps: Tensor) -> Tensor:
    low, span = maps.amin((1, 2), True), maps.amax((1, 2), True) - maps.amin((1, 2), True)
    return (maps - low) / torch.where(span > 0, span, 1.0)


def _predicted(model: Any, images: Tensor) -> Tensor:
    """Classes, the running statistics put back."""
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        classes = model(images).argmax(1)
    model.load_state_dict(state)
    return classes


def eager_loss(
    model: Any, images: Tensor, targets: Tensor, alpha: float, beta: float, p: float = 1.0,
    joint: bool = False, distance: str = "ssim", target: str = "predicted", relu: bool = False,
    normalize: str = "minmax", size: tuple[int, int] | None = None, reduction: str = "mean",
    data_range: float = 1.0, window_size: int = 3, boxes: Tensor = BOXES, layer: str = "body",
    **cross_entropy: Any,
) -> Tensor:  # fmt: skip
    """The loss, with the criterion's options."""
    count, source = len(images), (images.shape[2], images.shape[3])
    size = size or source
    views = cropped(images, boxes, size)
    batches = [torch.cat([images, views])] if joint else [images, views]
    classes = targets if target == "true" else _predicted(model, batches[0])[:count]
    found = [eager_maps(model, b, classes.repeat(len(b) // count), relu, layer) for b in batches]
    logits = found[0][0][:count]
    raw = found[0][1].chunk(2) if joint else (found[0][1], found[1][1])
    live = (raw[0] != 0).any(2).any(1) & (raw[1] != 0).any(2).any(1)
    first, second = (_scaled(m) if normalize == "minmax" else m for m in raw)
    up = F.interpolate(first[:, None], source, mode="bilinear")
    norms = torch.linalg.vector_norm(up.flatten(1), p, dim=1)
    u = cropped(up, boxes, size)[:, 0]
    v = F.interpolate(second[:, None], size, mode="bilinear")[:, 0]
    if distance == "contrastive":
        a, b = (F.normalize(t.flatten(1), dim=1) for t in (u, v))
        values = -torch.log_softmax(a @ b.t() / 0.5, 1).diagonal()
    else:
        values = 1 - eager_ssim(u, v, window_size, data_range)
    rest = torch.where(live, alpha * values + beta * norms, 0.0)
    if reduction != "none":
        rest = rest.sum() if reduction == "sum" else rest.sum() / live.sum()
    return F.cross_entropy(logits, targets, reduction=reduction, **cross_entropy) + rest
