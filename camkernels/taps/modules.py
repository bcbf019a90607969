"""Finding modules inside a user's model."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch
from torch import nn

from camkernels.nn._kinds import is_fsdp_wrapper, is_sharded

LayerLike = str | nn.Module
SHARDED = (
    "FSDP (FullyShardedDataParallel, fully_shard) frees the parameters at the end of the first "
    "backward, which is one inside of the loss: use nn.parallel.DistributedDataParallel"
)


def refuse_sharded(model: nn.Module) -> None:
    """Raise TypeError where FSDP holds ``model`` or a part of it."""
    if any(is_sharded(module) for module in model.modules()):
        raise TypeError(f"model: {SHARDED}")


def refuse_replica(module: nn.Module, expected: nn.Module) -> None:
    """Raise TypeError where ``module`` is what nn.DataParallel runs for ``expected``."""
    if module is not expected and getattr(module, "_is_replica", False):
        raise TypeError(
            "model: nn.DataParallel is not supported (its replicas live for one forward); use "
            "nn.parallel.DistributedDataParallel"
        )


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside DistributedDataParallel and ``torch.compile`` wrappers.

    Raises:
        TypeError: not a module; ``nn.DataParallel``, whose replicas live for one forward only, so
            that a tap on the model never sees them; or FSDP's wrapper, inside which a module has
            its parameters during its own forward only.
    """
    while True:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if isinstance(model, nn.DataParallel):
            raise TypeError(
                "model: nn.DataParallel is not supported (its replicas live for one forward and a "
                "tap never sees them); use nn.parallel.DistributedDataParallel"
            )
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
            model = model._orig_mod
        elif any(is_fsdp_wrapper(module) for module in model.modules()):
            raise TypeError(
                "model: FullyShardedDataParallel (FSDP) is not supported: inside of it a module "
                "has its parameters during its own forward only; use "
                "nn.parallel.DistributedDataParallel"
            )
        else:
            return model


def _near_names(name: str, names: Sequence[str]) -> str:
    # "layer5" is near "layer4", and "fc1" near "head.fc1".
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    near += [n for n in names if n.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]][:3]
    shown = list(dict.fromkeys(near)) or [n for n in names if "." not in n][:12]
    return ", ".join(repr(n) for n in shown)


def find_layer(model: nn.Module, layer: LayerLike) -> tuple[str, nn.Module]:
    """Qualified name and module of ``layer``, given as either.

    Raises:
        ValueError: no such name (the near names are told), or a module that is not in the model.
        TypeError: neither a name nor a module.
    """
    named = dict(model.named_modules())
    if isinstance(layer, nn.Module):
        for name, module in named.items():
            # The compiled wrapper stands before what it wraps, and its hooks run uncompiled.
            if module is layer or getattr(module, "_orig_mod", None) is layer:
                return name, module
        raise ValueError(
            f"layer: this {type(layer).__name__} is not a submodule of the model "
            f"({type(model).__name__})"
        )
    if not isinstance(layer, str):
        raise TypeError(f"layer: expected a name or a module, got {type(layer).__name__}")
    if layer in named and layer:
        return layer, named[layer]
    # Inside a compiled submodule the names gain a prefix that the user did not write.
    plain = {n.replace("._orig_mod", "").replace("_orig_mod.", ""): n for n in named if n}
    if layer in plain:
        return plain[layer], named[plain[layer]]
    raise ValueError(
        f"layer: no module named {layer!r} in {type(model).__name__}; "
        f"near names: {_near_names(layer, list(plain))}"
    )


def find_layers(
    model: nn.Module, layers: LayerLike | Sequence[LayerLike]
) -> list[tuple[str, nn.Module]]:
    """As :func:`find_layer`, for one or several layers."""
    single = isinstance(layers, (str, nn.Module)) or not isinstance(layers, Sequence)
    given: Sequence[LayerLike] = [layers] if single else layers  # type: ignore[list-item,assignment]
    if not given:
        raise ValueError("layer: expected at least one layer, got an empty sequence")
    found = [find_layer(model, layer) for layer in given]
    if len({name for name, _ in found}) != len(found):
        raise ValueError(f"layer: a layer is given twice: {[name for name, _ in found]}")
    return found


def leaves(model: nn.Module) -> list[nn.Module]:
    """Modules without children, except those inside compiled submodules, which run as one."""
    found: list[nn.Module] = []
    pending = list(model.children())
    while pending:
        module = pending.pop()
        children = list(module.children())
        if not children or isinstance(module, torch._dynamo.eval_frame.OptimizedModule):
            found.append(module)
        else:
            pending.extend(children)
    return found
