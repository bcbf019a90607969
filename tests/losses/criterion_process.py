"""One process of a distributed training step: RANK, WORLD and a folder are its arguments."""

from __future__ import annotations

import os
import sys
from datetime import timedelta

import torch
from torch import nn

import camkernels as ck

# (error, inner_reduction): neither depends on how the batch is divided
SETTINGS = (("cosine", "mean"), ("sigmoid", "sum"))
WRAPPERS: tuple[dict[str, bool], ...] = ({}, {"find_unused_parameters": True})
STEPS = 2


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [
        *(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)),
    ]
    return nn.Sequential(*layers).double()


def data() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(8, 3, 10, 10, dtype=torch.float64), torch.arange(8) % 5


def train(model: nn.Module, images: torch.Tensor, targets: torch.Tensor, **options: object) -> None:
    """Gradients of two steps, of which the second has no regulariser."""
    criterion = ck.InterpretableGradientLoss(model, weight=100.0, every=STEPS, **options)  # type: ignore[arg-type]
    for _ in range(STEPS):
        criterion(model(images), targets).backward()


LAYER, SIZE = "5", (10, 10)
BOXES = torch.tensor([[i % 3, i % 2, 6 + i % 3, 8] for i in range(8)])


def cam_criterion(name: str, model: nn.Module, part: slice) -> nn.Module:
    """A criterion of maps of the samples of ``part``: all maps are live, so that the means over
    processes are those over the batch."""

    def views(batch: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        return BOXES[part], torch.arange(8)[part] % 2 == 0

    entropy = ck.CAMEntropyLoss(model, LAYER, beta=3.0, regularizer="dispersion")
    if name == "entropy":
        return entropy
    consistency = ck.CAMConsistencyLoss(
        model, LAYER, alpha=5.0, beta=0.1, transform=views, target="true", window_size=5
    )
    if name == "consistency":
        return consistency
    gradient = ck.InterpretableGradientLoss(model, weight=2.0)
    return ck.CombinedLoss({"e": entropy, "c": consistency, "g": gradient})


CAM_CRITERIA = ("entropy", "consistency", "combined")
# Under static_graph: criteria with a closed-form head around the wrapper, and any inside of it.
STATIC = {"entropy": "entropy", "consistency": "consistency", "inside": "combined"}


class Inside(nn.Module):
    """As a Lightning module under DistributedDataParallel: it returns the loss."""

    def __init__(self, model: nn.Module, part: slice) -> None:
        super().__init__()
        self.model = model
        self.criterion = [cam_criterion("combined", model, part)]

    def forward(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.criterion[0](self.model(images), targets)
        return loss


def main(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
        timeout=timedelta(seconds=120),
    )  # fmt: skip
    images, targets = (part.chunk(world)[rank] for part in data())
    found = []
    for error, inner in SETTINGS:
        for options in WRAPPERS:
            model = network()
            wrapped = nn.parallel.DistributedDataParallel(model, **options)  # type: ignore[arg-type]
            # DistributedDataParallel refuses to wrap SyncBatchNorm on a CPU; ours does run there
            ck.swap_in(nn.SyncBatchNorm.convert_sync_batchnorm(model))
            train(wrapped, images, targets, error=error, inner_reduction=inner)
            found.append([p.grad for p in model.parameters()])
    part = slice(rank * 8 // world, (rank + 1) * 8 // world)
    for name in CAM_CRITERIA:
        model = network()
        wrapped = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        ck.swap_in(nn.SyncBatchNorm.convert_sync_batchnorm(model))
        criterion = cam_criterion(name, wrapped, part)
        criterion(wrapped(images), targets).backward()
        found.append([p.grad for p in model.parameters()])
    for name in STATIC:
        model = network()
        inside = Inside(model, part) if name == "inside" else model
        wrapped = nn.parallel.DistributedDataParallel(
            inside, broadcast_buffers=False, static_graph=True
        )
        ck.swap_in(nn.SyncBatchNorm.convert_sync_batchnorm(model))
        if name == "inside":
            wrapped(images, targets).backward()
        else:
            criterion = cam_criterion(name, wrapped, part)
            criterion(wrapped(images), targets).backward()
        found.append([p.grad for p in model.parameters()])
    if rank == 0:
        torch.save(found, f"{folder}/gradients.pt")
    torch.distributed.barrier()
    # Taking gloo down may wait, with the interpreter's lock, for a thread that waits for the lock.
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
