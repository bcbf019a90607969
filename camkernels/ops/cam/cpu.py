"""cam by the C++ kernels of csrc/cam. Signatures: reference.py."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from camkernels import _cpu
from camkernels.ops import _cpu_view, _layout
from camkernels.ops.cam.arguments import Work, backward_arguments, forward_arguments


def split(shape: Sequence[int], like: Tensor) -> Work:
    return Work(
        block=_cpu_view.channel_block(*shape[:2]),
        threads=_cpu_view.threads(math.prod(shape)),
        streams=lambda out: _cpu_view.streams(out.numel(), out.dtype),
        masked=True,
    )


def cam_fwd(activations: Tensor, gradients: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
    maps, alpha, arguments, _alive = forward_arguments(activations, gradients, relu, split)
    _cpu.cam_fwd(*arguments)
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
        grad_maps, activations, alpha, maps, channels_last, dtype, split
    )
    _cpu.cam_bwd(*arguments)
    return grad_activations, grad_alpha
