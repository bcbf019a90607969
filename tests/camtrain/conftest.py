"""A tiny PASCAL VOC in its exact format, and short configurations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning", reason="the training program's extras are not installed")
pytest.importorskip("sklearn", reason="the training program's extras are not installed")

from camtrain import config as configuration
from camtrain.config import FitConfig
from dog_files import DOG_BOXES, TinyDogs
from picture_files import TinyCUB
from voc_files import TinyVOC


@pytest.fixture
def voc(tmp_path: Path) -> TinyVOC:
    """Three pictures: 000001 with three dogs, cats and birds, 000002 and 000003 with one each."""
    made = TinyVOC(tmp_path)
    three = [
        {"name": "dog", "box": (1, 1, 20, 20)},
        {"name": "cat", "box": (21, 1, 40, 20)},
        {"name": "bird", "box": (41, 1, 60, 40)},
    ]
    made.add("000001", *three)
    made.add("000002", {"name": "dog", "box": (5, 5, 30, 30)})
    made.add("000003", {"name": "cat", "box": (5, 5, 30, 30)})
    made.split("trainval", "000001", "000002", "000003")
    made.split("test", "000001", "000002")
    return made


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., FitConfig]:
    """A configuration that trains in seconds."""

    def make(**overrides: Any) -> FitConfig:
        base = {
            "epochs": 1,
            "image_size": 32,
            "limit_train": 60,
            "limit_test": 30,
            "batch_size": 20,
            "beta": 0.1,
            "accelerator": "cpu",
            "out": str(tmp_path / "run"),
        }
        return configuration.resolve({**base, **overrides})

    return make


@pytest.fixture
def birds(tmp_path: Path) -> TinyCUB:
    return TinyCUB(tmp_path / "data")


@pytest.fixture
def run_on(tiny: Callable[..., FitConfig], birds: TinyCUB) -> Callable[..., FitConfig]:
    """A configuration of the recipe on the tiny birds, which trains in a second."""

    def make(**overrides: Any) -> FitConfig:
        base = {"recipe": "consistency", "data": "cub", "root": str(birds.root),
                "arch": "smallresnet", "beta": 1e-6, "batch_size": 3, "workers": 0,
                "insertion_steps": 4}  # fmt: skip
        return tiny(**{**base, **overrides})

    return make


@pytest.fixture
def kennel(tmp_path: Path) -> TinyDogs:
    """Objects of several sizes and places."""
    made = TinyDogs(tmp_path / "dogs")
    for (name, _), box in zip(made.splits["test"], DOG_BOXES, strict=True):
        made.annotate(name, box)
    return made


@pytest.fixture
def on_dogs(tiny: Callable[..., FitConfig], kennel: TinyDogs) -> Callable[..., FitConfig]:
    """A configuration of the recipe ``stanford-dogs`` on them."""

    def make(**overrides: Any) -> FitConfig:
        base = {"recipe": "stanford-dogs", "root": str(kennel.root), "arch": "smallresnet",
                "beta": 0.0, "image_size": 64, "batch_size": 3, "workers": 0}  # fmt: skip
        return tiny(**{**base, **overrides})

    return make
