"""What a consistency run is judged by on the test data: SSIM of the maps, and insertion AUC."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import camkernels as ck
from camkernels.metrics.curves import class_score, insertion_auc
from camtrain import figures, files
from camtrain.config import FitConfig
from camtrain.criteria import ssim_options
from camtrain.data.module import CamtrainData, collate
from camtrain.data.pictures import random_crop
from camtrain.data.sampling import generator
from camtrain.models import load_weights, read_weights

SCORES = "consistency_scores"
# Of the crops that maps are compared under; the same for every run, so that scores compare.
CROP_SEED = 20_240_224


@dataclass
class Evaluation:
    """Per test picture that could be decoded."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    """As in the CSV: file, classes, crop, ``consistency``, ``insertion_auc`` where it was taken,
    ``compared`` where there is a network to compare with."""
    damaged: list[str] = field(default_factory=list)

    def column(self, name: str) -> Tensor:
        """Values (N,) of the pictures that have one."""
        values = [row[name] for row in self.rows if name in row]
        return torch.tensor(values, dtype=torch.float64)


class _Numbered(Dataset[dict[str, Any]]):
    """A data set whose items know their index."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.data[index], "index": torch.tensor(index)}


def crops(indices: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Crops (N, 4) int64 and flips (N,) of test pictures, each by its index alone."""
    boxes, flips = [], []
    for index in indices.tolist():
        rng = generator(CROP_SEED, 8, index)
        boxes.append([int(edge) for edge in random_crop(rng, size, size)])
        flips.append(bool(rng.random() < 0.5))
    return torch.tensor(boxes, dtype=torch.int64).view(-1, 4), torch.tensor(flips, dtype=torch.bool)


def compared_file(path: Path) -> Path:
    """The state_dict of ``--compare``: a file, or that of a run folder."""
    return path / "model.pt" if path.is_dir() else path


def check_compared(config: FitConfig, model: nn.Module) -> None:
    """Refuse weights that do not fit before the training and not after it."""
    if config.compare is not None:
        _compared(config, model)


def _compared(config: FitConfig, model: nn.Module) -> nn.Module:
    path = compared_file(Path(config.compare or ""))
    other = copy.deepcopy(model)
    load_weights(other, read_weights(path), f"compare: {path}")
    return other


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the mode is put back."""
    modes = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)


def evaluate(
    model: nn.Module,
    layer: str,
    data: CamtrainData,
    config: FitConfig,
    tell: Callable[[str], None],
) -> Evaluation:
    """Score every test picture, in evaluation mode; the mode is put back.

    Consistency is that of :func:`camkernels.consistency_scores` for the predicted class under one
    crop and flip per picture, drawn from a fixed seed. Insertion AUC is taken for at most
    ``config.insertion_limit`` pictures, spread over the test data.
    """
    total = len(data.test)
    found = Evaluation()
    models = {"consistency": model}
    if config.compare is not None:
        models["compared"] = _compared(config, model)
    inserted = set(_inserted(total, config))
    loader = DataLoader(
        _Numbered(data.test),
        batch_size=config.batch_size,
        collate_fn=collate,
        num_workers=config.workers,
    )
    if inserted:
        passes = len(inserted) * (config.insertion_steps + 1)
        tell(f"insertion AUC of {len(inserted)} test pictures: {passes} forward passes")
    with evaluating(*models.values()):
        for batch in loader:
            found.damaged += batch["damaged"]
            if "images" in batch:
                found.rows += _rows(models, layer, data, config, batch, inserted)
    found.damaged = sorted(set(found.damaged))
    return found


def _inserted(total: int, config: FitConfig) -> list[int]:
    """Indices of the pictures whose insertion AUC is taken."""
    if config.insertion_steps == 0:
        return []
    count = min(total, config.insertion_limit or total)
    return [int(index) for index in np.linspace(0, total, count, endpoint=False)]


def _rows(
    models: dict[str, nn.Module],
    layer: str,
    data: CamtrainData,
    config: FitConfig,
    batch: dict[str, Any],
    inserted: set[int],
) -> list[dict[str, Any]]:
    model = models["consistency"]
    parameter = next(model.parameters())
    images = data.normalise(batch["images"].to(parameter.device)).to(parameter.dtype)
    boxes, flips = crops(batch["index"], images.shape[-1])
    place = (boxes.to(images.device), flips.to(images.device))
    with ck.GradCAM(model, layer, relu=config.map_relu) as cam:
        logits = model(images)
        maps = cam(logits)
    assert isinstance(maps, Tensor)  # of one layer
    columns = {
        "target": batch["targets"],
        "predicted": logits.argmax(1),
        **dict(zip(("top", "left", "height", "width"), boxes.unbind(1), strict=True)),
        "flip": flips.long(),
    }
    for name, network in models.items():
        columns[name] = ck.consistency_scores(
            network,
            layer,
            images,
            *place,
            relu=config.map_relu,
            **ssim_options(config),
        )
    listed = {name: values.tolist() for name, values in columns.items()}
    indices = batch["index"].tolist()
    rows = [
        {"file": _name(data.test, index), **{name: v[i] for name, v in listed.items()}}
        for i, index in enumerate(indices)
    ]
    chosen = [i for i, index in enumerate(indices) if index in inserted]
    if chosen:
        areas = insertion_auc(
            class_score(model, logits[chosen].argmax(1)),
            images[chosen],
            maps[chosen],
            steps=config.insertion_steps,
            batch_size=config.batch_size,
        )
        for i, area in zip(chosen, areas.tolist(), strict=True):
            rows[i]["insertion_auc"] = area
    return rows


def _name(dataset: Any, index: int) -> str:
    return str(dataset.name(index)) if hasattr(dataset, "name") else str(index)


def write(evaluation: Evaluation, folder: Path, title: str) -> dict[str, Any]:
    """Write the scores and their histogram; what the summary says of them.

    Raises:
        DiskFullError: no room.
    """
    files.write_csv(folder / f"{SCORES}.csv", evaluation.rows)
    shown = {"this run": evaluation.column("consistency")}
    if len(evaluation.column("compared")):
        shown["compared with"] = evaluation.column("compared")
    label = "SSIM of the map of the crop and the crop of the map"
    figures.distribution(shown, folder / f"{SCORES}.png", title, label)
    summary: dict[str, Any] = {"test_pictures": len(evaluation.rows)}
    right = [row["target"] == row["predicted"] for row in evaluation.rows]
    summary["test_accuracy"] = sum(right) / max(len(right), 1)
    for name in ("consistency", "insertion_auc", "compared"):
        summary |= moments(name, evaluation.column(name))
    return summary


def moments(name: str, values: Tensor) -> dict[str, Any]:
    """Mean and standard deviation (of the population) of finite values, and how many are not."""
    if not len(values):
        return {}
    finite = values[values.isfinite()]
    moments: dict[str, Any] = {f"{name}_mean": None, f"{name}_std": None}
    if len(finite):
        moments = {
            f"{name}_mean": float(finite.mean()),
            f"{name}_std": float(finite.std(correction=0)),
        }
    return {**moments, f"{name}_undefined": len(values) - len(finite)}
