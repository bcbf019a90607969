"""map_statistics by the C++ kernels of csrc/map_statistics. Signatures: reference.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from camkernels import _cpu
from camkernels.ops import _cpu_view, _layout
from camkernels.ops._cpu_view import DTYPE_CODES
from camkernels.ops.map_statistics.reference import Statistics

COUNT = len(Statistics._fields)


def empty_statistics(maps: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The seven outputs, unwritten."""
    batch = maps.shape[0]
    shapes = ((batch,),) * (COUNT - 2) + ((batch, 2), (batch, 2, 2))
    return tuple(maps.new_empty(shape, dtype=dtype) for shape in shapes)


def dense_arguments(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """Statistics and their cotangents as the kernels take them; None stays None."""
    return [None if tensor is None else _cpu_view.dense(tensor, dtype) for tensor in tensors]


def _map_arguments(maps: Tensor, clamp: bool) -> tuple[Any, ...]:
    batch, height, width = maps.shape
    stride_b, stride_h, stride_w = maps.stride()
    return (
        (batch, 1, height, width),
        maps.data_ptr(),
        DTYPE_CODES[maps.dtype],
        (stride_b, 0, stride_h, stride_w),
        clamp,
    )


def map_statistics_fwd(maps: Tensor, clamp: bool) -> tuple[Tensor, ...]:
    maps = _cpu_view.resolved(maps)
    dtype = _layout.accumulate_dtype(maps.dtype)
    statistics = empty_statistics(maps, dtype)
    threads = _cpu_view.threads(maps.numel())
    scratch = maps.new_empty((threads, *maps.shape[1:]), dtype=dtype)
    _cpu.map_statistics_fwd(
        *_map_arguments(maps, clamp), _cpu_view.pointers(statistics), scratch.data_ptr(), threads
    )
    return statistics


def map_statistics_bwd(maps: Tensor, *arguments: Any) -> Tensor:
    clamp = arguments[-1]
    maps = _cpu_view.resolved(maps)
    dtype = _layout.accumulate_dtype(maps.dtype)
    statistics = dense_arguments(arguments[:COUNT], dtype)
    grads = dense_arguments(arguments[COUNT : 2 * COUNT], dtype)
    grad_maps = maps.new_empty(maps.shape)
    threads = _cpu_view.threads(maps.numel())
    scratch = maps.new_empty((threads, 2, *maps.shape[1:]), dtype=dtype)
    _cpu.map_statistics_bwd(
        *_map_arguments(maps, clamp),
        _cpu_view.pointers(statistics),
        _cpu_view.pointers(grads),
        grad_maps.data_ptr(),
        scratch.data_ptr(),
        threads,
    )
    return grad_maps
