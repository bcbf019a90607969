"""A network for many forwards of pictures without a gradient: convolution, BatchNorm, sum and ReLU
as one pass over memory."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from camkernels import backends
from camkernels.nn.swap import swap_in
from camkernels.taps.modules import unwrap

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def fused_twin(model: nn.Module) -> Callable[[Tensor], Any]:
    """``model`` as it is now, made to run fast; ``model`` itself where that could be seen.

    The twin has modules of its own, swapped by :func:`camkernels.swap_in`, over the same
    parameters and buffers: of the user's model nothing is changed or copied. A model in training
    mode, one with hooks or a patched forward (compiled, on an engine, swapped in), and one that
    cannot be copied run as they are.

    Its numbers differ from the model's by the rounding of a BatchNorm.
    """
    if backends.current_backend() != "auto" or not _is_plain(model):
        return model
    tensors = [*model.parameters(), *model.buffers()]
    try:
        twin: nn.Module = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of ReLUs that stay plain in a guided backward
            swap_in(twin)
    except Exception:  # whatever a user's module does when it is copied
        return model
    shared = {id(tensor) for tensor in tensors}
    own = [t for t in (*twin.parameters(), *twin.buffers()) if id(t) not in shared]
    return model if own else twin


def _is_plain(model: nn.Module) -> bool:
    try:
        if unwrap(model) is not model:
            return False
    except TypeError:
        return False
    for module in model.modules():
        if module.training or "forward" in module.__dict__ or module._compiled_call_impl:
            return False
        if any(getattr(module, name) for name in _HOOKS):
            return False
        if isinstance(module, torch.jit.ScriptModule):
            return False
    return True
