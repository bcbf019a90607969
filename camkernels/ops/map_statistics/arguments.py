"""Arguments of the kernels of map_statistics, as C++ and CUDA take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from camkernels.ops import _native
from camkernels.ops._native import DTYPE_CODES
from camkernels.ops.map_statistics.reference import Statistics

COUNT = len(Statistics._fields)


def empty_statistics(maps: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The seven outputs, unwritten."""
    batch = maps.shape[0]
    shapes = ((batch,),) * (COUNT - 2) + ((batch, 2), (batch, 2, 2))
    return tuple(maps.new_empty(shape, dtype=dtype) for shape in shapes)


def dense_arguments(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """Statistics and their cotangents as the kernels take them; None stays None."""
    return [None if tensor is None else _native.dense(tensor, dtype) for tensor in tensors]


def map_arguments(maps: Tensor, clamp: bool) -> tuple[Any, ...]:
    batch, height, width = maps.shape
    stride_b, stride_h, stride_w = maps.stride()
    return (
        (batch, 1, height, width),
        maps.data_ptr(),
        DTYPE_CODES[maps.dtype],
        (stride_b, 0, stride_h, stride_w),
        clamp,
    )
