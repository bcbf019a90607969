"""A report in one HTML file that opens anywhere: nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
import html
import math
import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from camkernels.viz.files import Picture, png, write

_STYLE = """
:root { color-scheme: light dark; --text: #1b1b1b; --back: #ffffff; --line: #c9c9c9;
  --soft: #f3f3f3; --quiet: #565656; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e8e8e8; --back: #17191c; --line: #44484e; --soft: #22262b; --quiet: #b0b4ba; } }
body { margin: 0; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 0.6rem; }
h1, h2, p, figcaption, td, th { overflow-wrap: anywhere; }
p { max-width: 46rem; white-space: pre-line; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 0.92rem; }
caption { text-align: left; padding: 0.3rem 0; color: var(--quiet); }
th, td { padding: 0.3rem 0.8rem; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }
thead th { background: var(--soft); }
th.number, td.number { text-align: right; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
tbody tr:hover { background: var(--soft); }
figure { margin: 1.2rem 0; }
figure > img { background: #ffffff; }
figcaption { color: var(--quiet); font-size: 0.92rem; margin-top: 0.35rem; }
img { max-width: 100%; height: auto; display: block; }
.sheet { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1rem 0; }
.sheet figure { margin: 0; width: 14rem; }
.sheet img { width: 100%; }
footer { margin-top: 3rem; color: var(--quiet); font-size: 0.85rem; }
@media print { main { max-width: none; } figure, tr { break-inside: avoid; } }
"""


class Report:
    """Sections in the order in which they are added, written as one HTML file.

    Pictures are in the file; text is escaped; it follows the reader's light or dark mode; the same
    content makes the same file.

    Args:
        title: of the page.
        parameters: name to value, shown as the first table: of the run, say.

    Example:
        >>> from camkernels import viz
        >>> report = viz.Report("Maps of run 3", {"layer": "layer4", "seed": 0})
        >>> report.add_table([{"method": "Grad-CAM", "average drop": 21.4}], "On 200 pictures")
        >>> report.html().startswith("<!DOCTYPE html>")
        True
    """

    def __init__(self, title: str, parameters: Mapping[str, Any] | None = None) -> None:
        if not str(title).strip():
            raise ValueError("title: expected a text, got none")
        self.title = str(title)
        self._parts: list[str] = []
        if parameters:
            lines = [
                f'<tr><th scope="row">{escaped(name)}</th><td>{escaped(_text(value, 6))}</td></tr>'
                for name, value in parameters.items()
            ]
            self._add_wide(["<caption>Parameters</caption>", "<tbody>", *lines, "</tbody>"])

    def add_heading(self, text: str) -> None:
        """A heading: what follows is its section."""
        self._parts.append(f"<h2>{escaped(text)}</h2>")

    def add_text(self, text: str) -> None:
        """A paragraph; line breaks are kept."""
        self._parts.append(f"<p>{escaped(text)}</p>")

    def add_table(self, rows: Sequence[Mapping[str, Any]], caption: str = "") -> None:
        """A table of rows by the names of their columns; a cell is empty where a row lacks it.

        Numbers are aligned right. Those of a column with fractions have the same decimals, for four
        digits of the largest, or four digits each where that would hide the smallest.

        Args:
            rows: of text, numbers (of Python, NumPy, or tensors with one element), bool or None.
            caption: above it.
        """
        names = list(dict.fromkeys(name for row in rows for name in row))
        if not names:
            self.add_text(f"{caption}: no rows" if caption else "no rows")
            return
        columns = {name: _column([row.get(name) for row in rows]) for name in names}
        kinds = {name: ' class="number"' if columns[name][1] else "" for name in names}
        heads = [f'<th scope="col"{kinds[name]}>{escaped(name)}</th>' for name in names]
        lines = [f"<thead><tr>{''.join(heads)}</tr></thead>", "<tbody>"]
        for i in range(len(rows)):
            cells = [f"<td{kinds[n]}>{escaped(columns[n][0][i])}</td>" for n in names]
            lines.append(f"<tr>{''.join(cells)}</tr>")
        above = [f"<caption>{escaped(caption)}</caption>"] if caption else []
        self._add_wide([*above, *lines, "</tbody>"])

    def add_figure(
        self, picture: Figure | Picture, caption: str, *, alt: str | None = None, dpi: float = 120
    ) -> None:
        """A matplotlib figure or a picture as it is now.

        Args:
            picture: see :func:`save`.
            caption: below it.
            alt: what it shows, for who cannot see it; None: the caption.
            dpi: pixels per inch of a figure.

        Raises:
            TypeError, ValueError: as :func:`save`; ValueError: neither caption nor alt.
        """
        self._parts.append(_figure(png(picture, dpi), caption, alt))

    def add_images(self, pictures: Tensor | Sequence[Picture], captions: Sequence[str]) -> None:
        """A sheet of pictures, as many side by side as the window is wide for.

        Args:
            pictures: (N, H, W, 3) uint8, of :func:`overlay` say, or N pictures of any sizes.
            captions: below each, and its alternative text.

        Raises:
            ValueError: another number of captions, an empty one. TypeError, ValueError: as
            :func:`save`.
        """
        if len(pictures) != len(captions):
            raise ValueError(f"captions: expected {len(pictures)}, one each, got {len(captions)}")
        figures = [
            _figure(png(picture), caption, None)
            for picture, caption in zip(pictures, captions, strict=True)
        ]
        self._parts.append("\n".join(['<div class="sheet">', *figures, "</div>"]))

    def html(self) -> str:
        """The whole page."""
        from camkernels import __version__

        title = escaped(self.title)
        lines = [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title>",
            f"<style>{_STYLE}</style>",
            "</head>",
            "<body>",
            "<main>",
            f"<h1>{title}</h1>",
            *self._parts,
            f"<footer>camkernels {escaped(__version__)}</footer>",
            "</main>",
            "</body>",
            "</html>",
        ]
        return "\n".join(lines) + "\n"

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the page in one step, see :func:`save`; ``path`` ends in ``.html`` or ``.htm``.

        Raises:
            ValueError: another ending. OSError: as :func:`save`.
        """
        if Path(path).suffix.lower() not in (".html", ".htm"):
            raise ValueError(
                f"path: expected a name that ends in .html or .htm, got {os.fspath(path)!r}"
            )
        write(path, self.html().encode())

    def _add_wide(self, lines: Iterable[str]) -> None:
        self._parts.append("\n".join(['<div class="wide"><table>', *lines, "</table></div>"]))


def escaped(text: object) -> str:
    """Text for HTML, in elements and in quoted attributes, without what no page may hold."""
    whole = str(text).encode("utf-8", "replace").decode()
    allowed = (c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in whole)
    return html.escape("".join(allowed))


def _figure(content: bytes, caption: str, alt: str | None) -> str:
    shown = caption if alt is None else alt
    if not str(shown).strip():
        raise ValueError("caption, alt: expected a text in one of them, got none")
    data = base64.b64encode(content).decode()
    below = f"<figcaption>{escaped(caption)}</figcaption>" if caption else ""
    image = f'<img src="data:image/png;base64,{data}" alt="{escaped(shown)}">'
    return f"<figure>{image}{below}</figure>"


def _plain(value: Any) -> Any:
    """Numbers of NumPy and of tensors with one element as Python's."""
    if hasattr(value, "item") and getattr(value, "size", None) is not None:
        count = value.numel() if isinstance(value, Tensor) else value.size
        return value.item() if count == 1 else value
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _column(values: Sequence[Any]) -> tuple[list[str], bool]:
    """Texts of a column, and whether it holds numbers only."""
    plain = [_plain(value) for value in values]
    numbers = [value for value in plain if value is not None]
    if not numbers or not all(map(_is_number, numbers)):
        return [_text(value, 4) for value in plain], False
    sizes = [abs(value) for value in numbers if math.isfinite(value) and value]
    if all(isinstance(value, int) for value in numbers) or not sizes:
        return [_text(value, 4) for value in plain], True
    decimals = min(max(3 - math.floor(math.log10(max(sizes))), 0), 6)
    if min(sizes) < 10.0 ** (1 - decimals) / 2:
        return [_text(value, 4) for value in plain], True
    texts = [
        f"{value:.{decimals}f}" if value is not None and math.isfinite(value) else _text(value, 4)
        for value in plain
    ]
    return texts, True


def _text(value: Any, digits: int) -> str:
    value = _plain(value)
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return "NaN" if math.isnan(value) else f"{value:.{digits}g}"
    return str(value)
