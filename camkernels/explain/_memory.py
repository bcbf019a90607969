"""How many images at a time stay within a memory budget: measured on one of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

Budget = int | str
"""Bytes, or a text such as "512MiB" or "2GB"."""

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_BINARY = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def bytes_of(budget: Budget) -> int:
    """Bytes of a budget; ValueError for another text or none at all."""
    if isinstance(budget, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", budget.lower())
        if found is None or (found[3] and not found[2]):
            raise ValueError(
                f"memory_budget: expected bytes or a text such as '512MiB', got {budget!r}"
            )
        budget = int(float(found[1]) * (_BINARY if found[3] else _UNITS)[found[2]])
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise TypeError(f"memory_budget: expected bytes or a text such as '512MiB', got {budget!r}")
    if budget < 1:
        raise ValueError(f"memory_budget: expected a positive number of bytes, got {budget}")
    return budget


class _Peak(TorchDispatchMode):
    """The most bytes of tensors that were alive at once, of those made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {
            t.untyped_storage()._cdata
            for t in pytree.tree_leaves((args, kwargs))
            if isinstance(t, Tensor)
        }
        output = func(*args, **(kwargs or {}))
        self._alive = {k: v for k, v in self._alive.items() if not v[0].expired()}
        for tensor in pytree.tree_leaves(output):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given:  # no view, and nothing written in place
                    self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.bytes = max(self.bytes, sum(size for _, size in self._alive.values()))
        return output


def images_within(budget: Budget, run: Callable[[], Any]) -> int:
    """How many images go at a time, ``run`` being what is done with one.

    The largest number of bytes that the tensors made in it hold at once is taken for each image.
    What a library takes inside a call (the workspace of a convolution) is not seen.

    Raises:
        ValueError: one image needs more.
    """
    allowed = bytes_of(budget)
    with _Peak() as peak:
        run()
    if peak.bytes > allowed:
        raise ValueError(
            f"memory_budget: one image takes {peak.bytes / 2**20:.1f} MiB, more than the "
            f"{allowed / 2**20:.1f} MiB given"
        )
    return max(1, allowed // max(peak.bytes, 1))
