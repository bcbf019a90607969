"""The largest batch that fits into a memory, by prediction: ``python -m benchmarks.largest_batch``.

A step is run on the meta device and its allocations are counted (``camkernels/engine/ledger.py``),
at two batch sizes; between and beyond them the peak is linear in the batch. What is counted: the
parameters, a momentum buffer as large, and the peak of a step, in which the gradients are. What is
not: cuDNN's workspaces, the CUDA context, fragmentation.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import camkernels as ck
from benchmarks import loops, results
from benchmarks.members import _steps
from benchmarks.members.step_interpretable import WEIGHT
from camkernels.engine import predict_peak

BUDGETS = (4, 8, 11, 24)  # GB
_PROBES = (8, 24)
Loop = Callable[[Tensor, Tensor], Tensor]


def _sides(precision: Any) -> dict[str, Callable[[nn.Module], Loop]]:
    def engine(memory: str, regularised: bool) -> Callable[[nn.Module], Loop]:
        def make(model: nn.Module) -> Loop:
            model = ck.swap_in(model, engine=True, memory=memory)
            criterion: Any = nn.CrossEntropyLoss()
            if regularised:
                criterion = ck.InterpretableGradientLoss(model, "cosine", WEIGHT)
            return lambda images, targets: criterion(model(images), targets)

        return make

    return {
        "cross-entropy, eager": lambda m: loops.plain(m)[0],
        "cross-entropy, engine fast": engine("fast", False),
        "cross-entropy, engine lean": engine("lean", False),
        "interpretable, eager": lambda m: loops.interpretable(m, WEIGHT, precision)[0],
        "interpretable, engine fast": engine("fast", True),
        "interpretable, engine lean": engine("lean", True),
        "interpretable, engine lean-bf16": engine("lean-bf16", True),
    }


def peaks(model: nn.Module, size: int, dtype: torch.dtype | None, device: str) -> dict[str, Any]:
    """Per side: bytes at batch 0 and per sample."""

    def precision() -> Any:
        return nullcontext() if dtype is None else torch.autocast("cpu", dtype)

    found: dict[str, Any] = {}
    for name, make in _sides(precision).items():
        mine = copy.deepcopy(model)
        loop = make(mine)
        points = [_peak(mine, loop, batch, size, precision, device) for batch in _PROBES]
        slope = (points[1] - points[0]) / (_PROBES[1] - _PROBES[0])
        found[name] = (points[0] - slope * _PROBES[0], slope)
    return found


def _peak(model: nn.Module, loop: Loop, batch: int, size: int, precision: Any, device: str) -> int:
    images = torch.empty(batch, 3, size, size, device="meta")
    targets = torch.zeros(batch, dtype=torch.long, device="meta")

    def step() -> None:
        with precision():
            loss = loop(images, targets)
        loss.backward()
        for p in model.parameters():
            p.grad = None

    return predict_peak(step, device)


def table(name: str, size: int) -> str:
    """Markdown."""
    with torch.device("meta"):
        model = _steps.resnet(name)
    fixed = 2 * sum(p.numel() * p.itemsize for p in model.parameters())
    heads = " | ".join(f"{gb} GB" for gb in BUDGETS)
    rows = [
        f"Largest batch of {name} at {size} x {size}, float32, within a memory, by prediction (not "
        f"measured on a GPU): `python -m benchmarks.largest_batch`, torch {torch.__version__}. "
        "Counted: parameters, a momentum buffer, the peak of a step with its gradients; not "
        "cuDNN's workspaces, the CUDA context, fragmentation.",
        "",
        f"| step | MiB at batch 0 | MiB per sample | {heads} |",
        "|---|---|---|" + "---|" * len(BUDGETS),
    ]
    for side, (constant, slope) in peaks(model, size, None, "cuda").items():
        most = [int((gb * 1e9 - fixed - constant) // slope) for gb in BUDGETS]
        cells = " | ".join(str(max(b, 0)) for b in most)
        rows.append(
            f"| {side} | {(fixed + constant) / 2**20:.0f} | {slope / 2**20:.1f} | {cells} |"
        )
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet50", choices=["resnet18", "resnet50"])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--output", type=Path, default=results.FOLDER)
    arguments = parser.parse_args()
    text = table(arguments.model, arguments.size)
    path = arguments.output / f"largest_batch_{arguments.model}.md"
    path.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
