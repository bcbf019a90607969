"""Sheets of maps over their pictures: of methods, checkpoints and layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from camkernels.metrics.regions import box_of_map
from camkernels.viz.grids import BAR_LABELS, Boxes, grid
from camkernels.viz.overlays import DEFAULT, check_maps, overlay, pictures


def map_sheet(
    images: Tensor,
    maps: Mapping[str, Tensor] | Mapping[str, Mapping[str, Tensor]],
    *,
    names: Sequence[str] | None = None,
    captions: Mapping[str, Sequence[str]] | None = None,
    true_boxes: Boxes | Tensor | None = None,
    box_threshold: float | None = None,
    title: str = "",
    cell_width: float = 1.9,
    **overlay_options: Any,
) -> Figure:
    """Rows of pictures; columns: the picture, then each set of maps over it.

    Below a map that is constant, dead (all 0) or not finite it is said so.

    Args:
        images: (B, 3, H, W), see :func:`overlay`.
        maps: name to maps (B, h, w), a column each: methods or checkpoints. Or names of groups to
            such mappings: methods to checkpoints.
        names: of the pictures; None numbers them.
        captions: name to a text below each of its B cells, ``"input"`` for the pictures; in groups
            the name is ``"group/name"``.
        true_boxes: (B, 4), or for each picture (4,), (n, 4) or None.
        box_threshold: draw :func:`camkernels.metrics.box_of_map` of each map at this share of its
            maximum; None for no box.
        title, cell_width: see :func:`grid`.
        overlay_options: ``colormap``, ``alpha``, ``mean``, ``std``, ``scale``, ``grey`` of
            :func:`overlay`.

    Raises:
        As :func:`overlay` and :func:`grid`; ValueError: no maps, captions for what is no column.
    """
    shown, groups = _columns(maps)
    normalisation = {name: overlay_options.get(name) for name in ("mean", "std")}
    inputs = pictures(images, **normalisation)
    size = (images.shape[2], images.shape[3])
    layers, texts, found = [inputs], [[""] * len(images)], [[None] * len(images)]
    for name, one in shown.items():
        check_maps(one, images, f"maps[{name!r}]")
        layers.append(overlay(images, one, **overlay_options))
        texts.append(_states(one))
        boxes = None if box_threshold is None else box_of_map(one.detach(), size, box_threshold)
        found.append([None] * len(images) if boxes is None else list(boxes.cpu()))
    _add_captions(texts, captions or {}, ["input", *shown])
    if names is None:
        names = [f"picture {i + 1}" for i in range(len(images))]
    if len(names) != len(images):
        raise ValueError(f"names: expected one per image, {len(images)}, got {len(names)}")
    return grid(
        torch.stack(layers, 1).cpu(),
        names,
        groups,
        captions=list(zip(*texts, strict=True)),
        true_boxes=None if true_boxes is None else list(true_boxes),
        found_boxes=list(zip(*found, strict=True)),
        title=title,
        colormap=overlay_options.get("colormap", DEFAULT),
        bar_label=BAR_LABELS[overlay_options.get("scale", "minmax")],
        cell_width=cell_width,
    )


def layer_sheet(
    images: Tensor, maps_by_layer: Mapping[str, Tensor], *, last: int = 6, **options: Any
) -> Figure:
    """:func:`map_sheet` of the ``last`` layers, the deepest on the right.

    Args:
        images: (B, 3, H, W), see :func:`overlay`.
        maps_by_layer: name to maps (B, h, w), in the order of the network; each of its own size.
        last: how many are shown, from the end.
        options: of :func:`map_sheet`.

    Source: GradCAM on Stanford Dogs, Figure 4 (the last 6 layers).
    """
    if last < 1:
        raise ValueError(f"last: expected at least one layer, got {last}")
    return map_sheet(images, dict(list(maps_by_layer.items())[-last:]), **options)


def before_after_sheet(
    images: Tensor,
    before: Tensor,
    after: Tensor,
    *,
    labels: tuple[str, str] = ("before", "after"),
    **options: Any,
) -> Figure:
    """:func:`map_sheet` of the maps of two models, or two checkpoints, side by side.

    Args:
        images: (B, 3, H, W), see :func:`overlay`.
        before, after: (B, h, w), each scaled on its own.
        labels: of the two columns.
        options: of :func:`map_sheet`.
    """
    if len(set(labels)) != 2:
        raise ValueError(f"labels: expected two different ones, got {labels!r}")
    return map_sheet(images, dict(zip(labels, (before, after), strict=True)), **options)


def _columns(
    maps: Mapping[str, Tensor] | Mapping[str, Mapping[str, Tensor]],
) -> tuple[dict[str, Tensor], dict[str, list[str]] | list[str]]:
    """Maps by the names of their columns, and the labels of all columns for :func:`grid`."""
    if not maps:
        raise ValueError("maps: expected at least one column, got none")
    flat: dict[str, Tensor] = {}
    groups: dict[str, list[str]] = {"": ["input"]}
    for name, one in maps.items():
        if isinstance(one, Mapping):
            groups[name] = list(one)
            flat.update({f"{name}/{label}": each for label, each in one.items()})
        else:
            flat[name] = one
    if len(groups) == 1:
        return flat, ["input", *flat]
    if len(groups) - 1 != len(maps):
        raise ValueError("maps: expected tensors or groups of them, got both")
    return flat, groups


def _states(maps: Tensor) -> list[str]:
    """What is to be said of each map that shows nothing."""
    values = maps.detach().flatten(1)
    low, high = values.amin(1).tolist(), values.amax(1).tolist()
    finite = values.isfinite().all(1).tolist()
    found = []
    for least, most, sound in zip(low, high, finite, strict=True):
        constant = "dead map" if least == 0 else "constant map"
        found.append("map not finite" if not sound else constant if least == most else "")
    return found


def _add_captions(
    texts: list[list[str]], captions: Mapping[str, Sequence[str]], columns: Sequence[str]
) -> None:
    for name, given in captions.items():
        if name not in columns:
            raise ValueError(f"captions: expected names of {', '.join(columns)}; got {name!r}")
        column = texts[columns.index(name)]
        if len(given) != len(column):
            raise ValueError(f"captions[{name!r}]: expected {len(column)}, got {len(given)}")
        column[:] = ["\n".join(filter(None, pair)) for pair in zip(given, column, strict=True)]
