"""Tables and figures of a study in the form of each paper's own."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import camkernels as ck
from camtrain import figures, picture_scores
from camtrain.config import FitConfig
from camtrain.data.whole import WholePictures
from camtrain.trained import Trained, device_of, load_run

Row = dict[str, Any]
Runs = Mapping[str, FitConfig]
CURVES, CONSISTENCY = "curves.png", "consistency.png"


@dataclass
class Forms:
    """What was made of a study."""

    tables: dict[str, list[Row]] = field(default_factory=dict)
    """Title to rows."""
    figures: dict[str, str] = field(default_factory=dict)
    """Title to the file in the study's folder."""

    def markdown(self) -> str:
        """All of it, in sections."""
        parts = []
        for title, rows in self.tables.items():
            head = list(rows[0])
            lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
            lines += [f"| {' | '.join(str(v) for v in row.values())} |" for row in rows]
            parts.append(f"## {title}\n\n" + "\n".join(lines) + "\n")
        parts += [f"## {title}\n\n![{title}]({name})\n" for title, name in self.figures.items()]
        return "\n".join(parts)


def make(folder: Path, runs: Runs, rows: Sequence[Row], limit: int | None, title: str) -> Forms:
    """The forms that a finished study has the recipes for; figures are written to ``folder``.

    Args:
        folder: of the study. runs: recipe to the finished run of the first seed, which samples,
            curves and distributions are of. rows: of the study's table, which figures over seeds
            are of. limit: at most so many pictures. title: of figures.
    """
    forms = Forms()
    means = {row["recipe"]: row for row in rows}
    if {"baseline", "entropy"} <= runs.keys():
        _entropy(folder, runs, title, forms)
    if {"baseline", "consistency"} <= runs.keys():
        _consistency(folder, runs, means, limit, title, forms)
    if {"baseline", "interpretable"} <= runs.keys():
        forms.tables[
            "A learning paradigm for interpretable gradients: recognition of maps (Grad-CAM)"
        ] = [
            {"training": name, **_figures(means[recipe], INTERPRETABLE)}
            for name, recipe in (("standard", "baseline"), ("ours", "interpretable"))
        ]
    return forms


INTERPRETABLE = {
    "accuracy %": "Acc ↑",
    "AD %": "AD ↓",
    "AG %": "AG ↑",
    "AI %": "AI ↑",
    "insertion": "Ins ↑",
    "deletion": "Del ↓",
}
STAYING = {"accuracy %": "Top-1 Acc (%)", "consistency %": "Consistency", "insertion": "IAUC"}


def _figures(row: Row, titles: Mapping[str, str]) -> Row:
    """Means with their deviations."""
    return {short: shown(row.get(name), row.get(f"{name} sd")) for name, short in titles.items()}


def shown(value: float | None, deviation: float | None = None) -> str:
    """A number, or a dash, with its deviation if it has one."""
    if value is None or math.isnan(value):
        return "-"
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else 3
    text = f"{value:.{digits}f}"
    return text if deviation is None else f"{text} ± {deviation:.{digits}f}"


# -- CAM entropy -------------------------------------------------------------------------------


def _entropy(folder: Path, runs: Runs, title: str, forms: Forms) -> None:
    """Its Table I and Figs. 1 and 2."""
    pair = {f"β = {runs[r].beta:g}": runs[r] for r in ("baseline", "entropy")}
    networks = {name: load_run(Path(c.out), device_of("auto")) for name, c in pair.items()}
    found = _sample(networks)
    columns = {name: _characteristics(network, *found[:2]) for name, network in networks.items()}
    forms.tables[
        f"A light-weight method to foster the (Grad)CAM interpretability, Table I: {found[2]}"
    ] = [
        {"": key, **{name: shown(values[key]) for name, values in columns.items()}}
        for key in next(iter(columns.values()))
    ]
    curves = {name: _metrics(Path(config.out)) for name, config in pair.items()}
    figures.curves(curves, folder / CURVES, title)
    forms.figures["A light-weight method ..., Figs. 1 and 2: accuracy, ce, ca, cd"] = CURVES


@torch.no_grad()
def _sample(networks: Mapping[str, Trained]) -> tuple[Tensor, Tensor, str]:
    """The first test picture that every network is right about (or the first): (1, 3, S, S), its
    class (1,), and what it is."""
    first = next(iter(networks.values()))
    assert first.config is not None
    data = WholePictures(first.config, 40)
    chosen = None
    for index in range(len(data)):
        item = data[index]
        if "damaged" in item:
            continue
        image, target = item["images"][None], item["targets"][None]
        right = all(
            int(network.model(network.normalise(image)).argmax()) == int(target)
            for network in networks.values()
        )
        if right or chosen is None:
            chosen = image, target, f"test picture {item['name']}, class {first.label(int(target))}"
        if right:
            break
    assert chosen is not None
    return chosen


@torch.no_grad()
def _characteristics(network: Trained, image: Tensor, target: Tensor) -> dict[str, float]:
    """Of one picture, under the names of the paper; ce by its largest value."""
    images = network.normalise(image)
    logits = network.model(images)[0]
    with ck.GradCAM(network.model, network.layer) as cam:
        maps = cam.explain(images, target.to(images.device))
    assert isinstance(maps, Tensor)
    statistics = ck.map_statistics(maps)
    largest = math.log(maps[0].numel()) if maps[0].numel() > 1 else 1.0
    return {
        "class probability": float(logits.softmax(0)[int(target)]),
        "max logit": float(logits.max()),
        "min logit": float(logits.min()),
        "max GradCAM": float(maps.max()),
        "min GradCAM": float(maps.min()),
        "ce": float(statistics.entropy) / largest,
        "ca": float(statistics.area),
        "cd": float(statistics.dispersion),
    }


def _metrics(folder: Path) -> list[Row]:
    """Rows of ``metrics.csv`` as numbers."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: float(v) if v else math.nan for k, v in row.items()} for row in rows]


# -- consistency -------------------------------------------------------------------------------


def _consistency(
    folder: Path, runs: Runs, means: Mapping[str, Row], limit: int | None, title: str, forms: Forms
) -> None:
    """Its Table 1 and Fig. 2."""
    forms.tables["Staying consistent with GradCAM, Table 1"] = [
        {
            "network": runs["baseline"].arch,
            "method": name,
            **_figures(means[recipe], STAYING),
        }
        for name, recipe in (("baseline", "baseline"), ("ours", "consistency"))
    ]
    scores = {
        name: torch.tensor(
            picture_scores.consistency(load_run(Path(runs[name].out), device_of("auto")), limit)
        )
        for name in ("consistency", "baseline")
    }
    figures.distribution(scores, folder / CONSISTENCY, title, "SSIM of the maps")
    forms.figures["Staying consistent with GradCAM, Fig. 2: SSIM of test pictures"] = CONSISTENCY
