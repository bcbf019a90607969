"""Figures of a run: the curves of the paper, overlays of maps, before and after."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from camkernels import viz
from camkernels.viz.files import png
from camtrain import files

# Okabe and Ito: told apart with every common colour blindness.
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#6E6E6E"
COLOURS = (BLUE, VERMILION, "#009E73", "#CC79A7")
Panels = tuple[tuple[str, str, str], ...]
PANELS: Panels = (
    ("accuracy", "accuracy", "Accuracy"),
    ("entropy", "ce (nats)", "CAM entropy, live maps"),
    ("area", "ca (pixels of the map²)", "CAM ellipsoidal area, live maps"),
    ("dispersion", "cd", "CAM dispersion, live maps"),
)
CONSISTENCY_PANELS: Panels = (
    ("accuracy", "accuracy", "Accuracy"),
    ("consistency", "mean SSIM", "Consistency of the maps"),
    ("sparsity", "mean norm", "Norm of the maps"),
    ("uniform", "share", "Nearly uniform maps"),
)
GRADIENT_PANELS: Panels = (
    ("accuracy", "accuracy", "Accuracy"),
    ("cross_entropy", "nats", "Cross-entropy"),
    ("gradient_error", "error", "Error of the input gradient (training)"),
    ("gradient_norm", "2-norm", "Norm of the input gradient (training)"),
)
COMBINED_PANELS: Panels = (
    ("accuracy", "accuracy", "Accuracy"),
    ("entropy", "ce (nats)", "CAM entropy, live maps"),
    ("consistency", "mean SSIM", "Consistency of the maps"),
    ("gradient_error", "error", "Error of the input gradient (training)"),
)


def save(figure: Figure, path: Path, dpi: int = 150) -> None:
    """Write a figure as PNG in one step."""
    files.write_bytes(path, png(figure, dpi))


def curves(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    path: Path,
    title: str,
    panels: Panels = PANELS,
) -> None:
    """Figures over the training steps in four panels; by default accuracy, ce, ca and cd, as
    Figs. 1 and 2 of the CAM entropy paper.

    One run: training in blue, test in vermilion. Several: a colour each, training dashed.
    """
    figure = Figure(figsize=(9, 6.2), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    for axis, (name, label, heading) in zip(axes.flat, panels, strict=True):
        for number, (run, rows) in enumerate(runs.items()):
            for split in ("train", "test"):
                points = [(r["step"], r.get(f"{split}/{name}", math.nan)) for r in rows]
                single = len(runs) == 1
                axis.plot(
                    *zip(*points, strict=True),
                    label=("training" if split == "train" else "test")
                    if single
                    else f"{run}, {'training' if split == 'train' else 'test'}",
                    color=COLOURS[split == "test"] if single else COLOURS[number % len(COLOURS)],
                    linestyle="--" if split == "train" and not single else "-",
                    marker="o" if split == "test" else None,
                    markersize=3.5,
                    linewidth=1.6,
                )
        axis.set_title(heading, fontsize=10.5)
        axis.set_ylabel(label)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        if name not in ("accuracy", "consistency"):
            axis.set_ylim(bottom=0)
    for axis in axes[1]:
        axis.set_xlabel("training step")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title, fontsize=12)
    save(figure, path)


def distribution(scores: Mapping[str, Tensor], path: Path, title: str, label: str) -> None:
    """Histograms of scores (N,) over the same bins, with mean and standard deviation of each.

    As Fig. 2 of the consistency paper. Scores that are not finite are left out.
    """
    finite = {name: values[values.isfinite()].cpu().numpy() for name, values in scores.items()}
    low = min((float(values.min()) for values in finite.values() if len(values)), default=0.0)
    bins = np.linspace(min(low, 0.0), 1.0, 41).tolist()
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    for (name, values), colour in zip(finite.items(), (VERMILION, GREY), strict=False):
        text = f"mean {values.mean():.3f}, sd {values.std():.3f}" if len(values) else "no score"
        axis.hist(values, bins, alpha=0.55, color=colour, label=f"{name}: {text}")
        if len(values):
            axis.axvline(float(values.mean()), color=colour, linewidth=1.4, linestyle="--")
    axis.set_xlabel(label)
    axis.set_ylabel("test pictures")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    axis.set_title(title, fontsize=11)
    save(figure, path)


def before_and_after(
    images: Tensor,
    boxes: Tensor | None,
    columns: Mapping[str, Tensor],
    captions: Mapping[str, Sequence[str]],
    rows: Sequence[str],
    path: Path,
    title: str,
) -> None:
    """Rows of pictures; columns: the picture, then the map of each run over it.

    A map is divided by its maximum, not stretched from its minimum: stretching would make a nearly
    flat map look decided.

    Args:
        images: (N, 3, H, W) uint8. boxes: (N, 4) or None.
        columns: name of the run to maps (N, h, w), not negative.
        captions: name of the run to one line under each map.
        rows: a label beside each picture.
        path: where the PNG goes. title: above all.
    """
    sheet = viz.map_sheet(
        images,
        columns,
        names=rows,
        captions=captions,
        true_boxes=boxes,
        title=title,
        scale="max",
        grey=True,
        alpha=0.75,
    )
    save(sheet, path)
