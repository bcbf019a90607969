"""Real pictures and trained weights of ../shared/data, for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pictures(files: list[Path], size: int | None) -> Tensor:
    """(N, 3, H, W), normalised."""
    from PIL import Image

    found = []
    for file in files:
        picture = Image.open(file).convert("RGB")
        picture = picture if size is None else picture.resize((size, size))
        found.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255)
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, DEVIATION))
    return (torch.stack(found) - mean) / deviation


def squeezenet(data: Path) -> nn.Module:
    """SqueezeNet 1.0 trained on ImageNet."""
    import torchvision

    model: nn.Module = torchvision.models.squeezenet1_0()
    file = data / "weights_squeezenet1_0_imagenet" / "squeezenet1_0_dc_fp16.pth"
    state = torch.load(file, weights_only=True)
    model.load_state_dict({name: value.float() for name, value in state.items()})
    return model.eval()


class _Block(nn.Module):
    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.pad = stride, (width - before) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(out + x)


class ResNet20(nn.Module):
    """He et al., section 4.2, option A; the names of akamaster/pytorch_resnet_cifar10."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        before = 16
        for stage, width in enumerate((16, 32, 64), 1):
            blocks = []
            for i in range(3):
                stride = 2 if stage > 1 and i == 0 else 1
                blocks.append(_Block(before, width, stride))
                before = width
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def resnet20(data: Path) -> nn.Module:
    """ResNet-20 trained on CIFAR-10."""
    file = data / "weights_cifar10_resnet" / "resnet20-12fca82f.th"
    state = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
    model = ResNet20()
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    return model.eval()
