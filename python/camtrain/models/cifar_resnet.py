"""The ResNets of CIFAR."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn


class Shortcut(nn.Module):
    """Option A: every second pixel, and channels of zeros on both sides; no parameters."""

    def __init__(self, added: int) -> None:
        super().__init__()
        self.added = added

    def forward(self, x: Tensor) -> Tensor:
        """(B, K, h, w) to (B, K + 2 added, ceil(h / 2), ceil(w / 2))."""
        half = x[:, :, ::2, ::2]
        shape = list(half.shape)
        shape[1] = self.added
        zeros = half.new_zeros(shape)
        return torch.cat([zeros, half, zeros], 1)


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU(inplace=True)
        changes = stride != 1 or before != width
        self.shortcut = Shortcut((width - before) // 2) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, K, h, w) to (B, width, h / stride, w / stride)."""
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        result: Tensor = self.relu2(out + self.shortcut(x))
        return result


class CifarResNet(nn.Module):
    """Three stages of ``blocks`` blocks of 16, 32 and 64 channels: 6 blocks + 2 layers.

    The state_dict has the names of github.com/akamaster/pytorch_resnet_cifar10, whose published
    weights it loads; those expect pictures normalised by ImageNet's mean and deviation.

    Source: He et al., Deep residual learning for image recognition, sec. 4.2.
    """

    def __init__(self, blocks: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(16, 16, blocks, 1)
        self.layer2 = _stage(16, 32, blocks, 2)
        self.layer3 = _stage(32, 64, blocks, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) to logits (B, classes)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(self.flatten(self.pool(x)))
        return logits


def _stage(before: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    first = Block(before, width, stride)
    rest = [Block(width, width, 1) for _ in range(blocks - 1)]
    return nn.Sequential(OrderedDict((str(i), block) for i, block in enumerate([first, *rest])))
