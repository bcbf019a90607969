"""A grid of settings of the consistency recipe, trained one after the other and tabulated."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from camtrain import config as configuration
from camtrain import files
from camtrain.config import FitConfig
from camtrain.data.module import CamtrainData
from camtrain.errors import CamtrainError, DivergedError
from camtrain.fit import InterruptedRunError, Run, fit

RESULT = "result.json"
BASE = "study.yaml"
# May change when a study goes on: nothing that changes a result.
_FREE = ("workers", "accelerator", "out")
# Label, key of the result, and by what it is multiplied in the table, as in the paper.
_FIGURES = (
    ("Top-1 Acc (%)", "accuracy", 100),
    ("Consistency (%)", "consistency_mean", 100),
    ("IAUC", "insertion_auc_mean", 1),
    ("Norm", "test/sparsity", 1),
    ("All-zero maps (%)", "test/dead", 100),
    ("Uniform maps (%)", "test/uniform", 100),
)


class Setting(NamedTuple):
    """One line of the table."""

    alpha: float
    beta: float
    norm: float

    @property
    def name(self) -> str:
        """As a folder."""
        return f"alpha{self.alpha:g}_beta{self.beta:g}_p{self.norm:g}"


class Grid(NamedTuple):
    """All combinations are trained, each from all seeds."""

    alphas: Sequence[float]
    betas: Sequence[float]
    norms: Sequence[float]
    seeds: Sequence[int]

    def settings(self) -> list[Setting]:
        """Once each; with beta = 0 the norm is not used, so its first value stands for all."""
        found = {
            Setting(alpha, beta, norm if beta else self.norms[0]): None
            for alpha, beta, norm in itertools.product(self.alphas, self.betas, self.norms)
        }
        return list(found)

    def runs(self) -> Iterator[tuple[Setting, int]]:
        """Settings with seeds; all settings of a seed before the next seed."""
        for seed in dict.fromkeys(self.seeds):
            for setting in self.settings():
                yield setting, seed


def study(
    folder: Path,
    base: FitConfig,
    grid: Grid,
    *,
    overwrite: bool = False,
    progress: bool | None = None,
) -> list[dict[str, Any]]:
    """Train every setting of ``grid`` by ``base`` and write ``table.csv`` and ``table.md``.

    Each run has a folder, which holds ``result.json`` once it is done; then its checkpoint is
    removed (``model.pt`` stays). What is done is skipped, a run that was cut short goes on after
    its last finished epoch, and the tables are written after each run.

    Returns:
        the rows of ``table.csv``: a line per setting, means over seeds.

    Raises:
        CamtrainError: ``folder`` holds a study of another configuration; an interrupt; a full disk.
    """
    if overwrite and (folder / BASE).is_file():
        shutil.rmtree(folder)
    _claim(folder, base)
    runs = list(grid.runs())
    results: list[dict[str, Any]] = []
    data: dict[int, CamtrainData] = {}
    for number, (setting, seed) in enumerate(runs, 1):
        place = folder / f"{setting.name}_seed{seed}"
        heading = f"[{number}/{len(runs)}] {_described(setting)}, seed {seed}"
        if (place / RESULT).is_file():
            print(f"{heading}: done before", flush=True)
            results.append(_read(place / RESULT))
            continue
        print(heading, flush=True)
        try:
            results.append(_train(base, setting, seed, place, data, progress))
            rows = tabulate(grid, results)
            _write_tables(folder, base, rows)
        except (InterruptedRunError, files.DiskFullError) as error:
            raise type(error)(
                f"{error}\ncamtrain: study: {len(results)} of {len(runs)} runs are done and kept "
                f"in {folder}; the same command of camtrain study goes on"
            ) from error
    rows = tabulate(grid, results)
    _write_tables(folder, base, rows)
    print("\n" + markdown(rows) + f"\ntable: {folder / 'table.csv'}, {folder / 'table.md'}")
    return rows


def _claim(folder: Path, base: FitConfig) -> None:
    """Note the configuration, or compare it with that of the study that is there."""
    path = folder / BASE
    if not path.is_file():
        try:
            files.write_text(path, configuration.dump(base))
        except OSError as error:
            raise CamtrainError(f"out: cannot write to {folder}: {error}") from error
        return
    stored = configuration.resolve({}, configuration.load(path))
    for name in configuration.fields():
        before, now = getattr(stored, name), getattr(base, name)
        if name not in _FREE and before != now:
            raise CamtrainError(
                f"{name}: the study in {folder} was begun with {before!r}, got {now!r}; take "
                "another --out, or --overwrite"
            )


def _train(
    base: FitConfig,
    setting: Setting,
    seed: int,
    place: Path,
    data: dict[int, CamtrainData],
    progress: bool | None,
) -> dict[str, Any]:
    """One run to its end; the result, which is written last."""
    config = dataclasses.replace(
        base,
        alpha=setting.alpha,
        beta=setting.beta,
        norm=setting.norm,
        seed=seed,
        out=str(place),
    )
    configuration.validate(config)
    if seed not in data:
        data.clear()  # one seed at a time is held
        data[seed] = CamtrainData(config)
    begun = (place / "config.yaml").is_file()
    try:
        run = fit(config, resume=begun, data=data[seed], progress=progress)
        result = _result(run, setting, seed)
    except DivergedError as error:
        print(error, flush=True)
        result = {**setting._asdict(), "seed": seed, "diverged": str(error)}
    files.write_json(place / RESULT, result)
    shutil.rmtree(place / "checkpoints", ignore_errors=True)
    return result


def _result(run: Run, setting: Setting, seed: int) -> dict[str, Any]:
    kept = {name: value for name, value in run.summary.items() if name != "damaged"}
    seconds = float(np.median([row["train_seconds"] for row in run.rows]))
    return {
        **setting._asdict(),
        "seed": seed,
        "accuracy": run.summary["test_accuracy"],
        **kept,
        "seconds_per_epoch": seconds,
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        Setting(content["alpha"], content["beta"], content["norm"])
    except (ValueError, KeyError, TypeError) as error:
        raise CamtrainError(
            f"study: {path} is no result of a run ({error}); remove it to train again"
        ) from error
    return dict(content)


def tabulate(grid: Grid, results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per setting that has a result: means over seeds, and deviations over several.

    A figure that a run lacks (it diverged, or no score was finite) makes that of its setting empty;
    ``diverged`` counts such runs.
    """
    rows = []
    for setting in grid.settings():
        mine = [r for r in results if (r["alpha"], r["beta"], r["norm"]) == tuple(setting)]
        if not mine:
            continue
        row: dict[str, Any] = {**setting._asdict(), "seeds": len(mine)}
        row["diverged"] = sum("diverged" in result for result in mine)
        for _, key, _ in _FIGURES:
            row |= averages(mine, key, f"{key}/sd")
        rows.append(row)
    return rows


def averages(
    results: Sequence[Mapping[str, Any]], key: str, deviation: str
) -> dict[str, float | None]:
    """Mean over results, and the deviation (of the population) over several; None where one lacks
    the figure."""
    values = [result[key] for result in results if result.get(key) is not None]
    complete = len(values) == len(results)
    found = {key: float(np.mean(values)) if complete else None}
    if len(results) > 1:
        found[deviation] = float(np.std(values)) if complete else None
    return found


def _described(setting: Setting) -> str:
    text = f"alpha = {setting.alpha:g}, beta = {setting.beta:g}"
    return text + (f", p = {setting.norm:g}" if setting.beta else "")


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table as Markdown, like Table 2 of the paper; beside a mean its deviation over seeds."""
    several = any(row["seeds"] > 1 for row in rows)
    titles = ["alpha", "beta", "p", *["seeds"] * several, *(label for label, _, _ in _FIGURES)]
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for row in rows:
        cells = [
            f"{row['alpha']:g}",
            f"{row['beta']:g}",
            f"{row['norm']:g}" if row["beta"] else "-",
        ]
        cells += [str(row["seeds"])] * several
        cells += [_cell(row.get(key), row.get(f"{key}/sd"), scale) for _, key, scale in _FIGURES]
        if row["diverged"]:
            cells[-len(_FIGURES)] = f"{row['diverged']} diverged"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(value: float | None, deviation: float | None, scale: int) -> str:
    if value is None:
        return "-"
    form = "{:.2f}" if scale == 100 else "{:.4g}"
    text = form.format(value * scale)
    return text if deviation is None else f"{text} ± {form.format(deviation * scale)}"


def _distance(base: FitConfig) -> str:
    """As the title tells it, where it is not SSIM."""
    return "" if base.distance == "ssim" else f", {base.distance}, T = {base.temperature:g}"


def _write_tables(folder: Path, base: FitConfig, rows: Sequence[Mapping[str, Any]]) -> None:
    title = (
        f"# Consistency recipe: {base.arch} on {base.data}, {base.epochs} epochs at "
        f"{base.image_size} x {base.image_size}{_distance(base)}\n\n"
    )
    files.write_csv(folder / "table.csv", rows)
    files.write_text(folder / "table.md", title + markdown(rows))
