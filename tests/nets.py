"""Small networks and the eager oracle that tests of taps and losses share."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


class SmallNet(nn.Module):
    """Convolutions, pooling, and a head that the test chooses."""

    def __init__(self, head: str = "linear", classes: int = 5, channels: int = 6) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, channels, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        layers: dict[str, list[nn.Module]] = {
            "linear": [nn.Linear(channels, classes)],
            "mlp": [nn.Linear(channels, 7), nn.ReLU(inplace=True), nn.Linear(7, classes)],
            "deep": [
                *(nn.Linear(channels, 7), nn.ReLU(), nn.Linear(7, 4), nn.ReLU()),
                nn.Linear(4, classes, bias=False),
            ],
            "linear-linear": [nn.Linear(channels, 7), nn.Linear(7, classes)],
            "dropout": [nn.Dropout(0.5), nn.Linear(channels, classes)],
            "batch-norm": [nn.BatchNorm1d(channels), nn.Linear(channels, classes)],
            "tanh": [nn.Linear(channels, 7), nn.Tanh(), nn.Linear(7, classes)],
            "final-relu": [nn.Linear(channels, classes), nn.ReLU()],
        }
        self.fc = nn.Sequential(nn.Flatten(), *layers[head])

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.pool(self.body(x)))
        return logits


def model_and_twin(head: str = "linear") -> tuple[nn.Module, nn.Module]:
    """A small network in float64, and a copy of it for the other side of a comparison."""
    model = SmallNet(head).double()
    return model, copy.deepcopy(model)


def batch(
    size: int = 4, classes: int = 5, side: int = 12, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Images (B, 3, side, side) and targets (B,)."""
    images = torch.randn(size, 3, side, side, dtype=dtype)
    return images, torch.arange(size) % classes


def eager_maps(model: nn.Module, layer: str, images: Tensor, targets: Tensor) -> tuple[Any, ...]:
    """What a careful user writes: one forward, a hook, ``create_graph``. Logits and maps."""
    kept: dict[str, Tensor] = {}

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        kept["A"] = output

    handle = dict(model.named_modules())[layer].register_forward_hook(keep)
    logits = model(images)
    handle.remove()
    score = logits.gather(1, targets[:, None]).sum()
    (gradients,) = torch.autograd.grad(score, kept["A"], create_graph=True)
    return logits, (gradients.mean((2, 3), keepdim=True) * kept["A"]).sum(1).relu()


def eager_statistics(maps: Tensor) -> dict[str, Tensor]:
    """ce, ca, cd per map by their definitions (eigenvalues and all); live maps only."""
    total = maps.sum((1, 2))
    live = total > 0
    p = maps / torch.where(live, total, 1.0)[:, None, None]
    positive = torch.where(p > 0, p, 1.0)
    y, x = (torch.arange(n, dtype=maps.dtype) for n in maps.shape[1:])
    y, x = y[:, None], x[None]
    dy = y - (p * y).sum((1, 2), keepdim=True)
    dx = x - (p * x).sum((1, 2), keepdim=True)
    yy, yx, xx = ((p * d).sum((1, 2)) for d in (dy * dy, dy * dx, dx * dx))
    covariance = torch.stack((yy, yx, yx, xx), 1).view(-1, 2, 2)
    eigenvalues = torch.linalg.eigvalsh(covariance).clamp(min=1e-30)
    mean = torch.where(live, maps.mean((1, 2)), 1.0)
    return {
        "entropy": -(p * positive.log()).sum((1, 2)),
        "area": eigenvalues.prod(1).sqrt(),
        "dispersion": maps.var((1, 2), correction=0) / mean**2,
        "live": live,
    }


def eager_loss(
    model: nn.Module,
    layer: str,
    images: Tensor,
    targets: Tensor,
    beta: float,
    regularizer: str = "entropy",
) -> Tensor:
    """Cross-entropy + beta r by plain autograd."""
    logits, maps = eager_maps(model, layer, images, targets)
    statistics = eager_statistics(maps)
    live = statistics["live"]
    value = statistics[regularizer] * (-1 if regularizer == "dispersion" else 1)
    mean = torch.where(live, value, 0.0).sum() / live.sum().clamp(min=1)
    return nn.functional.cross_entropy(logits, targets) + beta * mean


def parameter_gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    """Gradients of all parameters; zeros where a parameter got none."""
    parameters = list(model.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def largest_difference(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))
