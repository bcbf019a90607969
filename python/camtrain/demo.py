"""What CAM entropy in the loss changes: two runs on digits that differ in beta alone."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from camtrain import figures, files
from camtrain.config import FitConfig, resolve
from camtrain.data.module import CamtrainData
from camtrain.examples import describe_example
from camtrain.fit import Run, fit

BETA, EPOCHS = 0.1, 10

# label, column of metrics.csv, format, what is better: +1 more, -1 less, 0 neither
_LINES: tuple[tuple[str, str, str, int], ...] = (
    ("accuracy", "test/accuracy", "{:.1%}", 1),
    ("ce, entropy (nats)", "test/entropy", "{:.3f}", -1),
    ("ca, ellipsoidal area (pixels²)", "test/area", "{:.3f}", -1),
    ("cd, dispersion", "test/dispersion", "{:.3f}", 1),
    ("dead maps", "test/dead", "{:.2%}", -1),
    ("maximum inside the box", "test/pointing", "{:.1%}", 1),
    ("energy inside the box", "test/energy", "{:.1%}", 1),
    ("training time per epoch (s)", "seconds", "{:.1f}", 0),
)


def demo(
    folder: Path,
    *,
    beta: float | None = None,
    epochs: int | None = None,
    seed: int = 0,
    limit_train: int | None = None,
    limit_test: int | None = None,
    progress: bool | None = None,
) -> list[dict[str, Any]]:
    """Train with beta = 0 and with beta > 0, print the table, write it and the figures.

    ``folder`` gets ``table.csv``, ``before_after.png``, ``curves.png`` and one run folder for each
    value of beta. An earlier demo there is replaced.

    Returns:
        the rows of the table.
    """
    began = time.perf_counter()
    chosen = BETA if beta is None else beta
    for name in ("beta0", "beta"):
        shutil.rmtree(folder / name, ignore_errors=True)
    base: dict[str, Any] = {"seed": seed, "epochs": EPOCHS if epochs is None else epochs}
    base |= {"limit_train": limit_train, "limit_test": limit_test}
    entropy = resolve({**base, "beta": chosen, "out": str(folder / "beta")})
    baseline = dataclasses.replace(entropy, recipe="baseline", beta=0.0, out=str(folder / "beta0"))
    print(_introduction(entropy), flush=True)
    data = CamtrainData(entropy)
    runs = []
    for config in (baseline, entropy):
        print(f"\nbeta = {config.beta:g}", flush=True)
        runs.append(fit(config, data=data, progress=progress))
    rows = table(runs)
    files.write_csv(folder / "table.csv", rows)
    _figures(folder, runs, data)
    print("\n" + "\n".join(printed(rows, runs)))
    print(
        f"\nfigure: {folder / 'before_after.png'}   curves: {folder / 'curves.png'}   "
        f"table: {folder / 'table.csv'}\n{time.perf_counter() - began:.0f} s in all"
    )
    return rows


def _introduction(config: FitConfig) -> str:
    return (
        "Handwritten digits among clutter, a small residual network, two runs from the same seed:\n"
        "    loss = cross-entropy + beta x entropy of the Grad-CAM map of the true class\n"
        f"{config.epochs} epochs each, the first {config.warmup_epochs} without the CAM entropy: a "
        "network that has learnt nothing\nyet would put out its maps. Maps are taken at layer3 "
        "(8 x 8); means of ce, ca and cd and\nthe box scores are over live maps."
    )


def seconds_per_epoch(rows: Sequence[dict[str, Any]]) -> float:
    """Median, so that the first epoch and a busy machine count less."""
    times = sorted(row["train_seconds"] for row in rows)
    return float(times[len(times) // 2])


def table(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row per figure, a column per run; test data, last epoch."""
    rows = []
    for label, column, _, better in _LINES:
        row: dict[str, Any] = {"figure": label}
        for run in runs:
            last = {**run.rows[-1], "seconds": seconds_per_epoch(run.rows)}
            row[f"beta={run.config.beta:g}"] = last.get(column, float("nan"))
        before, after = list(row.values())[1:]
        row["better"] = _verdict(before, after, better)
        rows.append(row)
    return rows


def _verdict(before: float, after: float, better: int) -> str:
    if better == 0:
        return ""
    if before == after:
        return "same"
    return "yes" if (after - before) * better > 0 else "NO"


def printed(rows: Sequence[dict[str, Any]], runs: Sequence[Run]) -> list[str]:
    """The table as text, and which kernels ran."""
    names = [f"beta = {run.config.beta:g}" for run in runs]
    lines = [f"{'test data, last epoch':34}{names[0]:>12}{names[1]:>14}   better with CAM entropy?"]
    lines.append("-" * len(lines[0]))
    for row, (_, _, form, _) in zip(rows, _LINES, strict=True):
        label, before, after, verdict = row.values()
        lines.append(f"{label:34}{form.format(before):>12}{form.format(after):>14}   {verdict}")
    lines.append("")
    worse = [row["figure"] for row in rows if row["better"] == "NO"]
    if worse:
        lines.append(f"Not better: {', '.join(worse)}.")
    else:
        lines.append("Nothing got worse.")
    run = runs[-1]
    lines.append(f"backend: {run.backend}; channel weights by {run.head}")
    return lines


def _figures(folder: Path, runs: Sequence[Run], data: CamtrainData, count: int = 6) -> None:
    names = [f"β = {run.config.beta:g}" for run in runs]
    first = runs[0].examples
    shown = range(min(count, len(first.targets)))
    figures.before_and_after(
        first.images[: len(shown)],
        None if first.boxes is None else first.boxes[: len(shown)],
        {f"map, {n}": run.examples.maps[: len(shown)] for n, run in zip(names, runs, strict=True)},
        {
            f"map, {n}": [describe_example(run.examples, i, data.classes) for i in shown]
            for n, run in zip(names, runs, strict=True)
        },
        [f"true class {data.classes[int(t)]}" for t in first.targets[: len(shown)]],
        folder / "before_after.png",
        "Grad-CAM of the true class without and with CAM entropy",
    )
    figures.curves(
        {n: run.rows for n, run in zip(names, runs, strict=True)},
        folder / "curves.png",
        "Training without and with CAM entropy",
    )
