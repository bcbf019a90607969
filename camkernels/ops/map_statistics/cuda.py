"""map_statistics by the CUDA kernels of csrc/map_statistics. Signatures: reference.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from camkernels.ops import _cuda_launch as host
from camkernels.ops import _native
from camkernels.ops.map_statistics.arguments import (
    COUNT,
    dense_arguments,
    empty_statistics,
    map_arguments,
)


def map_statistics_fwd(maps: Tensor, clamp: bool) -> tuple[Tensor, ...]:
    host.check_pixels(maps, "maps")
    maps = _native.resolved(maps)
    statistics = empty_statistics(maps, torch.float32)
    pointers = _native.pointers(statistics)
    host.run("map_statistics_fwd", (maps,), *map_arguments(maps, clamp), pointers, 0, 1)
    return statistics


def map_statistics_bwd(maps: Tensor, *arguments: Any) -> Tensor:
    clamp = arguments[-1]
    maps = _native.resolved(maps)
    statistics = dense_arguments(arguments[:COUNT], torch.float32)
    grads = dense_arguments(arguments[COUNT : 2 * COUNT], torch.float32)
    grad_maps = maps.new_empty(maps.shape)
    host.run(
        "map_statistics_bwd", (maps, *statistics, *grads),
        *map_arguments(maps, clamp), _native.pointers(statistics), _native.pointers(grads),
        grad_maps.data_ptr(), 0, 1,
    )  # fmt: skip
    return grad_maps
