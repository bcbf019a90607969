"""One process of steps under FSDP: rank, world size and a folder are its arguments."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

import camkernels as ck

LAYER = "body"
BOXES = torch.tensor([[i % 3, i % 2, 6 + i % 3, 8] for i in range(8)])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
            *(nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x))
        return logits


def network() -> Net:
    """In evaluation: the statistics of a batch would depend on how it is divided."""
    torch.manual_seed(0)
    return Net().double().eval()


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(8, 3, 10, 10, dtype=torch.float64), torch.arange(8) % 5


# --- what is trained -----------------------------------------------------------------------------


def entropy(model: nn.Module, part: slice, **options: Any) -> nn.Module:
    return ck.CAMEntropyLoss(model, LAYER, 3.0, "dispersion", **options)


def autograd(model: nn.Module, part: slice) -> nn.Module:
    return entropy(model, part, head="autograd")


def consistency(model: nn.Module, part: slice) -> nn.Module:
    def views(batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        return BOXES[part], torch.arange(8)[part] % 2 == 0

    return ck.CAMConsistencyLoss(
        model, LAYER, 5.0, 0.1, transform=views, target="true", window_size=5
    )


def gradient(model: nn.Module, part: slice) -> nn.Module:
    return ck.InterpretableGradientLoss(model, weight=2.0)


def combined(model: nn.Module, part: slice) -> nn.Module:
    parts: Any = {"e": entropy(model, part), "c": consistency(model, part)}
    return ck.CombinedLoss(parts)


def cross_entropy(model: nn.Module, part: slice) -> nn.Module:
    return nn.CrossEntropyLoss()


CRITERIA: dict[str, Callable[[nn.Module, slice], nn.Module]] = {
    "swapped": cross_entropy,
    "engine": cross_entropy,
    "entropy": entropy,
    "autograd": autograd,
    "consistency": consistency,
    "combined": combined,
    "gradient": gradient,
}
TOOLS: dict[str, Callable[[nn.Module], Any]] = {
    **{name: lambda m, n=name: CRITERIA[n](m, slice(None)) for name in list(CRITERIA)[2:]},  # type: ignore[misc]
    "GradCAM": lambda m: ck.GradCAM(m, LAYER),
    "ScoreCAM": lambda m: ck.ScoreCAM(m, LAYER),
    "InputGradient": ck.InputGradient,
}


def network_for(name: str) -> nn.Module:
    return ck.swap_in(network(), engine=name == "engine")


# --- wrappers ------------------------------------------------------------------------------------


def _wrapper(model: Any, parts: bool) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    def wrap(module: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(module, use_orig_params=True, device_id=torch.device("cpu"))

    if parts:
        model.body, model.head = wrap(model.body), wrap(model.head)
    return wrap(model)


def _in_place(model: Any, parts: bool, whole_head: bool = False) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    if parts:
        fully_shard(model.body, mesh=mesh)
        fully_shard(model.head, mesh=mesh, reshard_after_forward=not whole_head)
    return fully_shard(model, mesh=mesh)  # type: ignore[return-value]


KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "wrapper": lambda m: _wrapper(m, False),
    "wrappers": lambda m: _wrapper(m, True),
    "fully_shard": lambda m: _in_place(m, False),
    "fully_shard, in parts": lambda m: _in_place(m, True),
    "fully_shard, head whole": lambda m: _in_place(m, True, True),
}
RIGHT = [
    *((kind, "swapped") for kind in list(KINDS)[:4]),
    *((kind, "engine") for kind in ("wrapper", "fully_shard")),
    *(("fully_shard", name) for name in ("entropy", "consistency", "combined")),
    *(("fully_shard, head whole", name) for name in ("entropy", "consistency", "combined")),
]
_CLOSED = ("entropy", "consistency", "combined")
# Wrapped before the criterion is made, or ("late") after it, to the error and what it says.
REFUSED: dict[tuple[str, str], tuple[str, str]] = {
    **{("wrapper", name): ("TypeError", "FSDP") for name in (*_CLOSED, "autograd", "gradient")},
    **{("wrappers", name): ("TypeError", "FSDP") for name in (*_CLOSED, "autograd", "gradient")},
    **{("late wrapper", name): ("TapError", "FSDP") for name in (*_CLOSED, "autograd")},
    **{("late wrappers", name): ("TapError", "FSDP") for name in (*_CLOSED, "autograd")},
    ("late wrapper", "gradient"): ("TypeError", "FSDP"),
    ("late wrappers", "gradient"): ("TypeError", "FSDP"),
    ("late fully_shard", "gradient"): ("TypeError", "FSDP"),
    ("fully_shard", "autograd"): ("TapError", "FSDP"),
    ("fully_shard", "gradient"): ("TypeError", "FSDP"),
    ("fully_shard, in parts", "gradient"): ("TypeError", "FSDP"),
    ("wrappers", "engine"): ("EngineError", "FSDP"),
    ("fully_shard, in parts", "engine"): ("EngineError", "FSDP"),
    **{
        ("fully_shard, in parts", name): ("TapError", "reshard_after_forward=False")
        for name in _CLOSED
    },
}


def gradients(kind: str, wrapped: nn.Module) -> list[Tensor]:
    """Those of whole parameters."""
    if not kind.startswith("wrapper"):
        return [p.grad.full_tensor() for p in wrapped.parameters()]  # type: ignore[union-attr,operator]
    from torch.distributed.fsdp import FullyShardedDataParallel

    with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
        return [p.grad.clone() for p in wrapped.parameters()]  # type: ignore[union-attr]


# --- the process ---------------------------------------------------------------------------------


def step(kind: str, name: str, rank: int, world: int) -> list[Tensor]:
    """Gradients of the second of two steps."""
    images, targets = (part.chunk(world)[rank] for part in data())
    part = slice(rank * 8 // world, (rank + 1) * 8 // world)
    model: nn.Module = network_for(name)
    if kind.startswith("late "):
        criterion = CRITERIA[name](model, part)
        model = KINDS[kind.removeprefix("late ")](model)
    else:
        model = KINDS[kind](model)
        criterion = CRITERIA[name](model, part)
    for _ in range(2):
        model.zero_grad()
        criterion(model(images), targets).backward()
    return gradients(kind, model)


def main(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
        timeout=timedelta(seconds=120),
    )  # fmt: skip
    right, refused = {}, {}
    for kind, name in RIGHT:
        right[kind, name] = step(kind, name, rank, world)
    for kind, name in REFUSED:
        try:
            step(kind, name, rank, world)
        except Exception as error:
            refused[kind, name] = f"{type(error).__name__}: {error}"
        else:
            refused[kind, name] = "nothing"
    if rank == 0:
        torch.save((right, refused), f"{folder}/found.pt")
    torch.distributed.barrier()
    # Taking gloo down may wait, with the interpreter's lock, for a thread that waits for the lock.
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
