"""The forward of any model with ReLUs that can be guided, its modules untouched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from camkernels.nn import functional as ck_functional
from camkernels.nn import modules as ck_modules
from camkernels.nn._rewritten import RewrittenForward

_PLAIN = (torch.relu, Tensor.relu)
_IN_PLACE = (torch.relu_, Tensor.relu_)


class GuidedReLUs(TorchFunctionMode):
    """Inside the block every ReLU that Python calls, module or function, is camkernels' own: the
    same values, and a backward that is plain, or guided in ``ck.guided()``.

    ReLUs inside TorchScript and compiled regions are not seen. Values that a tracer hands around in
    the place of tensors pass as they are: swapped networks are traced when first called. ``count``
    says how many were seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.relu or func in _PLAIN or func in _IN_PLACE:
            self.count += 1
            x = args[0] if args else kwargs["input"]
            if not isinstance(x, Tensor):
                return func(*args, **kwargs)
            inplace = func in _IN_PLACE
            if func is F.relu:
                inplace = bool(kwargs.get("inplace", args[1] if len(args) > 1 else False))
            with torch._C.DisableTorchFunction():
                return ck_functional.relu(x, inplace)
        return func(*args, **kwargs)


def has_guidable(model: nn.Module) -> bool:
    """Whether ReLUs of camkernels may be in the model already (``ck.swap_in``): as modules, or in a
    forward that it put there."""
    return any(
        isinstance(m, (ck_modules.ReLU, ck_modules.BatchNormReLU2d))
        or isinstance(m.__dict__.get("forward"), RewrittenForward)
        or hasattr(m.__dict__.get("forward"), "is_engine")
        for m in model.modules()
    )
