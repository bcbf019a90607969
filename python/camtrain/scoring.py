"""``camtrain evaluate``: explanations of trained networks, scored on their test data."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from torch import Tensor
from torch.utils.data import DataLoader

import camkernels as ck
from camkernels import metrics
from camkernels.metrics.curves import area_under
from camkernels.metrics.regions import inside
from camtrain import scoring_report
from camtrain.data.whole import SEVERAL, SINGLE, WholePictures, collate_whole
from camtrain.errors import CamtrainError
from camtrain.methods import check_methods, explainer
from camtrain.trained import Trained, device_of, load_run

METHODS = ("cam", "gradcam", "gradcam++")
EXAMPLES = 6
Curves = dict[str, list[tuple[Tensor, Tensor]]]


@dataclass
class Options:
    """Of an evaluation."""

    methods: Sequence[str] = METHODS
    target: str = "true"
    """Class that is explained: ``"true"``, or ``"predicted"``."""
    steps: int = 56
    """Of insertion and deletion; 0: the network is asked about no changed picture, so that these,
    average drop, increase and gain, and top-25 % removal are not taken."""
    limit: int | None = None
    """At most so many pictures, spread over the test data."""
    batch_size: int = 64
    root: str | None = None
    """Where the data is, if no longer where the run found it."""
    device: str = "auto"
    progress: bool | None = None


@dataclass
class Scores:
    """Of one method on one network."""

    run: str
    method: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Per picture and class; a score that there is none for is NaN."""
    curves: Curves = field(default_factory=lambda: {"insertion": [], "deletion": []})
    boxes: metrics.MaxBoxAccV2 = field(default_factory=metrics.MaxBoxAccV2)
    """Of pictures with one object."""

    def max_box_acc(self) -> float:
        """MaxBoxAccV2; NaN where a map was not finite."""
        return float(self.boxes.compute()["max_box_acc"])


def evaluate_runs(runs: Sequence[Path], out: Path, options: Options) -> list[dict[str, Any]]:
    """Score every method on every run; write tables, figures and a report to ``out``.

    Writes ``scores.csv`` (a row per run, method, picture and class), ``table.csv``, ``table.json``,
    ``table.md`` (a row per run, method and group of pictures), ``curves.png``, ``examples.png``
    and ``report.html``.

    Returns:
        the rows of the table.

    Raises:
        CamtrainError: an unfinished run, unknown methods, runs of different data, a layer whose
        head the method ``cam`` cannot take, an unwritable folder.
    """
    methods = check_methods(options.methods)
    for name, least in (("steps", 1), ("batch_size", 1), ("limit", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise CamtrainError(f"{name}: must be at least {least}, got {value}")
    scoring_report.check_writable(out)
    device = device_of(options.device)
    networks = [load_run(folder, device) for folder in runs]
    _check_alike(networks)
    found: list[Scores] = []
    damaged: set[str] = set()
    examples: dict[str, Any] = {}
    for network in networks:
        found += score_run(network, methods, options, damaged, examples)
    if not any(one.rows for one in found):
        raise CamtrainError(f"no test picture could be read ({len(damaged)} are damaged)")
    return scoring_report.write(out, found, examples, options, sorted(damaged))


def score_run(
    network: Trained,
    methods: Sequence[str],
    options: Options,
    damaged: set[str],
    examples: dict[str, Any],
    data: WholePictures | None = None,
) -> list[Scores]:
    """Scores of every method on one network; adds to what is damaged, and to the examples.

    ``data``: made beforehand; None to read that of the run.
    """
    if options.steps > network.image_size**2:
        raise CamtrainError(
            f"steps: a picture has {network.image_size**2} pixels, got {options.steps}"
        )
    data = _data(network, options) if data is None else data
    scores = {method: Scores(network.name, method) for method in methods}
    loader = DataLoader(data, options.batch_size, collate_fn=collate_whole)
    for batch in _shown(loader, network.name, options.progress):
        damaged |= set(batch["damaged"])
        if "images" in batch:
            maps = _score(network, batch, scores, options)
            _keep_examples(examples, network.name, batch, maps)
    return list(scores.values())


def _check_alike(networks: Sequence[Trained]) -> None:
    names = [network.name for network in networks]
    if len(set(names)) != len(names):
        raise CamtrainError(f"run: folders of one name cannot be told apart: {', '.join(names)}")
    first = networks[0]
    for network in networks[1:]:
        for what in ("classes", "image_size"):
            if getattr(network, what) != getattr(first, what):
                raise CamtrainError(
                    f"run: {network.name} and {first.name} were trained on different {what}"
                )


def _data(network: Trained, options: Options) -> WholePictures:
    assert network.config is not None
    config = network.config
    if options.root is not None:
        config = dataclasses.replace(config, root=options.root)
    data = WholePictures(config, options.limit)
    if tuple(data.classes) != network.classes:
        raise CamtrainError(
            f"{network.name}: was trained on {len(network.classes)} classes, the data has "
            f"{len(data.classes)} (or others)"
        )
    return data


def _shown(loader: Any, name: str, progress: bool | None) -> Any:
    shown = sys.stderr.isatty() if progress is None else progress
    return Tqdm(loader, desc=name, disable=not shown, file=sys.stderr)


@torch.no_grad()
def _score(
    network: Trained, batch: dict[str, Any], scores: dict[str, Scores], options: Options
) -> dict[str, Tensor]:
    """Add a batch; its maps by method."""
    images = network.normalise(batch["images"])
    logits = network.model(images)
    targets = batch["targets"].to(images.device)
    predicted = logits.argmax(1)
    classes = targets if options.target == "true" else predicted
    one = metrics.class_score(network.model, classes)

    def score(pictures: Tensor, owner: Tensor) -> Tensor:
        pairs = zip(
            pictures.split(options.batch_size), owner.split(options.batch_size), strict=True
        )
        return torch.cat([one(part, whose) for part, whose in pairs])

    base = [
        {"picture": n, "group": g, "true": network.label(t), "predicted": network.label(p)}
        for n, g, t, p in zip(
            batch["name"], batch["group"], targets.tolist(), predicted.tolist(), strict=True
        )
    ]
    found = {}
    for method, into in scores.items():
        with explainer(network, method) as cam:
            try:
                maps = cam.explain(images, classes)
            except ck.TapError as error:
                raise CamtrainError(f"{network.name}: {method}: {error}") from error
        columns = _of_model(score, images, maps, into, options) if options.steps else {}
        columns |= _of_boxes(maps, batch, into, network.image_size)
        columns |= _of_maps(maps)
        listed = {name: values.tolist() for name, values in columns.items()}
        into.rows += [
            {"run": network.name, "method": method, **row, **{k: v[i] for k, v in listed.items()}}
            for i, row in enumerate(base)
        ]
        found[method] = maps
    return found


def _of_model(
    score: Callable[[Tensor, Tensor], Tensor],
    images: Tensor,
    maps: Tensor,
    into: Scores,
    options: Options,
) -> dict[str, Tensor]:
    """Scores (B,) that ask the network about changed pictures."""
    before, after = metrics.confidence_change(score, images, maps)
    columns = {
        "drop": metrics.drop(before, after),
        "increase": metrics.increase(before, after),
        "gain": metrics.gain(before, after),
        "removal": metrics.removal_change(score, images, maps),
    }
    asked = {"steps": options.steps, "batch_size": options.batch_size}
    for name, curve in (
        ("insertion", metrics.insertion_curve), ("deletion", metrics.deletion_curve),
    ):  # fmt: skip
        shares, values = curve(score, images, maps, **asked)
        columns[name] = area_under(shares, values, maps)
        into.curves[name].append((shares.cpu(), values.cpu()))
    return columns


def _of_boxes(
    maps: Tensor, batch: dict[str, Any], into: Scores, image_size: int
) -> dict[str, Tensor]:
    """Scores (B,) of what the map marks against the boxes of the class."""
    size = (image_size, image_size)
    boxes = batch["boxes"].to(maps.device)
    nothing = maps.new_full((len(maps),), math.nan)
    if boxes.shape[1] == 0:
        return {"iou": nothing, "pointing": nothing, "energy": nothing}
    each = inside(boxes.nan_to_num(0.0).flatten(0, 1), size).view(*boxes.shape[:2], *size)
    pointing, energy = metrics.localisation(maps, each.any(1), size)
    marked = metrics.box_of_map(maps, size)[:, None].expand(boxes.shape)
    # the middle of a picture may hold nothing of its object, whose box then has no area
    known = boxes[..., 0].isfinite() & (boxes[..., 2:] > 0).all(-1)
    overlap = metrics.box_iou(marked.flatten(0, 1), boxes.nan_to_num(0.0).flatten(0, 1)).view(
        known.shape
    )
    finite = maps.flatten(1).isfinite().all(1) & known.any(1)
    columns = {
        "iou": overlap.amax(1),
        "pointing": pointing.to(energy.dtype),
        "energy": energy,
    }
    single = [i for i, group in enumerate(batch["group"]) if group == SINGLE and known[i].any()]
    if single:
        into.boxes.update(maps[single].cpu(), boxes[single, 0].cpu(), size)
    return {name: torch.where(finite, values, math.nan) for name, values in columns.items()}


def _of_maps(maps: Tensor) -> dict[str, Tensor]:
    """Statistics (B,) of the maps; of a dead one NaN, but for ``dead``."""
    statistics = ck.map_statistics(maps)
    dead = maps.flatten(1).amax(1) <= 0 if maps.numel() else maps.new_zeros(len(maps)).bool()
    live = {
        "entropy": statistics.entropy,
        "area": statistics.area,
        "dispersion": statistics.dispersion,
    }
    columns = {name: torch.where(dead, math.nan, values) for name, values in live.items()}
    return {**columns, "dead": dead.to(maps.dtype)}


def _keep_examples(
    examples: dict[str, Any], run: str, batch: dict[str, Any], maps: dict[str, Tensor]
) -> None:
    """The first pictures of the data with the maps of every run and method; a picture with several
    objects among them where there is one."""
    kept = examples.setdefault("maps", {}).setdefault(run, {})
    if "images" not in examples:
        groups = batch["group"]
        order = [i for i, g in enumerate(groups) if g == SINGLE][: EXAMPLES - 2]
        order += [i for i, g in enumerate(groups) if g == SEVERAL]
        examples["chosen"] = order[:EXAMPLES] or list(range(len(groups)))[:EXAMPLES]
        chosen = examples["chosen"]
        examples["images"] = batch["images"][chosen]
        examples["names"] = [batch["name"][i] for i in chosen]
        examples["boxes"] = [
            one[one[:, 0].isfinite()] if len(one) else None for one in batch["boxes"][chosen]
        ]
    chosen = examples["chosen"]
    # runs of several seeds see other digits
    if not kept and torch.equal(batch["images"][chosen], examples["images"]):
        for method, found in maps.items():
            kept[method] = found[chosen].cpu()
