"""Models by name, their weights, and the paper's head."""

from __future__ import annotations

import difflib
import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from camtrain.config import FitConfig
from camtrain.errors import CamtrainError
from camtrain.models.cifar_resnet import CifarResNet
from camtrain.models.smallresnet import SmallResNet

PRETRAINED = "pretrained"
# Our own networks, by number of classes.
OWN: dict[str, Callable[[int], nn.Module]] = {
    "smallresnet": SmallResNet,
    **{f"cifar_resnet{6 * n + 2}": functools.partial(CifarResNet, n) for n in (3, 5, 7, 9)},
}

# Where the class activation map is taken by default: the last stage before pooling.
_LAYERS = {
    "smallresnet": "layer3",
    "cifar_resnet": "layer3",
    "resnet": "layer4",
    "resnext": "layer4",
    "wide_resnet": "layer4",
    "squeezenet": "features",
    "convnext": "features",
    "densenet": "features",
    "mobilenet": "features",
    "efficientnet": "features",
    "vgg": "features",
}


def build_model(
    config: FitConfig, classes: int, tell: Callable[[str], None] | None = None
) -> nn.Module:
    """The network of ``config.arch`` with its weights and with a head for ``classes``.

    Args:
        config: of the run. classes: number of logits.
        tell: is called with a line on a head of trained weights that was replaced.

    Raises:
        CamtrainError: an unknown name, a library that does not import, weights that do not fit.
    """
    source, name = split_name(config.arch)
    pretrained = config.weights == PRETRAINED
    model: nn.Module
    if source == "own":
        if pretrained:
            raise CamtrainError(f"weights: {name} takes a file, it has no 'pretrained' ones here")
        model = OWN[name](classes)
    elif source == "torchvision":
        model = _torchvision(name, pretrained)
    elif source == "timm":
        model = _timm(name, pretrained)
    else:
        if pretrained:
            raise CamtrainError("weights: 'pretrained' is for torchvision and timm names")
        model = _factory(source, name)
    state = None if config.weights is None or pretrained else read_weights(Path(config.weights))
    if state is not None and _fits(model, state):
        model.load_state_dict(state)
        state = None
    trained = config.weights is not None and state is None
    replaced = replace_head(model, classes, config.head_units)
    if state is not None:
        load_weights(model, state, f"weights: {config.weights}")
    elif trained and replaced and tell is not None:
        tell(f"weights: {config.weights}, but {replaced}, which begins untrained")
    return model


def plain_model(arch: str) -> nn.Module:
    """The network of a name as its library makes it, untrained and with its own head."""
    source, name = split_name(arch)
    if source == "own":
        raise CamtrainError(f"arch: {name} has no fixed number of classes; give its run folder")
    if source == "torchvision":
        return _torchvision(name, False)
    return _timm(name, False) if source == "timm" else _factory(source, name)


def load_weights(model: nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Load ``state`` into ``model``, in place.

    Raises:
        CamtrainError: it does not fit; begins with ``source``.
    """
    if not _fits(model, state):
        raise CamtrainError(f"{source} {_other_classes(model, state) or _difference(model, state)}")
    model.load_state_dict(state)


def split_name(arch: str) -> tuple[str, str]:
    """Where a model comes from (own, torchvision, timm, or a module) and its name there."""
    if arch in OWN:
        return "own", arch
    source, colon, name = arch.partition(":")
    if colon:
        return source, name
    torchvision = _library("torchvision.models", arch, f"timm:{arch} takes timm's")
    if arch in torchvision.list_models():
        return "torchvision", arch
    timm = _library("timm", arch, "torchvision has no model of this name")
    if timm.is_model(arch):
        return "timm", arch
    near = difflib.get_close_matches(arch, [*OWN, *torchvision.list_models()], n=3)
    near += difflib.get_close_matches(arch, timm.list_models(), n=3)
    raise CamtrainError(
        f"arch: neither {', '.join(OWN)} nor a model of torchvision or timm: {arch!r}"
        + (f"; near names: {', '.join(dict.fromkeys(near))}" if near else "")
    )


def default_layer(arch: str) -> str:
    """The layer whose map is taken where ``layer`` is not given."""
    name = arch.rpartition(":")[2]
    fits = [prefix for prefix in _LAYERS if name.startswith(prefix)]
    if not fits or (arch.startswith("timm:") and _LAYERS[max(fits, key=len)] == "features"):
        raise CamtrainError(f"layer: no default for arch {arch!r}; pass --layer")
    return _LAYERS[max(fits, key=len)]


def _library(module: str, arch: str, hint: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:  # a broken binary raises RuntimeError or OSError as well
        raise CamtrainError(
            f"arch: {arch!r} needs {module.partition('.')[0]}, which does not import: "
            f"{type(error).__name__}: {error} ({hint})"
        ) from error


def _torchvision(name: str, pretrained: bool) -> nn.Module:
    models = _library("torchvision.models", name, "pip install torchvision")
    make = models.get_model
    return _made(lambda: make(name, weights="DEFAULT" if pretrained else None), name, pretrained)


def _timm(name: str, pretrained: bool) -> nn.Module:
    timm = _library("timm", name, "pip install timm")
    return _made(lambda: timm.create_model(name, pretrained=pretrained), name, pretrained)


def _factory(module: str, name: str) -> nn.Module:
    try:
        factory = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise CamtrainError(
            f"arch: module:factory {module}:{name} is not there: {error}"
        ) from error
    return _made(factory, f"{module}:{name}")


def _made(make: Callable[[], Any], name: str, pretrained: bool = False) -> nn.Module:
    try:
        model = make()
    except Exception as error:
        hint = " (--weights takes a file, 'pretrained', which may download, or 'none')"
        raise CamtrainError(
            f"arch: {name} could not be made: {error}{hint * pretrained}"
        ) from error
    if not isinstance(model, nn.Module):
        raise CamtrainError(f"arch: {name} gives {type(model).__name__}, expected an nn.Module")
    return model


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """A state_dict, alone or under ``state_dict`` or ``model``, in float32.

    Loaded with ``weights_only``: a file cannot run code.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CamtrainError(f"weights: no file {path}") from None
    except Exception as error:  # bytes that are no pickle raise whatever they happen to mean
        first = str(error).partition("\n")[0]
        raise CamtrainError(f"weights: {path} is no file of tensors: {first}") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(
        isinstance(value, torch.Tensor) for value in content.values()
    ):
        raise CamtrainError(f"weights: {path} holds no state_dict")
    state = {key.removeprefix("module."): value for key, value in content.items()}
    return {
        key: value.float() if value.is_floating_point() else value for key, value in state.items()
    }


def _own(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What ``state`` must hold. Files from before PyTorch 1 do not count BatchNorm's batches, and
    ``load_state_dict`` fills that in."""
    own = model.state_dict()
    counted = any(key.endswith("num_batches_tracked") for key in state)
    return {k: v for k, v in own.items() if counted or not k.endswith("num_batches_tracked")}


def _fits(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    own = _own(model, state)
    return own.keys() == state.keys() and all(own[k].shape == v.shape for k, v in state.items())


def _other_classes(model: nn.Module, state: dict[str, torch.Tensor]) -> str:
    """How the numbers of classes differ; empty where more than the last layer does."""
    own = _own(model, state)
    if own.keys() != state.keys():
        return ""
    names = {key.rpartition(".")[0] for key in own if own[key].shape != state[key].shape}
    last = [key for key, module in model.named_modules() if isinstance(module, nn.Linear)][-1:]
    if not last or names != set(last):
        return ""
    wide, got = own[f"{last[0]}.weight"].shape, state[f"{last[0]}.weight"].shape
    if wide[1:] != got[1:]:
        return ""
    return (
        f"has a head of {got[0]} classes, and the data has {wide[0]}; take weights of "
        f"{wide[0]} classes, or another data set"
    )


def _difference(model: nn.Module, state: dict[str, torch.Tensor]) -> str:
    own = _own(model, state)
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    parts = [
        f"{what} {len(keys)} ({', '.join(keys[:3])}{', ...' * (len(keys) > 3)})"
        for what, keys in (("lacks", missing), ("has too many", extra), ("other shapes", shapes))
        if keys
    ]
    return "does not fit the model: " + "; ".join(parts)


def make_head(channels: int, classes: int, units: int) -> nn.Module:
    """The paper's head, Linear, ReLU, Linear; or one Linear where ``units`` is 0."""
    if units == 0:
        return nn.Linear(channels, classes)
    return nn.Sequential(nn.Linear(channels, units), nn.ReLU(), nn.Linear(units, classes))


def replace_head(model: nn.Module, classes: int, units: int) -> str:
    """Put a head for ``classes`` in place of the model's classifier, in place.

    The convolutional classifier of SqueezeNet ends in a ReLU, which leaves no negative logits; the
    paper's head is pooling and dense layers, so all of it is replaced. Elsewhere the last Linear
    is. Dropout before it goes: the paper has none, and it would shut out the closed form.

    Returns:
        what was replaced by what; empty where nothing was.
    """
    made = "Linear" if units == 0 else f"Linear({units}), ReLU, Linear"
    if type(model).__name__ == "SqueezeNet":
        old = next(m for m in model.classifier if isinstance(m, nn.Conv2d))  # type: ignore[union-attr]
        head = make_head(old.in_channels, classes, units)
        model.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
        return (
            f"its convolutional classifier of {old.out_channels} classes was replaced by pooling "
            f"and {made} for {classes}"
        )
    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not linears:
        raise CamtrainError(f"arch: {type(model).__name__} has no Linear to replace by a head")
    name, last = linears[-1]
    if units == 0 and last.out_features == classes:
        return ""
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    setattr(parent, child, make_head(last.in_features, classes, units))
    if isinstance(parent, nn.Sequential):
        position = list(parent._modules).index(child)
        before = list(parent._modules)[position - 1] if position else None
        if before is not None and isinstance(parent._modules[before], nn.Dropout):
            parent._modules[before] = nn.Identity()
    return f"its last layer of {last.out_features} classes was replaced by {made} for {classes}"
