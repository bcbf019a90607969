"""What compilers must leave alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(function: Function) -> Function:
    """``function`` and all that it calls are never traced, but run as they are.

    A compiler that makes one region of what a criterion does around ``torch.autograd.grad`` drops
    the second order of that region, without a word: of a cross-entropy that is differentiated by
    the images, say.
    """
    disabled: Function = torch.compiler.disable(function)
    return disabled
