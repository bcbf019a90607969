"""Tables, figures and the report of ``camtrain evaluate``."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from camkernels import viz
from camtrain import files
from camtrain.data.whole import SEVERAL, SINGLE
from camtrain.errors import CamtrainError

if TYPE_CHECKING:
    from camtrain.scoring import Options, Scores

# Column of the scores, its title, by what it is multiplied, and what is good.
COLUMNS: tuple[tuple[str, str, float, str], ...] = (
    ("drop", "AD %", 1, "less"),
    ("increase", "AI %", 1, "more"),
    ("gain", "AG %", 1, "more"),
    ("removal", "top-25 % removal", 1, "less"),
    ("insertion", "insertion", 1, "more"),
    ("deletion", "deletion", 1, "less"),
    ("iou", "IoU %", 100, "more"),
    ("pointing", "pointing %", 100, "more"),
    ("energy", "energy %", 100, "more"),
    ("entropy", "ce", 1, ""),
    ("area", "ca", 1, ""),
    ("dispersion", "cd", 1, ""),
    ("dead", "dead maps %", 100, "less"),
)
MEANINGS = (
    "AD, AI, AG: average drop, increase and gain of the softmax score where the picture is "
    "multiplied by its map. Top-25 % removal: change of the score without the quarter of pixels "
    "that the map ranks highest. Insertion, deletion: area under the score as pixels are revealed "
    "in a blurred picture, or removed, in the order of the map. IoU: of the box around the largest "
    "part above 15 % of the map's maximum with the best true one of the class. Pointing: the "
    "maximum lies in a box of the class. Energy: share of the map in the boxes of the class. "
    "MaxBoxAccV2: over pictures with one object. ce, ca, cd: entropy, area in pixels of the map, "
    "and dispersion, over maps that are not dead. A dead map, all zero, counts as a miss."
)


def check_writable(out: Path) -> None:
    """Make the folder.

    Raises:
        CamtrainError: it cannot be written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise CamtrainError(f"out: cannot write to {out}: {error}") from error


def table(found: Sequence[Scores]) -> list[dict[str, Any]]:
    """A row per run, method and group of pictures: all, and those with one and several objects
    where there are both. Means over finite values; None where there is none."""
    rows = []
    for scores in found:
        groups = {row["group"] for row in scores.rows}
        shown = [None, SINGLE, SEVERAL] if len(groups) > 1 else [None]
        for group in shown:
            chosen = [row for row in scores.rows if group in (None, row["group"])]
            if not chosen:
                continue
            row: dict[str, Any] = {
                "run": scores.run,
                "method": scores.method,
                "pictures": group or "all",
                "count": len(chosen),
                "accuracy %": 100 * _mean([r["true"] == r["predicted"] for r in chosen]),
            }
            for name, title, factor, _ in COLUMNS:
                if name not in chosen[0]:
                    continue  # not asked for
                row[title] = factor * _mean([r[name] for r in chosen])
            only = group in (None, SINGLE) and scores.boxes.update_called
            row["MaxBoxAccV2 %"] = 100 * scores.max_box_acc() if only else math.nan
            rows.append({k: _plain(v) for k, v in row.items()})
    return rows


def _mean(values: Sequence[float]) -> float:
    finite = [float(value) for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(
    out: Path,
    found: Sequence[Scores],
    examples: dict[str, Any],
    options: Options,
    damaged: Sequence[str],
) -> list[dict[str, Any]]:
    """Write everything; the rows of the table.

    Raises:
        DiskFullError: no room; what was written before is whole.
    """
    rows = table(found)
    several = len({scores.run for scores in found}) > 1
    try:
        files.write_csv(out / "scores.csv", [row for scores in found for row in scores.rows])
        files.write_csv(out / "table.csv", rows)
        content = {"options": vars(options), "damaged": list(damaged), "rows": rows}
        files.write_json(out / "table.json", content)
        files.write_text(out / "table.md", markdown(rows))
        curves = viz.curve_figure(_panels(found, several), spread="quartiles")
        viz.save(curves, out / "curves.png")
        sheet = _sheet(examples)
        viz.save(sheet, out / "examples.png")
        asked = {name: value for name, value in vars(options).items() if value is not None}
        report = viz.Report("Explanations, scored", asked)
        report.add_table(rows, "Means over test pictures")
        report.add_text(MEANINGS)
        report.add_figure(curves, "Insertion and deletion")
        report.add_figure(sheet, "Maps of test pictures, with the boxes of the class")
        if damaged:
            report.add_text(f"{len(damaged)} damaged files left out: {'; '.join(damaged[:5])}")
        report.write(out / "report.html")
    except OSError as error:
        if files.is_disk_full(error):
            raise files.DiskFullError(f"disk full: {error}") from error
        raise CamtrainError(f"out: cannot write to {out}: {error}") from error
    return rows


def _panels(found: Sequence[Scores], several: bool) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    panels: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for name in ("insertion", "deletion"):
        panels[name] = {}
        for scores in found:
            parts = scores.curves[name]
            label = f"{scores.run} {scores.method}" if several else scores.method
            panels[name][label] = (parts[0][0], torch.cat([values for _, values in parts]))
    return panels


def _sheet(examples: dict[str, Any]) -> Any:
    by_run = {run: maps for run, maps in examples["maps"].items() if maps}
    maps = next(iter(by_run.values())) if len(by_run) == 1 else by_run
    return viz.map_sheet(
        examples["images"], maps, names=examples["names"], true_boxes=examples["boxes"]
    )


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table; arrows say which way is better."""
    arrows = {title: {"less": " ↓", "more": " ↑"}.get(good, "") for _, title, _, good in COLUMNS}
    arrows |= {"MaxBoxAccV2 %": " ↑", "accuracy %": " ↑"}
    names = list(rows[0])
    lines = [
        "| " + " | ".join(name + arrows.get(name, "") for name in names) + " |",
        "|" + "|".join("---" if isinstance(rows[0][n], str) else "---:" for n in names) + "|",
    ]
    for row in rows:
        cells = []
        for name in names:
            value = row[name]
            if isinstance(value, float):
                cells.append(
                    f"{value:.1f}" if "%" in name and "removal" not in name else f"{value:.3f}"
                )
            else:
                cells.append("-" if value is None else str(value))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
