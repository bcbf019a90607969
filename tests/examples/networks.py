"""Networks that the tests give the examples, small, with the names that the examples tap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Switched(nn.Module):
    """A ReLU that can run by the guided rule, for the oracle."""

    guided = False

    def forward(self, u: Tensor) -> Tensor:
        out: Tensor = _GuidedReLU.apply(u) if self.guided else u.relu()
        return out


class _GuidedReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        ctx.save_for_backward(u)
        return u.relu()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (u,) = ctx.saved_tensors
        return torch.where((u > 0) & (grad > 0), grad, 0.0)


class Small(nn.Module):
    """Two convolutions, of which the second is ``layer4``; pooling and a linear layer."""

    def __init__(self, num_classes: int, relu: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6), relu()
        )
        self.layer4 = nn.Sequential(
            nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), relu()
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.pool(self.layer4(self.stem(x))).flatten(1))
        return logits
