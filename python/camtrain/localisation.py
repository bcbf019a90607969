"""What a run of the recipe ``stanford-dogs`` ends with: CAM and Grad-CAM against the true boxes.

Source: Lee, Enhancing explainability in CNNs through Grad-CAM, sections 4.4, 4.5 and 5.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import camkernels as ck
from camkernels import metrics, viz
from camtrain import figures, files, scoring, scoring_report
from camtrain.config import FitConfig
from camtrain.data.module import CamtrainData
from camtrain.data.whole import WholePictures, collate_whole
from camtrain.errors import CamtrainError
from camtrain.evaluation import evaluating, moments
from camtrain.methods import explainer
from camtrain.models import default_layer
from camtrain.trained import Trained

TITLES = {"cam": "CAM", "gradcam": "Grad-CAM"}
SHOWN = 6
"""Pictures of the figures."""
LAST = 6
"""Layers of the second figure."""
SCORES = (
    ("max_box_acc", "MaxBoxAccV2 %"),
    ("pointing", "pointing %"),
    ("energy", "energy %"),
)
MEANINGS = (
    "IoU: of the box around the largest part of the map above 15 % of its maximum with the true "
    "box (the best one, where there are several of the class). Pointing: the maximum lies in a "
    "box. Energy: share of the map in the boxes. ce, ca, cd: entropy, area in pixels of the map, "
    "and dispersion, over maps that are not dead. A dead map, all zero, counts as a miss; a "
    "picture whose object is not in its middle, which is tested on, has no box and does not count."
)


@dataclass
class Shown:
    """Pictures of the figures."""

    images: Tensor
    """(N, 3, S, S) uint8."""
    boxes: list[Tensor]
    """(n, 4) each."""
    rows: list[dict[str, Any]]
    """Of ``iou.csv``."""
    maps: dict[str, Tensor]
    """(N, h, w) by method."""
    layers: dict[str, Tensor]
    """Grad-CAM of the last layers, (N, h, w) each, the deepest last."""


@dataclass
class Localisation:
    """Of the test pictures that could be decoded."""

    scores: list[scoring.Scores]
    """By method."""
    rows: list[dict[str, Any]]
    """As in the CSV: picture, group, classes, IoU by method; NaN where the map is not finite, or no
    box is in the picture."""
    shown: Shown
    damaged: list[str]


def check(config: FitConfig, data: CamtrainData, model: nn.Module) -> None:
    """Refuse what cannot be compared before the training and not after it.

    Raises:
        CamtrainError: test pictures without a box, a network that has no CAM.
    """
    samples = getattr(data.test, "samples", [])
    if not getattr(data.test, "boxed", True):
        bare = [sample.path for sample in samples if sample.box is None]
        raise CamtrainError(
            f"data: recipe {config.recipe!r} compares maps with true boxes, and {len(bare)} of "
            f"{len(samples)} test pictures of {config.data} in {config.root} have none, "
            f"{bare[0]} for one; their annotations are missing"
        )
    network = _network(model, config.layer or default_layer(config.arch), data, config)
    first = next((item for item in map(data.test.__getitem__, range(len(data.test)))
                  if "damaged" not in item), None)  # fmt: skip
    if first is not None:
        with evaluating(model):
            images = network.normalise(first["images"][None])
            _maps(network, images, first["targets"][None])
            _layer_maps(network, images, first["targets"][None])


def evaluate(
    model: nn.Module,
    layer: str,
    data: CamtrainData,
    config: FitConfig,
    tell: Callable[[str], None],
) -> Localisation:
    """Score the maps of every test picture, in evaluation mode; the mode is put back.

    On VOC whole pictures are scored, an item for each class in one; on other data the test pictures
    as they are.
    """
    network = _network(model, layer, data, config)
    whole = WholePictures(config, config.limit_test, data.test)
    options = scoring.Options(
        tuple(TITLES), config.target, steps=0, batch_size=config.batch_size, progress=False
    )
    damaged: set[str] = set()
    tell(f"IoU of {len(whole)} test pictures by {' and '.join(TITLES.values())}")
    with evaluating(model):
        found = scoring.score_run(network, options.methods, options, damaged, {}, whole)
        if not found[0].rows:
            raise CamtrainError(f"no test picture could be read ({len(damaged)} are damaged)")
        rows = [_row(pair) for pair in zip(*(one.rows for one in found), strict=True)]
        shown = _shown(network, whole, rows, options.target)
    return Localisation(found, rows, shown, sorted(damaged))


def _network(model: nn.Module, layer: str, data: CamtrainData, config: FitConfig) -> Trained:
    return Trained(
        name=Path(config.out).name,
        model=model,
        layer=layer,
        image_size=config.image_size,
        classes=tuple(data.classes),
        mean=data.train.mean,
        std=data.train.std,
        config=config,
    )


def _row(pair: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the methods found of one picture."""
    kept = {name: pair[0][name] for name in ("picture", "group", "true", "predicted")}
    return kept | {f"{one['method']}_iou": one["iou"] for one in pair}


def _chosen(rows: Sequence[dict[str, Any]]) -> list[int]:
    """Pictures for the figures, spread over those that are classified right, as the paper shows;
    others fill up where there are too few."""
    right = [i for i, row in enumerate(rows) if row["true"] == row["predicted"]]
    wrong = [i for i, row in enumerate(rows) if row["true"] != row["predicted"]]
    found: list[int] = []
    for group in (right, wrong):
        count = min(len(group), SHOWN - len(found))
        found += [group[int(i)] for i in np.linspace(0, len(group), count, endpoint=False)]
    return found


def _shown(
    network: Trained, whole: WholePictures, rows: Sequence[dict[str, Any]], target: str
) -> Shown:
    kept = [rows[i] for i in _chosen(rows)]
    index = {whole.name(i): i for i in range(len(whole))}
    batch = collate_whole([whole[index[row["picture"]]] for row in kept])
    images = network.normalise(batch["images"])
    classes = batch["targets"] if target == "true" else network.model(images).argmax(1)
    return Shown(
        images=batch["images"],
        boxes=[one[one[:, 0].isfinite()] for one in batch["boxes"]],
        rows=kept,
        maps=_maps(network, images, classes),
        layers=_layer_maps(network, images, classes),
    )


def _maps(network: Trained, images: Tensor, classes: Tensor) -> dict[str, Tensor]:
    """Maps (B, h, w) by method, on the CPU."""
    return {method: _explain(network, method, images, classes) for method in TITLES}


def _layer_maps(network: Trained, images: Tensor, classes: Tensor) -> dict[str, Tensor]:
    """Grad-CAM (B, h, w) of the last convolutions, on the CPU, in the order they run in."""
    layers = last_convolutions(network.model, images[:1])
    with _out_of_place(network.model):
        return {name: _explain(network, "gradcam", images, classes, name) for name in layers}


def _explain(
    network: Trained, method: str, images: Tensor, classes: Tensor, layer: str | None = None
) -> Tensor:
    with explainer(network, method, layer) as cam:
        try:
            maps: Tensor = cam.explain(images, classes.to(images.device)).cpu()
        except ck.TapError as error:
            raise CamtrainError(
                f"arch: recipe 'stanford-dogs' compares CAM with Grad-CAM, and there is no "
                f"{TITLES[method]} of {layer or network.layer!r}: {error}"
            ) from error
    return maps


def last_convolutions(model: nn.Module, images: Tensor) -> list[str]:
    """Names of the last :data:`LAST` convolutions that a forward runs through once, in this order,
    without those whose output is a single pixel."""
    seen: list[str] = []

    def see(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if output.dim() == 4 and output.shape[2] * output.shape[3] > 1:
                seen.append(name)

        return hook

    handles = [
        module.register_forward_hook(see(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return [name for name in seen if seen.count(name) == 1][-LAST:]


@contextmanager
def _out_of_place(model: nn.Module) -> Iterator[None]:
    """An activation in place, behind a convolution, would overwrite what Grad-CAM reads."""
    changed: list[Any] = [m for m in model.modules() if getattr(m, "inplace", False) is True]
    try:
        for module in changed:
            module.inplace = False
        yield
    finally:
        for module in changed:
            module.inplace = True


def write(found: Localisation, folder: Path, title: str) -> dict[str, Any]:
    """Write ``iou.csv``, ``iou.md``, ``iou.png`` and ``layers.png``; what the summary says of them.

    Raises:
        DiskFullError: no room.
    """
    files.write_csv(folder / "iou.csv", found.rows)
    figures.save(compared(found.shown, title), folder / "iou.png")
    if found.shown.layers:
        names = [row["true"] for row in found.shown.rows]
        heading = f"Grad-CAM of the last {len(found.shown.layers)} convolutions, {title}"
        layers = viz.layer_sheet(found.shown.images, found.shown.layers, last=LAST, names=names,
                                 true_boxes=found.shown.boxes, title=heading)  # fmt: skip
        figures.save(layers, folder / "layers.png")
    table = scoring_report.table(found.scores)
    files.write_text(folder / "iou.md", markdown(found, table, title))
    return summary(found, table)


def compared(shown: Shown, title: str) -> Figure:
    """The picture; the heatmaps of both methods; both over the picture, with the boxes and IoU, as
    Figures 2, 3 and 5 to 8 of the paper."""
    size = (shown.images.shape[2], shown.images.shape[3])
    cells = [viz.pictures(shown.images)]
    cells += [viz.overlay(shown.images, maps, alpha=1.0) for maps in shown.maps.values()]
    cells += [viz.overlay(shown.images, maps) for maps in shown.maps.values()]
    marked = {method: metrics.box_of_map(maps, size) for method, maps in shown.maps.items()}
    found = [[None] * (1 + len(marked)) + [boxes[i] for boxes in marked.values()]
             for i in range(len(shown.rows))]  # fmt: skip
    captions = [
        [f"says {row['predicted']}", *[""] * len(marked), *(_iou(row, m) for m in marked)]
        for row in shown.rows
    ]
    labels = [TITLES[method] for method in shown.maps]
    return viz.grid(
        torch.stack(cells, 1),
        [row["true"] for row in shown.rows],
        {"": ["input"], "heatmap": labels, "over the picture": labels},
        captions=captions,
        true_boxes=shown.boxes,
        found_boxes=found,
        title=title,
    )


def _iou(row: dict[str, Any], method: str) -> str:
    value = row[f"{method}_iou"]
    return f"IoU {value:.2f}" if np.isfinite(value) else "no IoU"


def _column(rows: Sequence[dict[str, Any]], method: str) -> Tensor:
    return torch.tensor([row[f"{method}_iou"] for row in rows], dtype=torch.float64)


def _right(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["true"] == row["predicted"]]


def summary(found: Localisation, table: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """For ``summary.json``: shares from 0 to 1 of all pictures that are scored, and the IoU also of
    those that are classified right."""
    right = _right(found.rows)
    told: dict[str, Any] = {
        "scored_pictures": len(found.rows),
        "scored_accuracy": len(right) / len(found.rows),
    }
    for method in TITLES:
        told |= moments(f"{method}_iou", _column(found.rows, method))
        told[f"{method}_iou_right_mean"] = None
        told |= moments(f"{method}_iou_right", _column(right, method))
        line = next(r for r in table if r["method"] == method and r["pictures"] == "all")
        for name, title in SCORES:
            told[f"{method}_{name}"] = None if line[title] is None else line[title] / 100
    return told


def markdown(found: Localisation, table: Sequence[dict[str, Any]], title: str) -> str:
    """The report: means of both methods, what they mean, the figures."""
    lines = [f"# CAM and Grad-CAM against true boxes: {title}", "", MEANINGS, ""]
    lines += [scoring_report.markdown(list(table))]
    means = summary(found, table)
    for method, name in TITLES.items():
        mean, right = means[f"{method}_iou_mean"], means[f"{method}_iou_right_mean"]
        lines.append(f"- {name}: mean IoU {_told(mean)}, over pictures classified right "
                     f"{_told(right)}")  # fmt: skip
    undefined = means["cam_iou_undefined"]
    if undefined:
        lines.append(f"- {undefined} of {len(found.rows)} pictures have no IoU")
    one, other = (_column(found.rows, method).nan_to_num(-1.0) for method in TITLES)
    if torch.equal(one, other):
        lines += ["", "Both methods have the same IoU in every picture: behind global average "
                  "pooling and linear layers CAM is Grad-CAM but for a factor."]  # fmt: skip
    lines += ["", "![maps and boxes](iou.png)", ""]
    if found.shown.layers:
        lines += ["![Grad-CAM of the last layers](layers.png)", ""]
    return "\n".join(lines)


def _told(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
