"""Run in a process of its own, with malloc set: prints the measured and the predicted peak of a
step, in bytes, as ``{side: [measured, predicted]}``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import camkernels as ck
from benchmarks.memory import host_peak
from camkernels.engine import predict_peak

BATCH, SIZE = 8, 128


def step(model: nn.Module, device: str, regularised: bool) -> Callable[[], None]:
    criterion = ck.InterpretableGradientLoss(model) if regularised else nn.CrossEntropyLoss()
    images = torch.zeros(BATCH, 3, SIZE, SIZE, device=device)
    targets = torch.zeros(BATCH, dtype=torch.long, device=device)

    def run() -> None:
        criterion(model(images), targets).backward()
        for p in model.parameters():
            p.grad = None

    return run


def main(side: str) -> None:
    mode, _, loss = side.partition(" ")
    peaks = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = torchvision.models.resnet18(num_classes=10).train()
        if mode != "plain":
            model = ck.swap_in(model, engine=True, memory=mode)
        run = step(model, device, loss == "interpretable")
        peaks.append(host_peak(run) if device == "cpu" else predict_peak(run))
    print(json.dumps(peaks))


if __name__ == "__main__":
    main(sys.argv[1])
