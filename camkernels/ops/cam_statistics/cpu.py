"""cam_statistics by the C++ kernels of csrc/cam_statistics. Signatures: reference.py."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from camkernels import _cpu
from camkernels.ops import _layout, _native
from camkernels.ops.cam.arguments import backward_arguments, forward_arguments
from camkernels.ops.cam.cpu import split
from camkernels.ops.map_statistics.arguments import COUNT, dense_arguments, empty_statistics


def cam_statistics_fwd(activations: Tensor, gradients: Tensor, relu: bool) -> tuple[Tensor, ...]:
    maps, alpha, arguments, _alive = forward_arguments(activations, gradients, relu, split)
    total = maps.new_empty(maps.shape[0])
    statistics = empty_statistics(maps, maps.dtype)
    _cpu.cam_statistics_fwd(total.data_ptr(), _native.pointers(statistics), *arguments)
    kept = alpha if gradients.dim() == 4 else _layout.placeholder(maps)
    return maps, kept, total, *statistics


def cam_statistics_bwd(
    maps: Tensor,
    activations: Tensor | None,
    alpha: Tensor | None,
    grad_maps: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, Tensor]:
    relu, channels_last, dtype = arguments[2 * COUNT :]
    accumulate = _layout.accumulate_dtype(maps.dtype)
    statistics = dense_arguments(arguments[:COUNT], accumulate)
    grads = dense_arguments(arguments[COUNT : 2 * COUNT], accumulate)
    grad_activations, grad_alpha, cam_arguments, _alive = backward_arguments(
        grad_maps, activations, alpha, maps, channels_last, dtype, split
    )
    _cpu.cam_statistics_bwd(
        relu, _native.pointers(statistics), _native.pointers(grads), *cam_arguments
    )
    return grad_activations, grad_alpha
