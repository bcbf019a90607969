"""map_statistics by the C++ kernels of csrc/map_statistics. Signatures: reference.py."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from camkernels import _cpu
from camkernels.ops import _cpu_view, _layout, _native
from camkernels.ops.map_statistics.arguments import (
    COUNT,
    dense_arguments,
    empty_statistics,
    map_arguments,
)


def map_statistics_fwd(maps: Tensor, clamp: bool) -> tuple[Tensor, ...]:
    maps = _native.resolved(maps)
    dtype = _layout.accumulate_dtype(maps.dtype)
    statistics = empty_statistics(maps, dtype)
    threads = _cpu_view.threads(maps.numel())
    scratch = maps.new_empty((threads, *maps.shape[1:]), dtype=dtype)
    _cpu.map_statistics_fwd(
        *map_arguments(maps, clamp), _native.pointers(statistics), scratch.data_ptr(), threads
    )
    return statistics


def map_statistics_bwd(maps: Tensor, *arguments: Any) -> Tensor:
    clamp = arguments[-1]
    maps = _native.resolved(maps)
    dtype = _layout.accumulate_dtype(maps.dtype)
    statistics = dense_arguments(arguments[:COUNT], dtype)
    grads = dense_arguments(arguments[COUNT : 2 * COUNT], dtype)
    grad_maps = maps.new_empty(maps.shape)
    threads = _cpu_view.threads(maps.numel())
    scratch = maps.new_empty((threads, 2, *maps.shape[1:]), dtype=dtype)
    _cpu.map_statistics_bwd(
        *map_arguments(maps, clamp),
        _native.pointers(statistics),
        _native.pointers(grads),
        grad_maps.data_ptr(),
        scratch.data_ptr(),
        threads,
    )
    return grad_maps
