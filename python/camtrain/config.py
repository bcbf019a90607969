"""The configuration of a run: defaults of the recipe, then a YAML file, then flags."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from camtrain.errors import CamtrainError

CHOICES: dict[str, tuple[str, ...]] = {
    "recipe": ("entropy", "consistency", "interpretable", "baseline"),
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
    "engine": ("off", "fast", "lean"),
    "window": ("gaussian", "uniform"),
    "padding": ("valid", "same"),
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
    limit_train: int | None = None
    limit_test: int | None = None

    arch: str = "smallresnet"
    layer: str | None = None
    weights: str | None = None
    head_units: int = 0

    alpha: float = 0.0
    beta: float = 0.0
    norm: float = 1.0
    map_relu: bool = False
    view_scale: float = 0.08
    window: str = "gaussian"
    window_size: int = 11
    sigma: float = 1.5
    padding: str = "valid"
    warmup_epochs: int = 0
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


# The consistency paper: SGD, trained networks to begin with, 60 epochs on CUB-200 and 20 on
# Caltech-101 at 224 x 224. It does not state its batch size. A damaged picture of these small sets
# is an error: there are none to expect.
_SGD: dict[str, Any] = {
    "optimizer": "sgd",
    "lr": 1e-3,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "lr_step": 30,
}
_FINE_TUNED: dict[str, Any] = {
    **_SGD,
    "image_size": 224,
    "arch": "resnet50",
    "batch_size": 32,
    "workers": 2,
    "damaged": "error",
}
# No paper states how it trains on CIFAR.
_CIFAR: dict[str, Any] = {"image_size": 32, "batch_size": 128, "channels_last": True}
# The CAM entropy paper: ResNet-50, 300 units, boxes at 192 x 192, Adam at 0.001, batches of 20,
# 30 epochs.
_DATA_DEFAULTS: dict[str, dict[str, Any]] = {
    "voc": {
        "image_size": 192,
        "arch": "resnet50",
        "head_units": 300,
        "epochs": 30,
        "batch_size": 20,
        "lr": 1e-3,
        "workers": 2,
    },
    "cub": {**_FINE_TUNED, "epochs": 60},
    "caltech101": {**_FINE_TUNED, "epochs": 20},
    # The Stanford Dogs paper: a trained ResNet-50 at 224 x 224, SGD at 0.01, batches of 16, 2
    # epochs, no augmentation. Its SGD is that of Keras, which has no momentum unless told.
    "stanford-dogs": {
        "image_size": 224,
        "arch": "resnet50",
        "augment": False,
        "epochs": 2,
        "batch_size": 16,
        "optimizer": "sgd",
        "lr": 0.01,
        "momentum": 0.0,
        "workers": 2,
    },
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "folder": {"image_size": 224, "arch": "resnet50", "batch_size": 32, "workers": 2},
    # NHWC halves the time of a small network on a CPU. A network that has learnt nothing yet puts
    # out its maps to lower their entropy (99 % dead after two epochs), so the classes come first;
    # the paper begins with a network trained on ImageNet.
    "digits": {"channels_last": True, "warmup_epochs": 3},
}
# What lies in the folder that --root names, for each data set that is on disk.
HOLDS = {
    "voc": "VOCdevkit",
    "cub": "CUB_200_2011",
    "caltech101": "101_ObjectCategories",
    "stanford-dogs": "Images, Annotation, train_list.mat and test_list.mat",
    "cifar10": "cifar-10-batches-py, or train/<class>/ and test/<class>/",
    "cifar100": "cifar-100-python, or train/<class>/ and test/<class>/",
    "folder": "train/<class>/ and test/<class>/ or val/<class>/, or a folder for each class",
}
_BETA = {"voc": 100.0, "digits": 0.1}
_CONSISTENCY: dict[str, Any] = {
    **_SGD,
    "alpha": 0.1,
    "beta": 1e-6,
    "target": "predicted",
    "warmup_epochs": 0,
}

# The interpretable-gradients paper states no lambda: "as high as possible" without harm.
_INTERPRETABLE: dict[str, Any] = {"gradient_weight": 1e-2, "warmup_epochs": 0}

# What a recipe reads and others would ignore without a word: refused there.
_READ_BY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            "alpha",
            "norm",
            "map_relu",
            "view_scale",
            "window",
            "window_size",
            "sigma",
            "padding",
            "insertion_steps",
            "insertion_limit",
            "compare",
        ),
        ("consistency",),
    ),
    **dict.fromkeys(
        ("regularizer", "other_classes", "normalize", "head_path"), ("entropy", "baseline")
    ),
    **dict.fromkeys(("label_smoothing", "warmup_epochs"), ("entropy", "baseline", "interpretable")),
    **dict.fromkeys(("error", "gradient_weight", "every", "engine"), ("interpretable",)),
    "beta": ("entropy", "consistency"),
}

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
    data = given.get("data", FitConfig.data)
    recipe = given.get("recipe", FitConfig.recipe)
    values: dict[str, Any] = dict(_DATA_DEFAULTS.get(data, {}))
    values["beta"] = _BETA.get(data, 0.0) if recipe == "entropy" else 0.0
    if recipe == "consistency":
        values |= _CONSISTENCY
    if recipe == "interpretable":
        values |= _INTERPRETABLE
    values |= given
    if "weights" not in values and _has_published_weights(values):
        values["weights"] = "pretrained"
    elif values.get("weights") == "none":
        values["weights"] = None
    config = FitConfig(**values)
    validate(config)
    return config


def _has_published_weights(values: dict[str, Any]) -> bool:
    """Whether a run on data of a paper that fine-tunes begins with a library's trained network."""
    source, colon, _ = values.get("arch", FitConfig.arch).partition(":")
    named = source in ("torchvision", "timm") if colon else source != FitConfig.arch
    return named and values.get("data") in ("cub", "caltech101", "stanford-dogs")


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
    least |= {
        "every": 1,
        "insertion_steps": 0,
        "insertion_limit": 1,
        "window_size": 1,
        "weight_decay": 0,
    }
    for name, minimum in least.items():
        value = getattr(config, name)
        if value is not None and value < minimum:
            raise CamtrainError(f"{name}: must be at least {minimum}, got {value}")
    for name in ("lr", "lr_factor", "sigma"):
        if not getattr(config, name) > 0:
            raise CamtrainError(f"{name}: must be above 0, got {getattr(config, name)}")
    if not 0 <= config.momentum < 1:
        raise CamtrainError(f"momentum: must be at least 0 and below 1, got {config.momentum}")
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
    """Refuse what the recipe would not read."""
    for name, recipes in _READ_BY.items():
        value, default = getattr(config, name), getattr(FitConfig, name)
        if config.recipe not in recipes and value != default:
            others = " or ".join(repr(recipe) for recipe in recipes if recipe != "baseline")
            raise CamtrainError(
                f"{name}: recipe {config.recipe!r} does not read it, got {value!r}; leave it at "
                f"{default!r} or take recipe {others}"
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
