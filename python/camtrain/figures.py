"""Figures of a run: the curves of the paper, overlays of maps, before and after."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor
from torch.nn import functional as F

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


def save(figure: Figure, path: Path, dpi: int = 150) -> None:
    """Write a figure as PNG in one step."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi, format="png", facecolor="white")
    files.write_bytes(path, buffer.getvalue())


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


def picture(image: Tensor) -> np.ndarray:
    """(3, H, W) uint8 to (H, W, 3) for matplotlib."""
    return image.permute(1, 2, 0).cpu().numpy()


def overlay(image: Tensor, cam: Tensor) -> np.ndarray:
    """The map over the picture, in viridis, where it is strong more of the map.

    The map is divided by its maximum, not stretched from its minimum: stretching would make a
    nearly flat map look decided.

    Args:
        image: (3, H, W) uint8. cam: (h, w), not negative.

    Returns:
        (H, W, 3) in 0..1.
    """
    size = image.shape[-2:]
    large = F.interpolate(cam[None, None].float(), size, mode="bilinear", align_corners=False)[0, 0]
    peak = float(large.max())
    strength = (large / peak if peak > 0 else large * 0).cpu().numpy()
    colour = mpl.colormaps["viridis"](strength)[..., :3]
    grey = picture(image).mean(-1, keepdims=True) / 255
    share = 0.75
    return np.clip((1 - share) * grey + share * colour, 0, 1)


def _bare(axis: Any) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)


def _box(axis: Any, box: Tensor | None, colour: str = "white") -> None:
    if box is None:
        return
    top, left, height, width = box.tolist()
    for ink, line in (("black", 2.6), (colour, 1.3)):
        axis.add_patch(
            Rectangle((left - 0.5, top - 0.5), width, height, fill=False, ec=ink, lw=line)
        )


def _colour_bar(figure: Figure, axes: Any) -> None:
    scale = mpl.cm.ScalarMappable(mpl.colors.Normalize(0, 1), "viridis")
    bar = figure.colorbar(scale, ax=axes, shrink=0.35, aspect=16, pad=0.015)
    bar.set_label("map / its maximum", fontsize=9)
    bar.ax.tick_params(labelsize=8)


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

    Args:
        images: (N, 3, H, W) uint8. boxes: (N, 4) or None.
        columns: name of the run to maps (N, h, w).
        captions: name of the run to one line under each map.
        rows: one line under each picture.
        path: where the PNG goes. title: above all.
    """
    count, width = len(images), 1 + len(columns)
    figure = Figure(figsize=(2.05 * width + 0.9, 2.2 * count + 0.7), layout="constrained")
    axes = figure.subplots(count, width, squeeze=False)
    for i in range(count):
        box = None if boxes is None else boxes[i]
        axes[i, 0].imshow(picture(images[i]))
        axes[i, 0].set_xlabel(rows[i], fontsize=8.5)
        for j, (name, maps) in enumerate(columns.items(), 1):
            axes[i, j].imshow(overlay(images[i], maps[i]))
            axes[i, j].set_xlabel(captions[name][i], fontsize=8.5)
        for axis in axes[i]:
            _box(axis, box)
            _bare(axis)
    for axis, name in zip(axes[0], ("input", *columns), strict=True):
        axis.set_title(name, fontsize=11)
    _colour_bar(figure, axes)
    figure.suptitle(title, fontsize=11.5)
    save(figure, path)
