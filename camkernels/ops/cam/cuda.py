"""cam by the CUDA kernels of csrc/cam: one launch each way. Signatures: reference.py."""

from __future__ import annotations

import torch
from torch import Tensor

from camkernels.ops import _cuda_launch as host
from camkernels.ops import _gpu, _layout
from camkernels.ops.cam.arguments import backward_arguments, forward_arguments


def cam_fwd(activations: Tensor, gradients: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
    host.check_pixels(activations, "activations")
    maps, alpha, arguments, _alive = forward_arguments(activations, gradients, relu, host.split)
    arrivals = _gpu.arrival_counters(maps.shape[0], maps.device)
    host.run("cam_fwd", (activations, gradients), arrivals.data_ptr(), *arguments)
    return maps, alpha if gradients.dim() == 4 else _layout.placeholder(maps)


def cam_bwd(
    grad_maps: Tensor,
    activations: Tensor | None,
    alpha: Tensor | None,
    maps: Tensor | None,
    channels_last: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    grad_activations, grad_alpha, arguments, _alive = backward_arguments(
        grad_maps, activations, alpha, maps, channels_last, dtype, host.split
    )
    host.run("cam_bwd", (grad_maps, activations, alpha, maps), *arguments)
    return grad_activations, grad_alpha
