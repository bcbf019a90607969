"""Which modules are swapped, for what, and why others are left alone."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from camkernels.nn import modules

ORIGINAL = "_swapped_from"
"""Attribute of a swapped module: the class it had."""

_SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    nn.ReLU: modules.ReLU,
    nn.Conv2d: modules.Conv2d,
    nn.BatchNorm2d: modules.BatchNorm2d,
    nn.SyncBatchNorm: modules.SyncBatchNorm,
    nn.MaxPool2d: modules.MaxPool2d,
}
_KINDS: dict[type[nn.Module], str] = {
    modules.ReLU: "relu",
    modules.Conv2d: "conv",
    modules.BatchNorm2d: "bn",
    modules.SyncBatchNorm: "sync_bn",
    modules.MaxPool2d: "max_pool",
    nn.Identity: "identity",
}
_ACTIVATIONS = (
    nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softsign,
    nn.Threshold, nn.LogSigmoid, nn.Tanhshrink, nn.Softshrink, nn.Hardshrink, nn.GLU,
)  # fmt: skip


def _timm() -> Any:
    """Our module for timm, where a model can hold something of timm's."""
    if "timm" not in sys.modules:
        return None
    try:
        from camkernels.nn import _timm
    except ImportError:  # an old timm
        return None
    return _timm


def target_of(module: nn.Module) -> type[nn.Module] | None:
    """The class that ``swap_in`` gives to ``module``; None where it leaves it alone."""
    kind: type[Any] = type(module)
    conv: Any = module
    if kind is nn.Conv2d and modules.symmetric_padding(conv) is None:
        return None
    if kind is nn.MaxPool2d and modules.pooling_window(module) is None:  # type: ignore[arg-type]
        return None
    if kind in _SWAPS:
        return _SWAPS[kind]
    timm = _timm()
    if timm is not None and kind is timm.TimmBatchNormAct2d and _known_activation(module):
        return timm.BatchNormAct2d
    return None


def _known_activation(module: Any) -> bool:
    acts = (nn.ReLU, modules.ReLU, nn.Identity)
    return type(module.act) in acts and type(module.drop) is nn.Identity


def kind_of(module: nn.Module) -> str | None:
    """What ``module`` is, or will be once swapped: ``"conv"``, ``"bn"``, ``"sync_bn"``,
    ``"bn_act"`` (timm's, without activation), ``"bn_relu"``, ``"relu"``, ``"max_pool"``,
    ``"identity"``, None."""
    kind = target_of(module) or type(module)
    if kind in _KINDS:
        return _KINDS[kind]
    timm = _timm()
    if timm is not None and kind is timm.BatchNormAct2d and _known_activation(module):
        return "bn_act" if type(module.act) is nn.Identity else "bn_relu"
    return None


def is_ours(module: nn.Module) -> bool:
    """Whether ``module`` is of a class of camkernels that runs in place of PyTorch's."""
    timm = _timm()
    ours = (*_SWAPS.values(), modules.BatchNormReLU2d)
    return type(module) in ours or (timm is not None and type(module) is timm.BatchNormAct2d)


def is_fsdp_wrapper(module: nn.Module) -> bool:
    """Whether ``module`` is FSDP's wrapper (by its name: importing it is slow)."""
    return type(module).__name__ == "FullyShardedDataParallel"


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP, by its wrapper or by ``fully_shard``, holds the parameters of ``module``."""
    return is_fsdp_wrapper(module) or bool(getattr(module, "_is_fsdp_managed_module", False))


def opaque_reason(module: nn.Module) -> str | None:
    """Why nothing below ``module`` is touched; None for ordinary modules."""
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript is compiled: swap before torch.jit.script"
    name = f"{type(module).__module__}.{type(module).__name__}"
    if "_checkpoint_wrapped_module" in module._modules:
        return f"{type(module).__name__} recomputes what it wraps"
    if name.startswith(("torch.ao.", "torch.nn.quantized", "torch.nn.qat", "torch.nn.intrinsic")):
        return "quantised"
    return None


def left_alone_reason(module: nn.Module) -> str | None:
    """Why ``module``, which looks like one to swap, is not swapped; None for all others."""
    kind = type(module)
    if is_ours(module) or target_of(module) is not None:
        return None
    if parametrize.is_parametrized(module) and isinstance(module, tuple(_SWAPS)):
        return "its parameters are parametrised"
    if kind is nn.Conv2d:
        mode, padding = module.padding_mode, module.padding
        return (
            f"padding_mode={mode!r}" if mode != "zeros" else f"padding={padding!r}, not symmetric"
        )
    if kind is nn.MaxPool2d:
        return (
            "return_indices=True"
            if module.return_indices
            else (
                f"kernel_size={module.kernel_size!r}: our positions number 256 elements of a window"
            )
        )
    if isinstance(module, tuple(_SWAPS)):
        return f"of class {kind.__name__}, a subclass whose forward may differ"
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return f"{kind.__name__} has no kernel"
    if isinstance(module, _ACTIVATIONS):
        return f"{kind.__name__} is not guided: only ReLU has a guided backward"
    return None
