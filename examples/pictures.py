"""What the examples share: their arguments, and a folder of pictures as a data set."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

SUFFIXES = {".jpg", ".jpeg", ".png"}


def arguments(
    argv: list[str] | None, model: str = "torchvision.models:resnet18"
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="holds a folder per class")
    parser.add_argument("--model", default=model)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--accumulate", type=int, default=1, help="batches per step")
    parser.add_argument("--side", type=int, default=128, help="of the pictures, in pixels")
    parser.add_argument("--lr", type=float, default=0.01)
    return parser.parse_args(argv)


def make_model(name: str, classes: int) -> nn.Module:
    """What ``module:factory`` makes."""
    module, factory = name.split(":")
    model: nn.Module = getattr(importlib.import_module(module), factory)(num_classes=classes)
    return model


class Pictures(Dataset[tuple[Tensor, int]]):
    """Pictures (3, side, side) and their class; every fifth belongs to the test part."""

    def __init__(self, folder: Path, side: int, test: bool = False) -> None:
        self.side = side
        self.classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        self.samples: list[tuple[Path, int]] = []
        for label, name in enumerate(self.classes):
            files = sorted(p for p in (folder / name).iterdir() if p.suffix.lower() in SUFFIXES)
            kept = [p for i, p in enumerate(files) if (i % 5 == 4) == test]
            self.samples += [(path, label) for path in kept]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        with Image.open(path) as file:
            image = file.convert("RGB").resize((self.side, self.side))
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
        return pixels / 127.5 - 1, label  # in PyTorch's default dtype
