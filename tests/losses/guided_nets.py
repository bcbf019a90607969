"""A small network with the choice of ReLU, and the eager oracle of interpretable gradients.

The oracle shares nothing with the package: ReLUs that are switched in the module, one forward per
gradient, the errors as the paper writes them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from nets import largest_difference
from torch import Tensor, nn

from camkernels.nn import functional as ck_functional

ERRORS = ("cosine", "histogram", "histogram_paper", "sigmoid", "centered_sigmoid")


class _GuidedReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        ctx.save_for_backward(u)
        return u.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (u,) = ctx.saved_tensors
        return torch.where((u > 0) & (grad > 0), grad, 0.0)


class GuidedNet(nn.Module):
    """Convolutions, BatchNorm, a residual, pooling, linear layers.

    ``relu``: ``"camkernels"`` (all its network ops), ``"torch"``, or ``"guided"``, torch's with
    the guided rule.
    """

    def __init__(self, relu: str = "camkernels", classes: int = 5, group: Any = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.conv3 = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.hidden = nn.Linear(8, 16)
        self.fc = nn.Linear(16, classes)
        self.relu = relu
        self.group = group
        for bn in (self.bn1, self.bn2):
            nn.init.uniform_(bn.weight, -1.5, 1.5)
            nn.init.uniform_(bn.bias, -0.5, 0.5)

    def _relu(self, u: Tensor) -> Tensor:
        if self.relu == "camkernels":
            return ck_functional.relu(u)
        if self.relu == "guided":
            out: Tensor = _GuidedReLU.apply(u)
            return out
        return nn.functional.relu(u)

    def _block(
        self, x: Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d, residual: Tensor | None = None
    ) -> Tensor:
        if self.relu == "camkernels":
            return ck_functional.conv_bn_act(
                x, conv.weight, None, bn.running_mean, bn.running_var, bn.weight, bn.bias,
                padding=1, training=bn.training, residual=residual, process_group=self.group,
            )  # fmt: skip
        z = bn(conv(x))
        return self._relu(z if residual is None else z + residual)

    def _conv3(self, x: Tensor) -> Tensor:
        if self.relu != "camkernels":
            return self.conv3(x)
        return ck_functional.conv2d(x, self.conv3.weight, self.conv3.bias, stride=2, padding=1)

    def features(self, x: Tensor) -> Tensor:
        x = self._block(x, self.conv1, self.bn1)
        x = self._block(x, self.conv2, self.bn2, residual=x)
        return self._relu(self._conv3(nn.functional.max_pool2d(x, 2)))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self._relu(self.hidden(self.features(x).mean((2, 3)))))
        return logits


def twin_of(model: GuidedNet, dtype: torch.dtype | None = None) -> GuidedNet:
    """A copy in plain torch, for the oracle."""
    twin = copy.deepcopy(model)
    twin.relu = "torch"
    return twin if dtype is None else twin.to(dtype)


def eager_error(delta: Tensor, guided: Tensor, error: str) -> Tensor:
    """E per sample, as eqs. 11 to 14 are written."""
    d, g = delta.flatten(1), guided.flatten(1)
    if error == "sigmoid":
        return -(g * d.exp() / (d.exp() + 1)).sum(1)
    if error == "centered_sigmoid":
        centered = d - d.mean(1, keepdim=True)
        return -(g * torch.sigmoid(centered)).sum(1)
    if error == "histogram_paper":
        norms = d.abs().sum(1) * g.abs().sum(1)
        return -torch.minimum(d.abs(), g.abs()).sum(1) / norms
    if error == "histogram":
        p, q = (v.abs() / v.abs().sum(1, keepdim=True) for v in (d, g))
        return -torch.minimum(p, q).sum(1)
    return -(d * g).sum(1) / (d.norm(dim=1) * g.norm(dim=1))


def eager_gradients(
    twin: GuidedNet, images: Tensor, targets: Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, delta with its graph, and delta_G; one forward each, as users write it."""
    found = []
    logits = images
    for relu in ("guided", "torch"):
        twin.relu = relu
        x = images.detach().clone().requires_grad_()
        logits = twin(x)
        inner = nn.functional.cross_entropy(logits, targets, **options)
        found.append(torch.autograd.grad(inner, x, create_graph=relu == "torch")[0])
    return logits, found[1], found[0].detach()


def eager_loss(
    twin: GuidedNet, images: Tensor, targets: Tensor, error: str, weight: float, **options: Any
) -> Tensor:
    logits, delta, guided = eager_gradients(twin, images, targets, **options)
    cross_entropy = nn.functional.cross_entropy(logits, targets, **options)
    return cross_entropy + weight * eager_error(delta, guided, error).mean()


class Pointwise(nn.Module):
    """A convolution, the function that the test chooses, pooling and a linear layer."""

    def __init__(self, relu: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.fc = nn.Linear(6, 5)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.relu(self.conv(x)).mean((2, 3)))
        return logits


def relative(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return largest_difference(ours, theirs) / max(float(t.abs().max()) for t in theirs)
