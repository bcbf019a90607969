"""Training curves of the engine beside eager autograd: ``python -m benchmarks.curves --data cifar10
--root FOLDER`` or ``--data digits``.

Cross-entropy plus the interpretable-gradient term, from the same seeds on both sides; per epoch the
loss, the accuracy on test data and the error E on the last batch, as rows of CSV. ``cifar10`` is a
folder of pictures, ``{train,test}/<class>/*.jpg``.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from camtrain.models.smallresnet import Block, SmallResNet
from torch import Tensor, nn

import camkernels as ck
from benchmarks import loops

WEIGHT = 0.1
Data = tuple[Tensor, Tensor]


class ResNet20(nn.Module):
    """ResNet-20 for 32 x 32 pictures, with projection shortcuts (He et al., sec. 4.2, option B)."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(16), nn.ReLU()
        widths, blocks = (16, 16, 32, 64), []
        for before, width in itertools.pairwise(widths):
            first = Block(before, width, 1 if before == width else 2)
            blocks.append(nn.Sequential(first, *(Block(width, width, 1) for _ in range(2))))
        self.layer1, self.layer2, self.layer3 = blocks
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.fc = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(self.flatten(self.pool(x)))
        return logits


def cifar10(root: Path, split: str) -> Data:
    """Pictures (N, 3, 32, 32), normalised, and labels."""
    from PIL import Image

    classes = sorted(p.name for p in (root / split).iterdir() if p.is_dir())
    if not classes:
        raise SystemExit(f"no class folders in {root / split}")
    pictures, labels = [], []
    for label, name in enumerate(classes):
        for path in sorted((root / split / name).glob("*.jpg")):
            pictures.append(np.asarray(Image.open(path).convert("RGB"), np.float32) / 255)
            labels.append(label)
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return ((images - 0.45) / 0.25).contiguous(), torch.tensor(labels)


def digits(split: str, count: int) -> Data:
    from camtrain.data.digits import Digits

    data = Digits(split, 64, 0, count)
    images = data.images[:, None].expand(-1, 3, -1, -1).float() / 255
    return ((images - 0.2) / 0.25).contiguous(), data.targets


def batches(data: Data, size: int, seed: int) -> Iterator[Data]:
    order = torch.randperm(len(data[1]), generator=torch.Generator().manual_seed(seed))
    for index in order.split(size):
        if len(index) == size:
            images = data[0][index]
            flips = torch.rand(size, generator=torch.Generator().manual_seed(seed + 1)) < 0.5
            images = torch.where(flips[:, None, None, None], images.flip(3), images)
            yield images, data[1][index]


def train(
    make: Callable[[], nn.Module], side: str, seed: int, train_data: Data, test: Data, epochs: int
) -> Iterator[dict[str, object]]:
    """One row per epoch."""
    torch.manual_seed(seed)
    model = make().train()
    if side == "eager":
        loss_of = loops.interpretable(model, WEIGHT)[0]
    else:
        ck.swap_in(model, engine=True, memory=side)
        criterion = ck.InterpretableGradientLoss(model, "cosine", WEIGHT)
        loss_of = lambda images, targets: criterion(model(images), targets)  # noqa: E731
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    for epoch in range(epochs):
        losses = []
        for images, targets in batches(train_data, 64, 1000 * seed + epoch):
            optimizer.zero_grad()
            loss = loss_of(images, targets)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        model.eval()
        with torch.no_grad():
            logits = torch.cat([model(images) for images in test[0].split(250)])
        model.train()
        yield {
            "side": side,
            "seed": seed,
            "epoch": epoch,
            "train_loss": f"{np.mean(losses):.4f}",
            "test_cross_entropy": f"{float(F.cross_entropy(logits, test[1])):.4f}",
            "test_accuracy": f"{float((logits.argmax(1) == test[1]).float().mean()):.4f}",
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", choices=["cifar10", "digits"], required=True)
    parser.add_argument("--root", type=Path)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sides", nargs="+", default=["eager", "lean"])
    parser.add_argument("--output", type=Path, required=True, help="the CSV")
    arguments = parser.parse_args()
    make: Callable[[], nn.Module]
    if arguments.data == "cifar10":
        if arguments.root is None:
            parser.error("--data cifar10 needs --root")
        make = ResNet20
        data = [cifar10(arguments.root, split) for split in ("train", "test")]
    else:
        make = lambda: SmallResNet(width=8)  # noqa: E731
        data = [digits("train", 1600), digits("test", 500)]
    with arguments.output.open("w", newline="") as file:
        print(f"# python -m benchmarks.curves {' '.join(sys.argv[1:])}", file=file)
        writer: csv.DictWriter[str] | None = None
        for seed in range(arguments.seeds):
            for side in arguments.sides:
                for row in train(make, side, seed, data[0], data[1], arguments.epochs):
                    if writer is None:
                        writer = csv.DictWriter(file, list(row))
                        writer.writeheader()
                    writer.writerow(row)
                    file.flush()
                    print(*row.values(), flush=True)


if __name__ == "__main__":
    main()
