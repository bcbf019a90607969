"""Networks that were trained before: the run folder of a fit, or a file of weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from camtrain import config as configuration
from camtrain import files
from camtrain.config import FitConfig
from camtrain.data.pictures import MEAN, STD, normalised
from camtrain.errors import CamtrainError
from camtrain.models import build_model, default_layer, load_weights, plain_model, read_weights

CLASSES = "classes.json"


@dataclass
class Trained:
    """A network in evaluation mode on its device, and what it expects."""

    name: str
    model: nn.Module
    layer: str
    """Whose maps are taken by default."""
    image_size: int
    classes: tuple[str, ...]
    """Names, empty where they are not known."""
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    config: FitConfig | None = None
    """Of the run, if it was one."""

    def normalise(self, images: Tensor) -> Tensor:
        """Bytes (B, 3, S, S) to what the network takes, on its device."""
        parameter = next(self.model.parameters())
        found = normalised(images.to(parameter.device), self.mean, self.std)
        return found.to(parameter.dtype)

    def label(self, index: int) -> str:
        """Name of a class, or its number."""
        return self.classes[index] if index < len(self.classes) else f"class {index}"


def write_classes(
    folder: Path, classes: Sequence[str], mean: Sequence[float], std: Sequence[float]
) -> None:
    """What a run's network expects, for those who have the run and not its data."""
    content = {"classes": list(classes), "mean": list(mean), "std": list(std)}
    files.write_json(folder / CLASSES, content)


def device_of(name: str) -> torch.device:
    """``auto``: a GPU where there is one.

    Raises:
        CamtrainError: no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).partition("\n")[0]
        raise CamtrainError(f"device: cannot use {name!r}: {first}") from error
    return device


def load_run(folder: Path, device: torch.device) -> Trained:
    """The network of a finished run.

    Raises:
        CamtrainError: no run, an unfinished or a damaged one.
    """
    for name in ("config.yaml", "model.pt", CLASSES):
        if not (folder / name).is_file():
            raise CamtrainError(f"run: no finished run in {folder} (no file {folder / name})")
    config = configuration.resolve({}, configuration.load(folder / "config.yaml"))
    try:
        known = json.loads((folder / CLASSES).read_text())
        classes, mean, std = (tuple(known[key]) for key in ("classes", "mean", "std"))
    except (ValueError, KeyError, TypeError) as error:
        raise CamtrainError(f"run: {folder / CLASSES} cannot be read: {error}") from error
    weights, config.weights = config.weights, None  # the file may be elsewhere by now
    model = build_model(config, len(classes))
    config.weights = weights
    load_weights(model, read_weights(folder / "model.pt"), f"run: {folder / 'model.pt'}")
    return Trained(
        name=folder.name,
        model=model.to(device).eval(),
        layer=config.layer or default_layer(config.arch),
        image_size=config.image_size,
        classes=classes,
        mean=mean,
        std=std,
        config=config,
    )


def load_file(
    path: Path, arch: str, device: torch.device, *, layer: str | None = None, image_size: int = 224
) -> Trained:
    """A library's network with the weights of a file, normalised as for ImageNet.

    Raises:
        CamtrainError: an unknown network, weights that do not fit it.
    """
    model = plain_model(arch)
    load_weights(model, read_weights(path), f"weights: {path}")
    return Trained(
        name=path.stem,
        model=model.to(device).eval(),
        layer=layer or default_layer(arch),
        image_size=image_size,
        classes=(),
    )
