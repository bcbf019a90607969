"""Pictures in rows and columns, as one figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from torch import Tensor

from camkernels.viz import _layout
from camkernels.viz.boxes import FOUND, TRUE, add_boxes, box_list, legend_line
from camkernels.viz.files import Picture, array
from camkernels.viz.overlays import DEFAULT, colour_table

BAR_LABELS = {
    "minmax": "map, from its minimum to its maximum",
    "max": "map / its maximum",
}
Cells = Sequence[Sequence[Picture | None]] | Tensor
Boxes = Sequence[Tensor | None]


def grid(
    cells: Cells,
    rows: Sequence[str],
    columns: Sequence[str] | Mapping[str, Sequence[str]],
    *,
    captions: Sequence[Sequence[str]] | None = None,
    true_boxes: Boxes | None = None,
    found_boxes: Sequence[Boxes] | None = None,
    title: str = "",
    colormap: str | Colormap | None = DEFAULT,
    bar_label: str = BAR_LABELS["minmax"],
    cell_width: float = 1.9,
) -> Figure:
    """Pictures in rows and columns, with labels and one colour bar for all.

    Labels are wrapped, and the figure is as large as they need.

    Args:
        cells: ``cells[row][column]`` is (H, W, 3) or (H, W) uint8, or None: left empty. A tensor
            (rows, columns, H, W, 3) is one too.
        rows: a label each, left of it: the pictures, say.
        columns: a label each, above it: methods, layers or checkpoints. A mapping groups them under
            headings: of the method to its checkpoints, say.
        captions: ``captions[row][column]``, below each cell.
        true_boxes: for each row (4,), (n, 4) or None: solid and white in all of its cells. Boxes
            are top, left, height, width in pixels; those without area or with NaN are not drawn.
        found_boxes: ``found_boxes[row][column]``, the same for a cell: dashed and orange.
        title: above all.
        colormap: of the colour bar, see :func:`overlay`; None for no bar.
        bar_label: what the colours are.
        cell_width: inches. A cell is as high as the tallest picture needs, between a third of its
            width and three times that.

    Returns:
        A figure of rows x columns axes, row by row, and that of the bar; :func:`save` writes it.

    Raises:
        ValueError: no row or column, a number of cells, captions or boxes that is not theirs, a
        wrong shape, an unknown colour map. TypeError: cells of another kind or dtype.
    """
    groups = list(columns.items()) if isinstance(columns, Mapping) else [("", columns)]
    shape = (len(rows), sum(len(labels) for _, labels in groups))
    if 0 in shape:
        raise ValueError(f"rows, columns: expected at least one of each, got {shape}")
    if not cell_width > 0:
        raise ValueError(f"cell_width: expected a positive number of inches, got {cell_width}")
    _check_table("cells", cells, shape)
    drawn = [
        [None if one is None else array(one, f"cells[{i}][{j}]") for j, one in enumerate(line)]
        for i, line in enumerate(cells)
    ]
    if captions is None:
        captions = [[""] * shape[1]] * shape[0]
    _check_table("captions", captions, shape)
    true, found = _all_boxes(true_boxes, found_boxes, shape)
    layout = _layout.lay_out(
        [_clean(row) for row in rows],
        [(_clean(heading), [_clean(label) for label in labels]) for heading, labels in groups],
        [[_clean(text) for text in line] for line in captions],
        (cell_width, cell_width * _aspect(drawn)),
        title=_clean(title),
        bar_label=None if colormap is None else _clean(bar_label),
        legend=any(true) or any(map(any, found)),
    )
    figure = Figure(figsize=layout.size)
    for i in range(shape[0]):
        for j in range(shape[1]):
            axis = figure.add_axes(layout.share(layout.cells[i][j]))
            _draw_cell(axis, drawn[i][j])
            if drawn[i][j] is not None:
                add_boxes(axis, true[i], TRUE)
                add_boxes(axis, found[i][j], FOUND)
            _label_cell(axis, layout, i, j)
    _draw_around(figure, layout, any(true), any(map(any, found)))
    if colormap is not None:
        _draw_bar(figure, layout, colormap)
    return figure


def _check_table(name: str, table: Sequence[Any] | Tensor, shape: tuple[int, int]) -> None:
    lengths = [len(line) for line in table]
    if lengths != [shape[1]] * shape[0]:
        raise ValueError(
            f"{name}: expected {shape[0]} rows of {shape[1]}, got rows of {lengths or 'nothing'}"
        )


def _all_boxes(
    true: Boxes | None, found: Sequence[Boxes] | None, shape: tuple[int, int]
) -> tuple[list[list[list[float]]], list[list[list[list[float]]]]]:
    """Boxes by row, and by row and column."""
    true = [None] * shape[0] if true is None else true
    found = [[None] * shape[1]] * shape[0] if found is None else found
    if len(true) != shape[0]:
        raise ValueError(f"true_boxes: expected one entry per row, {shape[0]}, got {len(true)}")
    _check_table("found_boxes", found, shape)
    return (
        [box_list(one, "true_boxes") for one in true],
        [[box_list(one, "found_boxes") for one in line] for line in found],
    )


def _aspect(drawn: Sequence[Sequence[np.ndarray | None]]) -> float:
    """Height by width of a cell that any of the pictures fits in."""
    found = [one.shape[0] / one.shape[1] for line in drawn for one in line if one is not None]
    return min(max(*found, 1 / 3), 3.0) if found else 1.0


def _clean(text: object) -> str:
    """Text that fonts have: without control characters, or halves of characters."""
    whole = str(text).encode("utf-8", "replace").decode()
    return "".join(c if c.isprintable() or c == "\n" else " " for c in whole)


def _draw_cell(axis: Axes, picture: np.ndarray | None) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    if picture is None:
        axis.patch.set_visible(False)
    else:
        axis.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="antialiased")
        axis.set_anchor("N")


def _label_cell(axis: Axes, layout: _layout.Layout, i: int, j: int) -> None:
    """Labels are no formulas: a dollar sign is one."""
    if i == 0:
        axis.set_title(
            layout.columns[j], fontsize=_layout.COLUMN, pad=_layout.PAD_POINTS, parse_math=False
        )
    if j == 0:
        axis.set_ylabel(
            layout.rows[i], fontsize=_layout.ROW, labelpad=_layout.PAD_POINTS, parse_math=False
        )
    axis.set_xlabel(
        layout.captions[i][j],
        fontsize=_layout.CAPTION,
        labelpad=_layout.PAD_POINTS,
        parse_math=False,
    )


def _draw_around(figure: Figure, layout: _layout.Layout, true: bool, found: bool) -> None:
    """Title, headings of the groups, and what the boxes are."""
    width, height = layout.size
    middle = (layout.cells[0][0][0] + layout.cells[0][-1][0] + layout.cells[0][-1][2]) / 2
    if layout.title:
        figure.text(
            0.5, layout.title_top / height, layout.title,
            ha="center", va="top", fontsize=_layout.TITLE, parse_math=False,
        )  # fmt: skip
    for heading, center in layout.groups:
        if not heading:
            continue
        figure.text(
            center / width, layout.groups_bottom / height, heading,
            ha="center", va="bottom", fontsize=_layout.GROUP, fontweight="bold", parse_math=False,
        )  # fmt: skip
    lines = [legend_line(TRUE, "true box")] if true else []
    lines += [legend_line(FOUND, "box of the map")] if found else []
    if lines:
        figure.legend(
            handles=lines, loc="upper center", ncols=2, frameon=False, borderaxespad=0,
            fontsize=_layout.CAPTION, bbox_to_anchor=(middle / width, layout.legend_top / height),
        )  # fmt: skip


def _draw_bar(figure: Figure, layout: _layout.Layout, colormap: str | Colormap) -> None:
    colours = ListedColormap(colour_table(colormap).numpy())
    axis = figure.add_axes(layout.share(layout.bar))
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), colours), cax=axis, ticks=[0, 0.5, 1])
    bar.set_label(layout.bar_label, fontsize=_layout.CAPTION, parse_math=False)
    bar.ax.tick_params(labelsize=_layout.CAPTION)
    bar.outline.set_linewidth(0.5)
