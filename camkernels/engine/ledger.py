"""How much memory a step takes, without taking it: the step is run on the meta device, and every
allocation is entered in a ledger, with the line of work it was made for.

What a library needs inside a call does not pass through PyTorch and is entered by rule: oneDNN
brings the tensors of an NCHW convolution into layouts of its own.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_CONVOLUTIONS = (aten.convolution.default, aten.convolution_backward.default)
_BLANKS = "_camkernels_blank"
# A page: smaller allocations share pages that stay.
_PAGE = 4096


@dataclass
class Ledger:
    """Bytes in use over time.

    Attributes:
        peak: the most at one moment, above the start. at: what ran then.
    """

    device: str = "cpu"
    now: int = 0
    peak: int = 0
    at: str = ""
    counted: dict[int, int] = field(default_factory=dict)

    def enter(self, storage: torch.UntypedStorage, what: str, new: bool) -> None:
        """``new``: it was allocated; else it was there before."""
        key = storage._cdata
        if key in self.counted:
            return
        size = self._rounded(storage.nbytes()) if new else 0
        self.counted[key] = size
        weakref.finalize(storage, self._leave, key)
        self._move(size, what)

    def passing(self, size: int, what: str) -> None:
        """Memory that is taken and given back inside one call."""
        if self.now + size > self.peak:
            self.peak, self.at = self.now + size, what

    def _rounded(self, size: int) -> int:
        unit = 512 if self.device == "cuda" else 1
        return -(-size // unit) * unit

    def _move(self, size: int, what: str) -> None:
        self.now += size
        if self.now > self.peak:
            self.peak, self.at = self.now, what

    def _leave(self, key: int) -> None:
        self.now -= self.counted.pop(key, 0)

    @contextmanager
    def running(self) -> Iterator[Ledger]:
        """Enter what is allocated in this block."""
        with _Mode(self):
            yield self


class _Mode(TorchDispatchMode):
    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        what = str(func)
        self._enter((args, kwargs), what, new=False)
        result = func(*args, **(kwargs or {}))
        if func in _CONVOLUTIONS:
            self.ledger.passing(_workspace(func, args, result, self.ledger.device), what)
        self._enter(result, what, new=True)
        return result

    def _enter(self, tensors: Any, what: str, new: bool) -> None:
        for tensor in pytree.tree_leaves(tensors):
            if isinstance(tensor, Tensor) and tensor.device.type == "meta":
                self.ledger.enter(tensor.untyped_storage(), what, new)


def _bytes(tensor: Any) -> int:
    return tensor.numel() * tensor.itemsize if isinstance(tensor, Tensor) else 0


def _workspace(func: Any, args: tuple[Any, ...], result: Any, device: str) -> int:
    """Of oneDNN: blocked copies of what is not channels_last."""
    if device != "cpu":
        return 0
    outputs = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
    if func is _CONVOLUTIONS[0]:
        touched = [args[0], args[1], *outputs]
    else:
        grad, x, weight, mask = args[0], args[1], args[2], args[-1]
        touched = [grad, *outputs, *([weight] if mask[0] else []), *([x] if mask[1] else [])]
    blocked = [
        t for t in touched
        if not t.is_contiguous(memory_format=torch.channels_last) and t.shape[2:] != (1, 1)
    ]  # fmt: skip
    return sum(map(_bytes, touched if blocked else []))
