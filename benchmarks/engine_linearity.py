"""Time and memory of a step against batch and pixels: ``python -m benchmarks.engine_linearity``.

ResNet-50, float32, NCHW: plain cross-entropy, and the interpretable-gradient step of the engine.
Writes a CSV with the least-squares exponents of time, and a PNG. Times are medians of runs in turn;
peaks are predictions of the ledger, which ``tests/engine/test_engine_report.py`` holds against
measured ones.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import camkernels as ck
from benchmarks import environment, results
from benchmarks.members import _steps
from camkernels.engine import predict_peak

BATCHES, AT_SIZE = (2, 4, 8, 16), 128
SIZES, AT_BATCH = (64, 96, 128, 192), 4
SIDES = ("plain", "fast", "lean")


def step(side: str, batch: int, size: int, device: str) -> Callable[[], None]:
    with torch.device(device):
        model = _steps.network("resnet50")
        images = torch.zeros(batch, 3, size, size)
        targets = torch.zeros(batch, dtype=torch.long)
    if device == "cpu":
        images.normal_()
    criterion: Any = nn.CrossEntropyLoss()
    if side != "plain":
        model = ck.swap_in(model, engine=True, memory=side)
        criterion = ck.InterpretableGradientLoss(model)

    def run() -> None:
        criterion(model(images), targets).backward()
        for p in model.parameters():
            p.grad = None

    return run


def measure(batch: int, size: int, rounds: int) -> dict[str, tuple[float, int]]:
    """Per side: seconds and bytes."""
    steps = {side: step(side, batch, size, "cpu") for side in SIDES}
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for run in steps.values():
        run()
    for _ in range(rounds):
        for side, run in steps.items():
            begun = time.perf_counter()
            run()
            times[side].append(time.perf_counter() - begun)
    peaks = {side: predict_peak(step(side, batch, size, "meta")) for side in SIDES}
    return {side: (statistics.median(times[side]), peaks[side]) for side in SIDES}


def exponent(xs: list[float], ys: list[float]) -> float:
    """Of the power law through the points."""
    a, b = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mean_a, mean_b = statistics.mean(a), statistics.mean(b)
    spread = sum((x - mean_a) ** 2 for x in a)
    return sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True)) / spread


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6), constrained_layout=True)
    for column, axis in enumerate(("batch", "pixels")):
        for row, (key, label) in enumerate((("seconds", "time, s"), ("mib", "peak, MiB"))):
            for side in SIDES:
                mine = [r for r in rows if r["axis"] == axis and r["side"] == side]
                xs, ys = [r[axis] for r in mine], [float(r[key]) for r in mine]
                axes[row][column].plot(xs, ys, marker="o", label=side)
            axes[row][column].set(xlabel=axis, ylabel=label, xlim=(0, None), ylim=(0, None))
    axes[0][0].legend(title="ResNet-50, float32")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=results.FOLDER)
    arguments = parser.parse_args()
    folder = arguments.output / environment.host_kind("cpu")
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    points = [("batch", b, AT_SIZE) for b in BATCHES] + [("pixels", AT_BATCH, s) for s in SIZES]
    for axis, batch, size in points:
        for side, (seconds, peak) in measure(batch, size, arguments.rounds).items():
            rows.append(
                {
                    "axis": axis,
                    "side": side,
                    "batch": batch,
                    "pixels": size * size,
                    "seconds": f"{seconds:.4g}",
                    "mib": f"{peak / 2**20:.1f}",
                }
            )
            print(*rows[-1].values(), flush=True)
    with (folder / "engine_linearity.csv").open("w", newline="") as file:
        print(f"# python -m benchmarks.engine_linearity {' '.join(sys.argv[1:])}", file=file)
        for axis in ("batch", "pixels"):
            for side in SIDES:
                mine = [r for r in rows if r["axis"] == axis and r["side"] == side]
                found = exponent([r[axis] for r in mine], [float(r["seconds"]) for r in mine])
                print(f"# exponent of time against {axis}, {side}: {found:.2f}", file=file)
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, folder / "engine_linearity.png")


if __name__ == "__main__":
    main()
