"""Where the cells of a sheet lie, in inches, so that labels of any length get the room they need.

matplotlib's own layouts leave a picture of fixed shape with empty space around it, or labels over
each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from matplotlib.textpath import TextPath

TITLE, GROUP, COLUMN, ROW, CAPTION = 12.0, 10.5, 9.5, 9.5, 8.5
"""Sizes of text, in points."""
_LEADING = 1.25
_GAP, _GROUP_GAP, _PAD = 0.06, 0.22, 0.07
PAD_POINTS = 4.0
"""From a cell to its label, a part of _PAD."""
_MARGIN, _BAR, _LEGEND = 0.08, 0.6, 0.3


@lru_cache(maxsize=4096)
def text_width(text: str, size: float) -> float:
    """Inches that a line of text takes."""
    if not text.strip():
        return len(text) * size * 0.3 / 72
    # a dollar sign would begin a formula
    plain = text.replace("$", "S")
    return float(TextPath((0, 0), plain, size=size).get_extents().width) / 72


def wrapped(text: str, width: float, size: float) -> str:
    """``text`` in lines of at most ``width`` inches, broken at spaces and . _ / - if it can be."""
    lines = []
    for line in text.splitlines():
        current = ""
        for part in re.split(r"(?<=[\s._/\-])", line):
            pieces = [part] if text_width(part.rstrip(), size) <= width else list(part)
            for piece in pieces:
                if current and text_width((current + piece).rstrip(), size) > width:
                    lines.append(current.rstrip())
                    current = piece.lstrip()
                else:
                    current += piece
        lines.append(current.rstrip())
    return "\n".join(lines)


def text_height(texts: Iterable[str], size: float) -> float:
    """Inches that the tallest of wrapped texts takes, with the gap beside it; 0 of no text."""
    lines = max((text.count("\n") + 1 for text in texts if text), default=0)
    return lines * size * _LEADING / 72 + _PAD if lines else 0.0


Place = tuple[float, float, float, float]
"""Left, bottom, width, height."""


@dataclass(frozen=True)
class Layout:
    """Wrapped labels, and places in inches from the lower left corner of the figure."""

    size: tuple[float, float]
    cells: list[list[Place]]
    bar: Place
    bar_label: str
    title: str
    title_top: float
    groups: list[tuple[str, float]]
    """Heading and its middle."""
    groups_bottom: float
    columns: list[str]
    rows: list[str]
    captions: list[list[str]]
    legend_top: float

    def share(self, place: Place) -> Place:
        """A place in parts of the figure, as matplotlib has it."""
        left, bottom, width, height = place
        across, up = self.size
        return left / across, bottom / up, width / across, height / up


Groups = Sequence[tuple[str, Sequence[str]]]


def lay_out(
    rows: Sequence[str],
    groups: Groups,
    captions: Sequence[Sequence[str]],
    cell: tuple[float, float],
    *,
    title: str,
    bar_label: str | None,
    legend: bool,
) -> Layout:
    """Places for rows of cells of ``cell`` inches, with columns in groups; None for no bar."""
    width, height = cell
    names = [wrapped(row, height, ROW) for row in rows]
    lefts, spans = _across(groups, width, _MARGIN + text_height(names, ROW))
    below = [[wrapped(text, width, CAPTION) for text in line] for line in captions]
    downs = [height + text_height(line, CAPTION) + _GAP for line in below]
    content = sum(downs[:-1]) + height
    long = min(content, 3.0)
    label = "" if bar_label is None else wrapped(bar_label, long, CAPTION)
    end = lefts[-1] + width
    right = _MARGIN if bar_label is None else _BAR + text_height([label], CAPTION)
    total = max(end + right, 3.2 if legend else 0.0)
    title = wrapped(title, total - 2 * _MARGIN, TITLE)
    headings = [wrapped(heading, last - first, GROUP) for heading, first, last in spans]
    columns = [wrapped(label, width, COLUMN) for _, labels in groups for label in labels]

    # downward from the upper edge
    groups_bottom = _MARGIN + text_height([title], TITLE) + text_height(headings, GROUP)
    top = groups_bottom + text_height(columns, COLUMN)
    tops = [top + sum(downs[:i]) for i in range(len(downs))]
    y = top + sum(downs)
    full = y - _GAP + (_LEGEND if legend else 0.0) + _MARGIN
    middle = full - top - content / 2
    return Layout(
        size=(total, full),
        cells=[[(left, full - t - height, width, height) for left in lefts] for t in tops],
        bar=(end + 0.14, middle - long / 2, 0.13, long),
        bar_label=label,
        title=title,
        title_top=full - _MARGIN,
        groups=[
            (heading, (first + last) / 2)
            for heading, (_, first, last) in zip(headings, spans, strict=True)
        ],
        groups_bottom=full - groups_bottom + _PAD / 4,
        columns=columns,
        rows=names,
        captions=below,
        legend_top=full - y,
    )


def _across(
    groups: Groups, width: float, start: float
) -> tuple[list[float], list[tuple[str, float, float]]]:
    """Left edges of the columns; headings with the edges of their groups."""
    lefts: list[float] = []
    spans: list[tuple[str, float, float]] = []
    x = start
    for heading, labels in groups:
        first = x
        for _ in labels:
            lefts.append(x)
            x += width + _GAP
        spans.append((heading, first, x - _GAP))
        if len(groups) > 1:
            x += _GROUP_GAP
    return lefts, spans
