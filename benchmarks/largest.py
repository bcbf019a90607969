"""The largest batch of ResNet-50 that really trains within a memory.

    python -m benchmarks.largest --gigabytes 11 [--side NAME ...] [--output FOLDER]

Each side runs in a process of its own, on a GPU whose memory is capped
(``torch.cuda.set_per_process_memory_fraction``), with real pictures, SGD with momentum and its
step: two steps must pass, since the second one holds the optimiser's state. The cap is on PyTorch's
allocator; what CUDA itself takes beside it (a few hundred MB) is not counted, so a card of that
size has a little less. The search starts at what `camtrain plan` counted
(benchmarks/results/plan_resnet50.md), which is printed beside.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import camkernels as ck
from benchmarks import environment, loops, memory, results
from benchmarks.members._steps import Maker

PLAN = results.FOLDER / "plan_resnet50.md"
SIZE, CLASSES = 224, 1000
# The second batch to try is this much away from the first, the next one twice as much.
STRIDE = 0.06
PRECISION = 0.01


def _criterion(engine: str | None, make: Callable[[Any], Any]) -> Maker:
    def maker(model: torch.nn.Module) -> tuple[loops.Loop, Callable[[], None]]:
        if engine == "off":
            model = ck.swap_in(model)
        elif engine is not None:
            model = ck.swap_in(model, engine=True, memory=engine)
        criterion = make(model)
        return lambda images, targets: criterion(model(images), targets), criterion.close

    return maker


def _interpretable(model: Any) -> Any:
    return ck.InterpretableGradientLoss(model, "cosine", 1e-2)


def _entropy(model: Any) -> Any:
    return ck.CAMEntropyLoss(model, "layer4", beta=0.1)


# Named as in plan_resnet50.md.
SIDES: dict[str, Maker] = {
    "cross-entropy, eager": loops.plain,
    "interpretable, eager": lambda m: loops.interpretable(m, 1e-2),
    "interpretable, engine off": _criterion("off", _interpretable),
    "interpretable, engine fast": _criterion("fast", _interpretable),
    "interpretable, engine lean": _criterion("lean", _interpretable),
    "interpretable, engine lean-bf16": _criterion("lean-bf16", _interpretable),
    "CAM entropy at layer4, eager": lambda m: loops.careful(m, "layer4", 0.1),
    "CAM entropy at layer4, engine lean": _criterion("lean", _entropy),
}


def predicted(gigabytes: int, text: str | None = None) -> dict[str, int]:
    """Batches by side, of the committed table."""
    rows = [
        [cell.strip() for cell in line.strip("|\n ").split("|")]
        for line in (PLAN.read_text() if text is None else text).splitlines()
        if line.startswith("|")
    ]
    column = rows[0].index(f"{gigabytes} GB")
    found = {row[0]: re.match(r"\d+", row[column]) for row in rows[2:]}
    return {name: int(match[0]) for name, match in found.items() if match is not None}


def search(runs: Callable[[int], bool], guess: int) -> int:
    """The largest batch that runs, to a hundredth; 0 where not even one picture does.

    Args:
        runs: whether a batch does; tried few times, from ``guess`` on.
    """
    good, bad, stride = 0, 0, STRIDE
    batch = max(guess, 1)
    while not (good and bad):
        if runs(batch):
            good = batch
            batch = max(batch + 1, round(batch * (1 + stride)))
        else:
            bad = batch
            if batch == 1:
                return 0
            batch = max(1, min(batch - 1, round(batch / (1 + stride))))
        stride *= 2
    while bad - good > max(1, PRECISION * good):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if runs(middle) else (good, middle)
    return good


class Trial:
    """Training steps of one side; a batch that does not fit leaves nothing behind."""

    def __init__(self, side: str, device: str, arch: str = "resnet50", size: int = SIZE) -> None:
        from benchmarks.members import _steps

        self.device, self.size = device, size
        self.model = _steps.network(arch).to(device)
        self.loop, self.close = SIDES[side](self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)
        self.tried: dict[int, bool] = {}

    def steps(self, batch: int) -> None:
        images = torch.randn(batch, 3, self.size, self.size, device=self.device)
        targets = torch.randint(CLASSES, (batch,), device=self.device)
        for _ in range(2):
            self.optimizer.zero_grad()
            self.loop(images, targets).backward()
            self.optimizer.step()

    def runs(self, batch: int) -> bool:
        try:
            self.steps(batch)
            if self.device == "cuda":
                torch.cuda.synchronize()
            self.tried[batch] = True
        except torch.OutOfMemoryError:
            self.tried[batch] = False
        # outside of the handler: a traceback would hold the step's tensors
        self.optimizer.zero_grad()
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        print(f"  batch {batch}: {'runs' if self.tried[batch] else 'out of memory'}",
              file=sys.stderr, flush=True)  # fmt: skip
        return self.tried[batch]


def one(side: str, gigabytes: float, guess: int) -> dict[str, Any]:
    """In a process of its own: the largest batch of a side."""
    total = torch.cuda.get_device_properties("cuda").total_memory
    if gigabytes * 1e9 > total:
        raise RuntimeError(f"the GPU has {total / 1e9:.1f} GB, less than {gigabytes}")
    torch.cuda.set_per_process_memory_fraction(gigabytes * 1e9 / total)
    trial = Trial(side, "cuda")
    trial.steps(2)  # the engine plans, kernels are compiled
    largest = search(trial.runs, guess)
    return {"side": side, "largest": largest, "tried": trial.tried}


def table(gigabytes: int, found: dict[str, dict[str, Any]], counted: dict[str, int]) -> str:
    """Markdown."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    now = datetime.datetime.now(datetime.timezone.utc).date()
    rows = [
        f"Largest batch of ResNet-50, {SIZE} x {SIZE}, float32, SGD with momentum, that ran two "
        f"training steps with PyTorch's allocator capped at {gigabytes} GB: {gpu}, torch "
        f"{torch.__version__}, {now}, `python -m benchmarks.largest --gigabytes {gigabytes}`.",
        "",
        "| step | largest batch that ran | counted by `camtrain plan` |",
        "|---|---|---|",
    ]
    for side, result in found.items():
        ran = result.get("largest", result.get("error", ""))
        rows.append(f"| {side} | {ran} | {counted.get(side, '')} |")
    return "\n".join(rows) + "\n"


def _process(side: str, gigabytes: int, guess: int) -> dict[str, Any]:
    from benchmarks.runner import torchvision_path

    job = json.dumps({"side": side, "gigabytes": gigabytes, "guess": guess})
    words = [sys.executable, "-m", "benchmarks.largest", "--one", job]
    settings = memory.process_environment({}, torchvision_path())
    done = subprocess.run(words, env=settings, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        return {"error": f"failed with exit code {done.returncode}, see the log"}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.largest", description=__doc__)
    parser.add_argument("--gigabytes", type=int, default=11, choices=(8, 11, 24))
    parser.add_argument("--side", action="append", choices=list(SIDES))
    parser.add_argument("--output", type=Path, help="folder; default: that of the GPU's results")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.one is not None:
        print(json.dumps(one(**json.loads(arguments.one))))
        return 0
    if not torch.cuda.is_available():
        print("benchmarks.largest: no CUDA device is available", file=sys.stderr)
        return 2
    counted = predicted(arguments.gigabytes)
    folder = arguments.output or results.FOLDER / environment.host_kind("cuda")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"largest_{arguments.gigabytes}gb.md"
    found: dict[str, dict[str, Any]] = {}
    for side in arguments.side or SIDES:
        print(f"{side}:", file=sys.stderr, flush=True)
        found[side] = _process(side, arguments.gigabytes, counted.get(side, 32))
        path.write_text(table(arguments.gigabytes, found, counted))  # a run cut off loses one
    print(path.read_text())
    return 1 if any("error" in result for result in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
