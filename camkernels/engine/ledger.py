"""How much memory a step takes, without taking it: the step is run on the meta device, and every
allocation is entered in a ledger, with the line of work it was made for.

What a library needs inside a call does not pass through PyTorch and is entered by rule: oneDNN
brings the tensors of an NCHW convolution into layouts of its own.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from camkernels.ops.conv2d import pointwise

aten = torch.ops.aten
_CONVOLUTIONS = (aten.convolution.default, aten.convolution_backward.default)
# Channels of images that oneDNN's first convolutions read as they lie.
_PICTURES = (1, 3)
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
        way = pointwise.meta_as_cpu() if self.device == "cpu" else nullcontext()
        with way, _Mode(self):
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
    """Of oneDNN, with the results: blocked copies of what is not channels_last. What was read is
    freed before a blocked result is written out."""
    backward = func is not _CONVOLUTIONS[0]
    x, weight = args[backward], args[backward + 1]
    if device != "cpu" or _as_matrices(x, weight, args):
        return 0
    read = 0 if x.shape[1] in _PICTURES and weight.shape[1] == x.shape[1] else _bytes(x)
    if not backward:
        if not _blocked(x, weight, result):
            return 0
        return max(read + _bytes(weight) + _bytes(result), 2 * _bytes(result))
    grad, (dx, dw, _) = args[0], result
    if not _blocked(grad, x, weight):
        return 0
    strided = max(weight.shape[2:]) == 1 and grad.shape[2:] != x.shape[2:]
    data = max(_bytes(grad) + _bytes(weight) + _bytes(dx), (3 if strided else 2) * _bytes(dx))
    weights = _bytes(dx) + max(_bytes(grad) + read + _bytes(dw), 2 * _bytes(dw))
    return max(data if dx is not None else 0, weights if dw is not None else 0)


def _blocked(*tensors: Tensor) -> bool:
    return any(
        not t.is_contiguous(memory_format=torch.channels_last) and t.shape[2:] != (1, 1)
        for t in tensors
    )


def _as_matrices(x: Tensor, weight: Tensor, args: tuple[Any, ...]) -> bool:
    """Whether PyTorch multiplies matrices where they lie: 1x1 convolutions of fewer than 16 images
    on one thread (``ConvParams::use_mkldnn``)."""
    pairs = [a for a in args if isinstance(a, (list, tuple)) and len(a) == 2]
    stride, dilation = pairs[0], pairs[2]
    plain = set(stride) | set(dilation) == {1}
    return weight.shape[2:] == (1, 1) and plain and len(x) < 16 and torch.get_num_threads() == 1
