"""``camtrain study recipes``: every recipe on one data set, over seeds, scored alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

import camkernels as ck
from camkernels import viz
from camtrain import config as configuration
from camtrain import files, paper_forms, picture_scores, scoring, scoring_report
from camtrain.config import FitConfig
from camtrain.errors import CamtrainError, DivergedError
from camtrain.fit import InterruptedRunError, fit
from camtrain.paper_forms import shown
from camtrain.study import averages
from camtrain.trained import Trained, device_of, load_run

RECIPES = ("baseline", "entropy", "consistency", "interpretable")
RESULT = "result.json"
BASE = "recipes.yaml"
METHOD = "gradcam"
# Title, and what is good: what each paper says that its recipe improves.
COLUMNS: tuple[tuple[str, str], ...] = (
    ("accuracy %", "more"),
    ("ce", "less"),
    ("ca", "less"),
    ("cd", "more"),
    ("dead maps %", "less"),
    ("consistency %", "more"),
    ("AD %", "less"),
    ("AI %", "more"),
    ("AG %", "more"),
    ("insertion", "more"),
    ("deletion", "less"),
    ("IoU %", "more"),
    ("pointing %", "more"),
    ("energy %", "more"),
    ("gradient TV", "less"),
    ("agreement with SmoothGrad", "more"),
    ("s / epoch", "less"),
    ("peak MiB", "less"),
)
MEANINGS = (
    "Means over seeds, with the standard deviation over them. Maps are Grad-CAM's of the true "
    "class, of test pictures. ce, ca, cd: entropy, area and dispersion of live maps. Consistency: "
    "SSIM of the crop of the map and the map of the crop, of the predicted class. Gradient TV: "
    "total variation of the input gradient by its L1 norm. " + scoring_report.MEANINGS
)


@dataclass
class Options:
    """Of a comparison."""

    recipes: Sequence[str] = RECIPES
    seeds: Sequence[int] = (0,)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Recipe to values of its own."""
    steps: int = 56
    """Of insertion and deletion."""
    score_limit: int | None = 200
    """Pictures that are scored, at most; accuracy is of all."""


def parse_settings(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """``recipe.key=value`` to recipe, key and value, as YAML reads it."""
    settings: dict[str, dict[str, Any]] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        recipe, dot, key = name.partition(".")
        if not equals or not dot or recipe not in RECIPES:
            raise CamtrainError(
                f"set: expected recipe.key=value, the recipe one of {', '.join(RECIPES)}, "
                f"got {text!r}"
            )
        settings.setdefault(recipe, {})[key] = yaml.safe_load(value)
    return settings


def compare(
    folder: Path,
    given: Mapping[str, Any],
    options: Options,
    *,
    overwrite: bool = False,
    progress: bool | None = None,
) -> list[dict[str, Any]]:
    """Train and score every recipe from every seed; write tables, a sheet of maps and a report.

    Each cell has a folder with ``result.json`` once it is done. What is done is skipped, and a run
    that was cut short goes on after its last finished epoch. ``cells.csv``, ``table.csv``,
    ``table.md``, ``examples.png`` and ``report.html`` are written after each cell; at the end
    ``papers.md``, ``curves.png`` and ``consistency.png``, in the form of the papers.

    Args:
        folder: of the study. given: values for all recipes.
        options: see :class:`Options`.

    Returns:
        the rows of ``table.csv``: a line per recipe.

    Raises:
        CamtrainError: a study of other settings in the folder, values that a recipe refuses, an
        interrupt, a full disk.
    """
    for name in options.recipes:
        if name not in RECIPES:
            raise CamtrainError(f"recipes: unknown {name!r}, allowed are {', '.join(RECIPES)}")
    if overwrite and (folder / BASE).is_file():
        shutil.rmtree(folder)
    cells = [(seed, recipe) for seed in dict.fromkeys(options.seeds)
             for recipe in dict.fromkeys(options.recipes)]  # fmt: skip
    configs = {cell: _config(folder, given, options, *cell) for cell in cells}
    _claim(folder, given, options)
    results: list[dict[str, Any]] = []
    for number, (seed, recipe) in enumerate(cells, 1):
        config = configs[seed, recipe]
        place = Path(config.out)
        heading = f"[{number}/{len(cells)}] {recipe}, seed {seed}"
        if (place / RESULT).is_file():
            print(f"{heading}: done before", flush=True)
            results.append(json.loads((place / RESULT).read_text()))
            continue
        print(heading, flush=True)
        try:
            results.append(_cell(config, options, progress))
        except (InterruptedRunError, files.DiskFullError) as error:
            raise type(error)(
                f"{error}\ncamtrain: study: {len(results)} of {len(cells)} cells are done and kept "
                f"in {folder}; the same command goes on"
            ) from error
        _write(folder, configs, options, results)
    rows = _write(folder, configs, options, results, forms=True)
    print("\n" + markdown(rows) + f"\nreport: {folder / 'report.html'}")
    return rows


def _config(
    folder: Path, given: Mapping[str, Any], options: Options, seed: int, recipe: str
) -> FitConfig:
    own = options.settings.get(recipe, {})
    place = str(folder / f"{recipe}-seed{seed}")
    # insertion AUC is taken with the other scores
    skipped = {"insertion_steps": 0} if recipe == "consistency" else {}
    try:
        return configuration.resolve(
            {**skipped, **given, **own, "recipe": recipe, "seed": seed, "out": place}
        )
    except CamtrainError as error:
        raise CamtrainError(
            f"{error} (in recipe {recipe!r}; --set RECIPE.KEY=VALUE is for one recipe)"
        ) from error


def _claim(folder: Path, given: Mapping[str, Any], options: Options) -> None:
    """Note the settings, or compare them with those of the study that is there."""
    asked = {**asdict(options), "given": dict(given)}
    asked = {k: v for k, v in asked.items() if k not in ("recipes", "seeds")}
    asked = json.loads(json.dumps(asked))
    path = folder / BASE
    if path.is_file():
        stored = configuration.load(path)
        if stored != asked:
            changed = [key for key in asked if stored.get(key) != asked[key]]
            raise CamtrainError(
                f"{', '.join(changed)}: the study in {folder} was begun with other values; take "
                "another --out, or --overwrite"
            )
        return
    try:
        files.write_text(path, yaml.safe_dump(asked, sort_keys=False))
    except OSError as error:
        raise CamtrainError(f"out: cannot write to {folder}: {error}") from error


def _cell(config: FitConfig, options: Options, progress: bool | None) -> dict[str, Any]:
    """Train and score one; the result, which is written last."""
    place = Path(config.out)
    cell: dict[str, Any] = {"recipe": config.recipe, "seed": config.seed}
    try:
        run = fit(config, resume=(place / "config.yaml").is_file(), progress=progress)
    except DivergedError as error:
        print(error, flush=True)
        cell["diverged"] = str(error)
    else:
        last = run.rows[-1]
        cell["s / epoch"] = float(np.median([row["train_seconds"] for row in run.rows]))
        cell["peak MiB"] = last.get("peak_cuda_mib", last["peak_rss_mib"])
        cell |= _scores(load_run(place, device_of("auto")), options)
        cell["accuracy %"] = 100 * last["test/accuracy"]  # of all test samples
    files.write_json(place / RESULT, cell)
    shutil.rmtree(place / "checkpoints", ignore_errors=True)
    return cell


def _scores(network: Trained, options: Options) -> dict[str, Any]:
    asked = scoring.Options((METHOD,), steps=options.steps, limit=options.score_limit)
    found = scoring.score_run(network, (METHOD,), asked, set(), {})
    row = scoring_report.table(found)[0]
    titles = {title for title, _ in COLUMNS}
    return {k: v for k, v in row.items() if k in titles} | picture_scores.means(
        network, options.score_limit
    )


def tabulate(options: Options, results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per recipe: means over seeds, deviations (of the population) over several; None where a
    cell lacks the figure. ``diverged`` counts cells without any."""
    rows = []
    for recipe in dict.fromkeys(options.recipes):
        mine = [result for result in results if result["recipe"] == recipe]
        if not mine:
            continue
        row: dict[str, Any] = {"recipe": recipe, "seeds": len(mine)}
        row["diverged"] = sum("diverged" in result for result in mine)
        for title, _ in COLUMNS:
            row |= averages(mine, title, f"{title} sd")
        rows.append(row)
    return rows


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table turned: a line per figure, a column per recipe."""
    arrows = {"less": "↓", "more": "↑"}
    lines = [
        "| | " + " | ".join(f"{row['recipe']}" for row in rows) + " |",
        "|---|" + "---:|" * len(rows),
        "| seeds | " + " | ".join(_seeds(row) for row in rows) + " |",
    ]
    for title, good in COLUMNS:
        cells = [shown(row.get(title), row.get(f"{title} sd")) for row in rows]
        lines.append(f"| {title} {arrows[good]} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _seeds(row: Mapping[str, Any]) -> str:
    return f"{row['seeds']} ({row['diverged']} diverged)" if row["diverged"] else str(row["seeds"])


def _write(
    folder: Path,
    configs: Mapping[tuple[int, str], FitConfig],
    options: Options,
    results: Sequence[Mapping[str, Any]],
    forms: bool = False,
) -> list[dict[str, Any]]:
    """Write what is known; with the ``forms`` of the papers, which take a while, at the end."""
    rows = tabulate(options, results)
    config = next(iter(configs.values()))
    title = (
        f"Recipes: {config.arch} on {config.data}, {config.epochs} epochs at "
        f"{config.image_size} x {config.image_size}"
    )
    files.write_csv(folder / "cells.csv", results)
    files.write_csv(folder / "table.csv", rows)
    files.write_text(folder / "table.md", f"# {title}\n\n{markdown(rows)}\n{MEANINGS}\n")
    report = viz.Report(title, {"settings": json.dumps(dict(options.settings)) or "defaults"})
    report.add_table(_turned(rows), "Means over seeds (± deviation)")
    report.add_text(MEANINGS)
    sheet = _sheet(configs, results)
    if sheet is not None:
        viz.save(sheet, folder / "examples.png")
        report.add_figure(sheet, "Grad-CAM of the true class, of the same test pictures")
    if forms:
        first = next(iter(configs))[0]
        done = [r["recipe"] for r in results if r["seed"] == first and "diverged" not in r]
        runs = {recipe: configs[first, recipe] for recipe in done}
        made = paper_forms.make(folder, runs, rows, options.score_limit, title)
        files.write_text(folder / "papers.md", f"# {title}\n\n{made.markdown()}")
        for name, table in made.tables.items():
            report.add_table(table, name)
        for name, file in made.figures.items():
            with Image.open(folder / file) as picture:
                report.add_figure(np.asarray(picture.convert("RGB")), name)
    report.add_table(list(results), "Every cell")
    report.write(folder / "report.html")
    return rows


def _turned(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"figure": f"{title} ({good} is better)"}
        | {row["recipe"]: shown(row.get(title), row.get(f"{title} sd")) for row in rows}
        for title, good in COLUMNS
    ]


def _sheet(
    configs: Mapping[tuple[int, str], FitConfig], results: Sequence[Mapping[str, Any]]
) -> Any:
    """Maps of the first test pictures by the recipes of the first seed."""
    first = next(iter(configs))[0]
    done = [r["recipe"] for r in results if r["seed"] == first and "diverged" not in r]
    if not done:
        return None
    maps, items = {}, []
    for recipe in done:
        network = load_run(Path(configs[first, recipe].out), device_of("auto"))
        if not items:
            assert network.config is not None
            data = scoring.WholePictures(network.config, 40)
            items = [item for item in (data[i] for i in range(len(data))) if "damaged" not in item]
            items = items[:6]
            images = torch.stack([item["images"] for item in items])
            targets = torch.stack([item["targets"] for item in items])
        with ck.GradCAM(network.model, network.layer) as cam:
            found = cam.explain(network.normalise(images), targets)
            maps[recipe] = found.cpu()  # type: ignore[union-attr]
    boxes = [item["boxes"] if len(item["boxes"]) else None for item in items]
    return viz.map_sheet(images, maps, names=[i["name"] for i in items], true_boxes=boxes)
