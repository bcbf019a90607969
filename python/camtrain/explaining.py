"""``camtrain explain``: pictures, a trained network, and the maps that say why."""

from __future__ import annotations

import io
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from torch import Tensor

import camkernels as ck
from camkernels import viz
from camtrain import files
from camtrain.data.pictures import Box, read_picture, resized
from camtrain.data.whole import samples_of
from camtrain.errors import CamtrainError, DamagedDataError
from camtrain.methods import check_methods, explainer
from camtrain.scoring_report import check_writable
from camtrain.trained import Trained

SHEET = 24
"""Pictures on the sheet of the report, at most."""


@dataclass
class Options:
    """Of an explanation."""

    methods: Sequence[str] = ("gradcam",)
    layers: Sequence[str] = ()
    """Names; none for the network's own. Several make a column each."""
    target: str | None = None
    """Number or name of a class; None for the predicted one."""
    colormap: str = "viridis"
    alpha: float = 0.5
    batch_size: int = 16
    progress: bool | None = None


def explain_pictures(
    trained: Trained, paths: Sequence[Path], out: Path, options: Options
) -> list[dict[str, Any]]:
    """Write the maps of pictures to ``out``.

    Of each picture and method (and layer, where there are several) ``<picture>_<method>.png``, the
    map over the picture in its own size, and ``<picture>_<method>.npy``, the map as the layer has
    it (h, w) float32. ``predictions.csv``: a row per picture. ``index.html``: all of it on a sheet.

    Args:
        trained: the network. paths: picture files and folders of them.
        out: made if it is not there. options: see :class:`Options`.

    Returns:
        the rows of ``predictions.csv``; those of damaged pictures have ``damaged`` only.

    Raises:
        CamtrainError: no picture, or only damaged ones; an unknown method, layer, class or colour
        map; an unwritable folder.
    """
    methods = check_methods(options.methods)
    if options.batch_size < 1:
        raise CamtrainError(f"batch_size: must be at least 1, got {options.batch_size}")
    if not 0 <= options.alpha <= 1:
        raise CamtrainError(f"alpha: must be from 0 to 1, got {options.alpha}")
    _check_colormap(options.colormap)
    pictures = _found(paths)
    target = _class_of(trained, options.target)
    columns = [(method, layer) for method in methods for layer in options.layers or (None,)]
    for method, layer in columns:
        explainer(trained, method, layer).close()  # an unknown layer is told here
    check_writable(out)
    stems = _stems(pictures)
    rows: list[dict[str, Any]] = []
    sheet = _Sheet()
    shown = sys.stderr.isatty() if options.progress is None else options.progress
    with Tqdm(total=len(pictures), desc="explain", disable=not shown, file=sys.stderr) as bar:
        for batch, damaged in _batches(pictures, trained.image_size, options.batch_size):
            rows += [{"picture": str(path), "damaged": message} for path, message in damaged]
            if batch:
                rows += _explain(trained, batch, columns, target, out, stems, options, sheet)
            bar.update(len(batch) + len(damaged))
    if all("damaged" in row for row in rows):
        raise CamtrainError(f"images: none of {len(rows)} could be read: {rows[0]['damaged']}")
    files.write_csv(out / "predictions.csv", rows)
    sheet.write(out / "index.html", trained, options, rows)
    return rows


def _check_colormap(name: str) -> None:
    try:
        viz.overlay(torch.zeros(1, 3, 1, 1), torch.zeros(1, 1, 1), colormap=name)
    except ValueError as error:
        raise CamtrainError(str(error)) from error


def _found(paths: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise CamtrainError(f"images: no file or folder {path}")
        found += samples_of(path)
    if not found:
        raise CamtrainError(f"images: no picture in {', '.join(map(str, paths)) or 'nothing'}")
    return list(dict.fromkeys(found))


def _stems(pictures: Sequence[Path]) -> dict[Path, str]:
    """Names of output files: the picture's, with a number where two have the same."""
    counts: Counter[str] = Counter()
    stems = {}
    for path in pictures:
        name = path.stem
        counts[name] += 1
        stems[path] = name if counts[name] == 1 else f"{name}-{counts[name]}"
    return stems


def _class_of(trained: Trained, target: str | None) -> int | None:
    if target is None:
        return None
    if target in trained.classes:
        return trained.classes.index(target)
    try:
        index = int(target)
    except ValueError:
        import difflib

        near = difflib.get_close_matches(target, trained.classes, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise CamtrainError(
            f"target: expected a class's number or name, got {target!r}{hint}"
        ) from None
    if index < 0 or (trained.classes and index >= len(trained.classes)):
        raise CamtrainError(f"target: there are {len(trained.classes)} classes, got {index}")
    return index


def _batches(
    pictures: Sequence[Path], size: int, batch_size: int
) -> Iterator[tuple[list[tuple[Path, Any, Tensor]], list[tuple[Path, str]]]]:
    """Paths with the picture as it is and as a square, and damaged ones with what is wrong."""
    for start in range(0, len(pictures), batch_size):
        sound, damaged = [], []
        for path in pictures[start : start + batch_size]:
            try:
                picture = read_picture(path)
            except DamagedDataError as error:
                damaged.append((path, str(error)))
                continue
            whole = Box(0, 0, picture.height, picture.width)
            sound.append((path, picture, resized(picture, whole, size)))
        yield sound, damaged


@torch.no_grad()
def _explain(
    trained: Trained,
    batch: Sequence[tuple[Path, Any, Tensor]],
    columns: Sequence[tuple[str, str | None]],
    target: int | None,
    out: Path,
    stems: dict[Path, str],
    options: Options,
    sheet: _Sheet,
) -> list[dict[str, Any]]:
    squares = torch.stack([square for _, _, square in batch])
    images = trained.normalise(squares)
    scores = trained.model(images).softmax(1)
    best, predicted = scores.max(1)
    classes = predicted if target is None else torch.full_like(predicted, target)
    if target is not None and target >= scores.shape[1]:
        raise CamtrainError(f"target: there are {scores.shape[1]} classes, got {target}")
    by_column = {}
    for method, layer in columns:
        name = method if layer is None else f"{method} {layer}"
        with explainer(trained, method, layer) as cam:
            try:
                maps = cam.explain(images, classes).cpu()
            except ck.TapError as error:
                raise CamtrainError(f"{method}: {error}") from error
        by_column[name] = maps
        for (path, picture, _), one in zip(batch, maps, strict=True):
            _write_map(out / f"{stems[path]}_{_safe(name)}", picture, one, options)
    of_class = scores.gather(1, classes[:, None])[:, 0]
    rows = []
    for i, (path, _, _) in enumerate(batch):
        row = {"picture": str(path), "file": stems[path]}
        row |= {"predicted": trained.label(int(predicted[i])), "score": float(best[i])}
        row |= {"explained": trained.label(int(classes[i])), "score of it": float(of_class[i])}
        rows.append(row)
    sheet.add(squares, by_column, [row["file"] for row in rows], rows)
    return rows


def _safe(name: str) -> str:
    return re.sub(r"[^\w.+-]", "-", name)


def _write_map(stem: Path, picture: Any, one: Tensor, options: Options) -> None:
    image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    over = viz.overlay(image, one[None], colormap=options.colormap, alpha=options.alpha)[0]
    viz.save(over, f"{stem}.png")
    content = io.BytesIO()
    np.save(content, one.float().numpy())
    files.write_bytes(Path(f"{stem}.npy"), content.getvalue())


class _Sheet:
    """The first pictures, for the report."""

    def __init__(self) -> None:
        self.images: list[Tensor] = []
        self.maps: dict[str, list[Tensor]] = {}
        self.names: list[str] = []
        self.captions: list[str] = []

    def add(
        self,
        images: Tensor,
        maps: dict[str, Tensor],
        names: Sequence[str],
        rows: Sequence[dict[str, Any]],
    ) -> None:
        room = SHEET - len(self.names)
        if room <= 0:
            return
        self.images.append(images[:room])
        for name, found in maps.items():
            self.maps.setdefault(name, []).append(found[:room])
        self.names += names[:room]
        self.captions += [f"{r['explained']} {100 * r['score of it']:.0f} %" for r in rows[:room]]

    def write(
        self, path: Path, trained: Trained, options: Options, rows: Sequence[dict[str, Any]]
    ) -> None:
        asked = {"network": trained.name, "layer": ", ".join(options.layers) or trained.layer}
        asked |= {"methods": ", ".join(options.methods), "colour map": options.colormap}
        report = viz.Report("Explanations", asked)
        figure = viz.map_sheet(
            torch.cat(self.images),
            {name: torch.cat(parts) for name, parts in self.maps.items()},
            names=self.names,
            captions={"input": self.captions},
            colormap=options.colormap,
            alpha=options.alpha,
        )
        left = len(rows) - len(self.names)
        more = f"; {left} more are in the folder" if left else ""
        report.add_figure(figure, f"Maps of {len(self.names)} pictures{more}")
        report.add_table(rows, "Predictions")
        report.write(path)
