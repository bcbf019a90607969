"""Boxes on pictures: in tensors, and in figures."""

from __future__ import annotations

import math
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import Normal, Stroke
from torch import Tensor

from camkernels.metrics.regions import inside

TRUE, FOUND = "#FFFFFF", "#FF9E4A"
"""White and orange stand out from viridis and from most pictures, and differ in grey print."""
_DASHES: dict[str, Any] = {TRUE: "-", FOUND: (0, (3, 1.5))}
_RIM = "#000000"


def draw_boxes(
    pictures: Tensor,
    boxes: Tensor,
    *,
    colour: tuple[int, int, int] = (255, 255, 255),
    width: int = 2,
) -> Tensor:
    """Frames on pictures, inside the edges of the boxes, with a black rim on either side.

    Args:
        pictures: (B, H, W, 3) uint8, of :func:`overlay` say.
        boxes: (B, 4), or (B, n, 4) for several per picture, as top, left, height, width in pixels:
            those of :func:`camkernels.metrics.box_of_map`, or true ones. A box without area, or
            with NaN, is not drawn: so pictures without one are marked.
        colour: red, green, blue, 0 to 255. width: of the frame, in pixels.

    Returns:
        (B, H, W, 3) uint8, new.

    Raises:
        ValueError: another shape or number of boxes, a colour or width out of range. TypeError:
        pictures that are not uint8.
    """
    if pictures.dtype != torch.uint8:
        raise TypeError(f"pictures: expected uint8, got {pictures.dtype}")
    if pictures.dim() != 4 or pictures.shape[3] != 3:
        raise ValueError(f"pictures: expected (B, H, W, 3), got {tuple(pictures.shape)}")
    if boxes.dim() not in (2, 3) or boxes.shape[-1] != 4 or len(boxes) != len(pictures):
        count = len(pictures)
        raise ValueError(
            f"boxes: expected ({count}, 4) or ({count}, n, 4), got {tuple(boxes.shape)}"
        )
    if width < 1:
        raise ValueError(f"width: expected at least 1 pixel, got {width}")
    if len(colour) != 3 or not all(0 <= value <= 255 for value in colour):
        raise ValueError(f"colour: expected three numbers from 0 to 255, got {colour}")
    ink = torch.tensor(colour, dtype=torch.uint8, device=pictures.device)
    drawn = pictures.clone()
    for each in (boxes[:, None] if boxes.dim() == 2 else boxes).unbind(1):
        wide = each.to(pictures.device).float()
        edges = _ring(wide, 1, -width - 1, pictures)
        drawn = torch.where(edges, 0, drawn)
        drawn = torch.where(_ring(wide, 0, -width, pictures), ink, drawn)
    return drawn


def _ring(boxes: Tensor, outer: int, inner: int, pictures: Tensor) -> Tensor:
    """Pixels (B, H, W, 1) between the boxes grown by ``outer`` and those grown by ``inner``."""
    some = boxes.isfinite().all(1) & (boxes[:, 2:] > 0).all(1)
    found = []
    for by in (outer, inner):
        grown = torch.cat([boxes[:, :2] - by, boxes[:, 2:] + 2 * by], 1)
        found.append(inside(grown, (pictures.shape[1], pictures.shape[2])))
    return (found[0] & ~found[1] & some[:, None, None])[..., None]


def box_list(boxes: Tensor | None, name: str) -> list[list[float]]:
    """The boxes that can be drawn, of (4,), (n, 4) or None."""
    if boxes is None:
        return []
    if boxes.dim() not in (1, 2) or boxes.shape[-1] != 4:
        raise ValueError(f"{name}: expected (4,) or (n, 4) or None, got {tuple(boxes.shape)}")
    rows: list[list[float]] = boxes.detach().double().reshape(-1, 4).tolist()
    return [row for row in rows if all(map(math.isfinite, row)) and min(row[2:]) > 0]


def add_boxes(axis: Axes, boxes: list[list[float]], colour: str) -> None:
    """Outlines on an axis that shows the picture: true ones solid, found ones dashed."""
    for top, left, height, width in boxes:
        # the middle of pixel 0 is at 0
        place = (left - 0.5, top - 0.5)
        for ink, line, style in ((_RIM, 2.8, "-"), (colour, 1.4, _DASHES[colour])):
            outline = Rectangle(
                place, width, height, fill=False, edgecolor=ink, linewidth=line, linestyle=style
            )
            axis.add_patch(outline)


def legend_line(colour: str, label: str) -> Line2D:
    """What :func:`add_boxes` draws, for a legend."""
    line = Line2D([], [], color=colour, linewidth=1.4, linestyle=_DASHES[colour], label=label)
    line.set_path_effects([Stroke(linewidth=2.8, foreground=_RIM), Normal()])
    return line
