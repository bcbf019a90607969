"""One process of a distributed step by the engine: rank, world size and a folder are its arguments.

With SyncBatchNorm two processes, each with its half of the batch, do what one does with all of it.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import camkernels as ck

MEMORY = ("fast", "lean")
WEIGHT = 1e3


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + x)


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        Residual(), Residual(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    ).double()  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.5)
            nn.init.normal_(module.bias, 0.0, 0.3)
            nn.init.constant_(module.weight[:1].detach(), 0.0)
    return model


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(8, 3, 12, 12, dtype=torch.float64), torch.arange(8) % 5


def step(model: nn.Module, images: Tensor, targets: Tensor) -> None:
    """One step with the regulariser and one with cross-entropy alone; gradients add up."""
    criterion = ck.InterpretableGradientLoss(model, weight=WEIGHT, every=2)
    for _ in range(2):
        criterion(model(images), targets).backward()
    criterion.close()


def main(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
        timeout=timedelta(seconds=120),
    )  # fmt: skip
    images, targets = (part.chunk(world)[rank] for part in data())
    found = []
    for memory in MEMORY:
        model = network()
        wrapped = nn.parallel.DistributedDataParallel(model)
        # DistributedDataParallel refuses to wrap SyncBatchNorm on a CPU; ours does run there
        synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        ck.swap_in(synchronized, engine=True, memory=memory)
        step(wrapped, images, targets)
        wrapped(images)
        F.cross_entropy(wrapped(images), targets).backward()
        gradients = {n: p.grad for n, p in model.named_parameters()}
        found.append((gradients, dict(model.named_buffers())))
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    # Taking gloo down may wait, with the interpreter's lock, for a thread that waits for the lock.
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
