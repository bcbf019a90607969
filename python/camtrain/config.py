"""The configuration of a run: defaults of the recipe, then a YAML file, then flags."""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from camtrain.defaults import (
    BETA,
    BOXED,
    CONSISTENCY,
    DATA,
    DOGS,
    DOGS_PAPER,
    HOLDS,
    INTERPRETABLE,
    READ_BY,
)
from camtrain.errors import CamtrainError

# An engine that a plan chooses, before it has.
AUTO = "auto"
CHOICES: dict[str, tuple[str, ...]] = {
    "recipe": ("entropy", "consistency", "interpretable", "combined", "stanford-dogs", "baseline"),
    "data": (
        "digits",
        "voc",
        "cub",
        "caltech101",
        "stanford-dogs",
        "cifar10",
        "cifar100",
        "folder",
    ),
    "regularizer": ("entropy", "area", "dispersion"),
    "target": ("true", "predicted"),
    "head_path": ("auto", "autograd"),
    "augment_on": ("loader", "device"),
    "error": ("cosine", "histogram", "histogram_paper", "sigmoid", "centered_sigmoid"),
    "engine": ("off", "fast", "lean", "lean-bf16", AUTO),
    "ramp": ("linear", "cosine"),
    "normalization": ("data", "imagenet"),
    "window": ("gaussian", "uniform"),
    "padding": ("valid", "same"),
    "distance": ("ssim", "contrastive"),
    "views": ("separate", "joint"),
    "optimizer": ("adam", "sgd"),
    "damaged": ("skip", "error"),
    "precision": ("32-true", "16-mixed", "bf16-mixed", "64-true"),
    "backend": ("auto", "reference", "cpu", "triton", "cuda"),
}


@dataclass
class FitConfig:
    """Everything that decides a run. Field names are those of the YAML file and the flags."""

    recipe: str = "entropy"
    data: str = "digits"
    root: str | None = None
    sets: str = "2007:trainval,2012:trainval"
    test_sets: str = "2007:test"
    difficult: bool = False
    test_boxes: str = "one"
    damaged: str = "skip"
    image_size: int = 64
    augment: bool = True
    crop_scale: float = 0.08
    augment_on: str = "loader"
    normalization: str = "data"
    limit_train: int | None = None
    limit_test: int | None = None

    arch: str = "smallresnet"
    layer: str | None = None
    weights: str | None = None
    head_units: int = 0

    alpha: float = 0.0
    beta: float = 0.0
    norm: float = 1.0
    norm_weight: float = 0.0
    map_relu: bool = False
    view_scale: float = 0.08
    window: str = "gaussian"
    window_size: int = 11
    sigma: float = 1.5
    padding: str = "valid"
    distance: str = "ssim"
    temperature: float = 0.5
    views: str = "separate"
    warmup_epochs: int = 0
    ramp_epochs: int = 0
    ramp: str = "linear"
    balance: float = 0.0
    balance_every: int = 50
    regularizer: str = "entropy"
    target: str = "true"
    other_classes: float = 0.0
    normalize: bool = False
    label_smoothing: float = 0.0
    head_path: str = "auto"
    error: str = "cosine"
    gradient_weight: float = 0.0
    every: int = 1
    engine: str = "off"
    backend: str = "auto"

    epochs: int = 10
    batch_size: int = 50
    accumulate: int = 1
    vram: float | None = None
    optimizer: str = "adam"
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    lr_step: int = 0
    lr_factor: float = 0.1
    seed: int = 0
    precision: str = "32-true"
    channels_last: bool = False
    accelerator: str = "auto"
    devices: int = 1
    workers: int = 0

    insertion_steps: int = 224
    insertion_limit: int | None = None
    compare: str | None = None

    out: str = "runs/fit"


# What may differ when a run is resumed: nothing that changes its data, its model or its loss.
RESUMABLE = (
    "epochs",
    "workers",
    "out",
    "accelerator",
    "insertion_steps",
    "insertion_limit",
    "compare",
)


def fields() -> dict[str, dataclasses.Field[Any]]:
    """The fields of :class:`FitConfig` by name."""
    return {field.name: field for field in dataclasses.fields(FitConfig)}


def resolve(overrides: dict[str, Any], file: dict[str, Any] | None = None) -> FitConfig:
    """Defaults of the recipe and data set, overridden by ``file``, then by ``overrides``.

    Raises:
        CamtrainError: an unknown key, a value of the wrong type or outside what is allowed.
    """
    given = {**checked(file or {}, "config file"), **checked(overrides, "command line")}
    recipe = given.get("recipe", FitConfig.recipe)
    data = given.get("data", DOGS if recipe == DOGS else FitConfig.data)
    values: dict[str, Any] = {**DATA.get(data, {}), "data": data}
    values["beta"] = BETA.get(data, 0.0) if recipe == "entropy" else 0.0
    if recipe == "consistency":
        values |= CONSISTENCY
    if recipe == "interpretable":
        values |= INTERPRETABLE
    if recipe == DOGS:
        # the digits have a network and a size of their own
        own = ("arch", "image_size") if data == "digits" else ()
        values |= {k: v for k, v in DOGS_PAPER.items() if k not in own}
    if given.get("vram") is not None and recipe in READ_BY["engine"]:
        values["engine"] = AUTO
    values |= given
    if "weights" not in values and _has_published_weights(values):
        values["weights"] = "pretrained"
    elif values.get("weights") == "none":
        values["weights"] = None
    config = FitConfig(**values)
    validate(config)
    return config


def _has_published_weights(values: dict[str, Any]) -> bool:
    """Whether a run on data of a paper that fine-tunes, or by its recipe, begins with a library's
    trained network."""
    source, colon, _ = values.get("arch", FitConfig.arch).partition(":")
    named = source in ("torchvision", "timm") if colon else source != FitConfig.arch
    tuned = values.get("data") in ("cub", "caltech101", DOGS) or values.get("recipe") == DOGS
    return named and tuned


def checked(values: dict[str, Any], source: str) -> dict[str, Any]:
    """``values`` with types put right (1 for 1.0), or an error that names the key."""
    hints = get_type_hints(FitConfig)
    result = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=3)
            raise CamtrainError(
                f"{source}: unknown key {key!r}"
                + (f"; did you mean {' or '.join(near)}?" if near else "")
            )
        result[name] = _converted(name, value, hints[name], source)
    return result


def _converted(name: str, value: Any, hint: Any, source: str) -> Any:
    allowed = get_args(hint) or (hint,)
    if value is None and type(None) in allowed:
        return None
    kind = next(t for t in allowed if t is not type(None))
    try:
        if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            return float(value)  # YAML reads 1e-3 as a string
    except ValueError:
        pass
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise CamtrainError(f"{source}: {name} must be {kind.__name__}, got {value!r}")


def validate(config: FitConfig) -> None:
    """Refuse values that cannot work, naming the key, what was got and what is allowed."""
    for name, allowed in CHOICES.items():
        got = getattr(config, name)
        if got not in allowed:
            near = difflib.get_close_matches(got, allowed, n=2)
            meant = f"; did you mean {' or '.join(near)}? " if near else ", "
            raise CamtrainError(f"{name}: got {got!r}{meant}allowed are {', '.join(allowed)}")
    if config.recipe == "baseline" and config.beta != 0:
        raise CamtrainError(
            f"beta: recipe 'baseline' means beta = 0, got {config.beta}; take recipe 'entropy'"
        )
    _validate_recipe(config)
    if config.test_boxes not in ("one", "all"):
        raise CamtrainError(f"test_boxes: got {config.test_boxes!r}, allowed are one, all")
    least = {"epochs": 1, "batch_size": 1, "image_size": 8, "devices": 1}
    least |= {"limit_train": 1, "limit_test": 1}
    least |= {"head_units": 0, "workers": 0, "warmup_epochs": 0, "lr_step": 0}
    least |= {"ramp_epochs": 0, "balance_every": 1, "accumulate": 1}
    least |= {
        "every": 1,
        "balance": 0,
        "insertion_steps": 0,
        "insertion_limit": 1,
        "window_size": 1,
        "weight_decay": 0,
    }
    for name, minimum in least.items():
        value = getattr(config, name)
        if value is not None and value < minimum:
            raise CamtrainError(f"{name}: must be at least {minimum}, got {value}")
    for name in ("lr", "lr_factor", "sigma", "temperature"):
        if not getattr(config, name) > 0:
            raise CamtrainError(f"{name}: must be above 0, got {getattr(config, name)}")
    if not 0 <= config.momentum < 1:
        raise CamtrainError(f"momentum: must be at least 0 and below 1, got {config.momentum}")
    if config.engine == AUTO and config.vram is None:
        raise CamtrainError(f"engine: {AUTO!r} is chosen by a plan; it needs --vram")
    if config.vram is not None and not 0 < config.vram < math.inf:
        raise CamtrainError(f"vram: must be above 0 GB, got {config.vram}")
    for name in ("crop_scale", "view_scale"):
        if not 0 < getattr(config, name) <= 1:
            raise CamtrainError(
                f"{name}: must be above 0 and at most 1, got {getattr(config, name)}"
            )
    if config.insertion_steps > config.image_size**2:
        raise CamtrainError(
            f"insertion_steps: a picture of {config.image_size} x {config.image_size} has "
            f"{config.image_size**2} pixels to reveal, got {config.insertion_steps} steps"
        )
    if config.data in HOLDS and config.root is None:
        raise CamtrainError(
            f"root: --data {config.data} needs --root, the folder that holds {HOLDS[config.data]}"
        )


def _validate_recipe(config: FitConfig) -> None:
    """Refuse what the recipe would not read, cannot do, or has not the data for."""
    if config.recipe == DOGS and config.data not in BOXED:
        raise CamtrainError(
            f"data: recipe {DOGS!r} compares maps with true boxes, which {config.data!r} does not "
            f"have; allowed are {', '.join(BOXED)}"
        )
    for name, recipes in READ_BY.items():
        value, default = getattr(config, name), getattr(FitConfig, name)
        if config.recipe not in recipes and value != default:
            others = " or ".join(repr(recipe) for recipe in recipes if recipe != "baseline")
            raise CamtrainError(
                f"{name}: recipe {config.recipe!r} does not read it, got {value!r}; leave it at "
                f"{default!r} or take recipe {others}"
            )
    if config.recipe == "combined":
        weights = ("alpha", "beta", "gradient_weight", "norm_weight")
        if not any(getattr(config, name) for name in weights):
            raise CamtrainError(
                f"recipe: 'combined' needs one of {', '.join(weights)} above 0, got none"
            )
        if config.views == "joint" and (config.beta or config.gradient_weight):
            raise CamtrainError(
                "views: 'joint' sends pictures and views through one forward, in which beta and "
                "gradient_weight would see both; take 'separate', or leave these weights at 0"
            )
    if config.distance == "ssim" and config.temperature != FitConfig.temperature:
        raise CamtrainError(
            f"temperature: distance 'ssim' does not read it, got {config.temperature!r}; leave it "
            f"at {FitConfig.temperature!r} or take distance 'contrastive'"
        )
    if config.balance and config.precision == "16-mixed":
        raise CamtrainError(
            "balance: gradients would be measured before they are scaled for float16; take "
            "precision bf16-mixed or 32-true"
        )


def refuse_both(given: dict[str, Any]) -> None:
    """``vram`` beside a batch size, in what a new run is given; a stored run holds both."""
    if given.get("vram") is not None and given.get("batch_size") is not None:
        raise CamtrainError(
            f"vram: a plan for {given['vram']:g} GB sets the batch size, and batch_size "
            f"{given['batch_size']} was given too; leave one of them away"
        )


def load(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds."""
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise CamtrainError(f"config: no file {path}") from None
    except yaml.YAMLError as error:
        raise CamtrainError(f"config: {path} is not YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise CamtrainError(f"config: {path} must hold a mapping of keys to values")
    return content


def dump(config: FitConfig) -> str:
    """YAML of ``config``; :func:`load` and :func:`resolve` give it back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def resumed(path: Path, overrides: dict[str, Any]) -> FitConfig:
    """The configuration of the run in ``path``, with what may change on resuming changed."""
    stored = resolve({}, load(path))
    given = checked(overrides, "command line")
    for name, value in given.items():
        if name not in RESUMABLE and getattr(stored, name) != value:
            raise CamtrainError(
                f"{name}: the run was begun with {getattr(stored, name)!r}, got {value!r}; a "
                f"resumed run may change only {', '.join(RESUMABLE)}"
            )
    kept = {name: value for name, value in given.items() if name in RESUMABLE}
    config = dataclasses.replace(stored, **kept)
    validate(config)
    return config
