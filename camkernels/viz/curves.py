"""Insertion and deletion curves, mean and spread over pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

Curve = tuple[Tensor, Tensor]
"""Shares (S + 1,) and scores (B, S + 1), as :func:`camkernels.metrics.insertion_curve` gives."""

# Okabe and Ito's without yellow, which is too pale for lines. The numbers of colours and of dashes
# have no common divisor, so that no pair comes twice among the first 35.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 1.6)),
    (0, (1.2, 1.2)),
    (0, (6, 1.6, 1.2, 1.6)),
    (0, (3, 1, 1, 1, 1, 1)),
)
SPREADS = {
    "deviation": "mean over pictures; band: one standard deviation above and below",
    "quartiles": "mean over pictures; band: first to third quartile",
    "none": "mean over pictures",
}
X_LABELS = {
    "insertion": "share of pixels revealed",
    "deletion": "share of pixels removed",
}


def curve_figure(
    panels: Mapping[str, Mapping[str, Curve]],
    *,
    spread: str = "deviation",
    y_label: str = "score of the class",
    title: str = "",
) -> Figure:
    """Mean curves over pictures, with a band for their spread and the area under the mean.

    By the trapezoid rule the area under the mean curve is the mean of the pictures' areas: what
    :class:`camkernels.metrics.InsertionAUC` gives. Pictures with scores that are not finite are
    left out, and the legend counts them. A method has one colour and one kind of dashes in all
    panels.

    Args:
        panels: heading to curves; those of method to shares (S + 1,) and scores (B, S + 1). The
            headings ``"insertion"`` and ``"deletion"`` name their axis.
        spread: the band: ``"deviation"``, one standard deviation above and below the mean;
            ``"quartiles"``, from the first to the third; ``"none"``.
        y_label: of the scores. title: above all.

    Returns:
        A figure of one axes per panel; :func:`save` writes it.

    Raises:
        ValueError: no panel, no curve, another shape of shares or scores, an unknown spread.

    Example:
        >>> import torch
        >>> from camkernels import viz
        >>> curve = torch.linspace(0, 1, 11), torch.rand(4, 11)
        >>> len(viz.curve_figure({"insertion": {"Grad-CAM": curve}}).axes)
        1
    """
    if spread not in SPREADS:
        raise ValueError(f"spread: expected one of {', '.join(SPREADS)}, got {spread!r}")
    if not panels or not all(panels.values()):
        raise ValueError("panels: expected at least one, each with a curve")
    methods = list(dict.fromkeys(method for curves in panels.values() for method in curves))
    figure = Figure(figsize=(4.6 * len(panels), 3.8 + 0.19 * len(methods)), layout="constrained")
    row = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (heading, curves) in zip(row, panels.items(), strict=True):
        for method, (shares, scores) in curves.items():
            number = methods.index(method)
            _check_curve(f"panels[{heading!r}][{method!r}]", shares, scores)
            strength = max(0.06, 0.2 / len(curves))  # bands lie over each other
            _draw(axis, method, shares, scores, spread, number, strength)
        axis.set_title(heading, fontsize=11, parse_math=False)
        axis.set_xlabel(X_LABELS.get(heading, "share of pixels"), fontsize=9.5)
        axis.tick_params(labelsize=8.5)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.01)
        _legend(axis)
    row[0].set_ylabel(y_label, fontsize=9.5)
    figure.supxlabel(SPREADS[spread], fontsize=8.5)
    if title:
        figure.suptitle(title, fontsize=12, parse_math=False)
    return figure


def _check_curve(name: str, shares: Tensor, scores: Tensor) -> None:
    if shares.dim() != 1 or scores.dim() != 2 or scores.shape[1] != len(shares) or len(shares) < 2:
        raise ValueError(
            f"{name}: expected shares (S + 1,) and scores (B, S + 1), got "
            f"{tuple(shares.shape)} and {tuple(scores.shape)}"
        )


def _legend(axis: Axes) -> None:
    """Below the axis: inside it would lie on a band."""
    legend = axis.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.17), fontsize=8.5, frameon=False, handlelength=3
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _draw(
    axis: Axes,
    method: str,
    shares: Tensor,
    scores: Tensor,
    spread: str,
    number: int,
    strength: float,
) -> None:
    shares, scores = shares.detach().double().cpu(), scores.detach().double().cpu()
    colour, dashes = COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]
    sound = scores.isfinite().all(1)
    kept = scores[sound]
    left_out = f", {int((~sound).sum())} left out" if len(kept) < len(scores) else ""
    if not len(kept):
        label = f"{method}: no picture{left_out}"
        axis.plot([], [], label=label, color=colour, linestyle=dashes)
        return
    mean = kept.mean(0)
    area = float(torch.trapezoid(mean, shares))
    label = f"{method}: AUC {area:.3f}, N = {len(kept)}{left_out}"
    axis.plot(
        shares.numpy(), mean.numpy(), label=label, color=colour, linestyle=dashes, linewidth=1.8
    )
    if spread == "none" or len(kept) < 2:
        return
    deviation = kept.std(0)
    low, high = mean - deviation, mean + deviation
    if spread == "quartiles":
        low, high = kept.quantile(torch.tensor([0.25, 0.75], dtype=kept.dtype), dim=0)
    axis.fill_between(
        shares.numpy(), low.numpy(), high.numpy(), color=colour, alpha=strength, linewidth=0
    )
