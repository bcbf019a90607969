"""cam_statistics by the CUDA kernels of csrc/cam_statistics: one launch each way.

Signatures: reference.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from camkernels.ops import _cuda_launch as host
from camkernels.ops import _gpu, _layout, _native
from camkernels.ops.cam.arguments import backward_arguments, forward_arguments
from camkernels.ops.map_statistics.arguments import COUNT, dense_arguments, empty_statistics


def cam_statistics_fwd(activations: Tensor, gradients: Tensor, relu: bool) -> tuple[Tensor, ...]:
    host.check_pixels(activations, "activations")
    maps, alpha, arguments, _alive = forward_arguments(activations, gradients, relu, host.split)
    total = maps.new_empty(maps.shape[0])
    statistics = empty_statistics(maps, maps.dtype)
    arrivals = _gpu.arrival_counters(maps.shape[0], maps.device)
    host.run(
        "cam_statistics_fwd", (activations, gradients),
        arrivals.data_ptr(), total.data_ptr(), _native.pointers(statistics), *arguments,
    )  # fmt: skip
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
    statistics = dense_arguments(arguments[:COUNT], torch.float32)
    grads = dense_arguments(arguments[COUNT : 2 * COUNT], torch.float32)
    grad_activations, grad_alpha, cam_arguments, _alive = backward_arguments(
        grad_maps, activations, alpha, maps, channels_last, dtype, host.split
    )
    host.run(
        "cam_statistics_bwd", (maps, activations, alpha, grad_maps, *statistics, *grads),
        relu, _native.pointers(statistics), _native.pointers(grads), *cam_arguments,
    )  # fmt: skip
    return grad_activations, grad_alpha
