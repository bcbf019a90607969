"""cam by the C++ kernels of csrc/cam: allocates and passes pointers. Signatures: reference.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from camkernels import _cpu
from camkernels.ops import _cpu_view, _layout
from camkernels.ops._cpu_view import DTYPE_CODES, NO_STRIDES


def forward_arguments(
    activations: Tensor, gradients: Tensor, relu: bool
) -> tuple[Tensor, Tensor, tuple[Any, ...], tuple[Tensor, ...]]:
    """maps, alpha, the arguments of the kernel, and what must stay alive while it runs."""
    activations, gradients = _cpu_view.resolved(activations), _cpu_view.resolved(gradients)
    batch, channels, height, width = shape = activations.shape
    dtype = _layout.accumulate_dtype(activations.dtype)
    maps = activations.new_empty((batch, height, width), dtype=dtype)
    if gradients.dim() == 4:
        alpha = activations.new_empty((batch, channels), dtype=dtype)
        pooled = gradients.data_ptr(), DTYPE_CODES[gradients.dtype], gradients.stride()
    else:
        alpha = _cpu_view.dense(gradients, dtype)
        pooled = 0, 0, NO_STRIDES
    block = _cpu_view.channel_block(batch, channels)
    blocks = -(-channels // block)
    partial = maps
    if blocks > 1:
        partial = activations.new_empty((batch, blocks, height, width), dtype=dtype)
    arguments = (
        shape,
        activations.data_ptr(),
        DTYPE_CODES[activations.dtype],
        activations.stride(),
        *pooled,
        alpha.data_ptr(),
        partial.data_ptr(),
        maps.data_ptr(),
        block,
        relu,
        _cpu_view.threads(activations.numel()),
    )
    return maps, alpha, arguments, (activations, gradients, partial)


def cam_fwd(activations: Tensor, gradients: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
    maps, alpha, arguments, _alive = forward_arguments(activations, gradients, relu)
    _cpu.cam_fwd(*arguments)
    return maps, alpha if gradients.dim() == 4 else _layout.placeholder(maps)


def backward_arguments(
    grad_maps: Tensor | None,
    activations: Tensor | None,
    alpha: Tensor | None,
    maps: Tensor | None,
    channels_last: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, tuple[Any, ...], tuple[Any, ...]]:
    """grad_activations, grad_alpha (placeholders where not wanted), arguments, what stays alive."""
    like = grad_maps if grad_maps is not None else maps
    assert like is not None
    batch, height, width = like.shape
    given = activations if activations is not None else alpha
    channels = 1 if given is None else given.shape[1]
    accumulate = _layout.accumulate_dtype(like.dtype)
    code = DTYPE_CODES[accumulate]
    masked = like.new_empty((batch, height, width), dtype=accumulate)
    cotangent: tuple[Any, ...] = (0, code, NO_STRIDES)
    if grad_maps is not None:
        grad_maps = _cpu_view.resolved(grad_maps).to(accumulate)
        stride_b, stride_h, stride_w = grad_maps.stride()
        cotangent = grad_maps.data_ptr(), code, (stride_b, 0, stride_h, stride_w)
    if maps is not None:
        maps = _cpu_view.dense(maps, accumulate)

    grad_alpha = grad_activations = None
    values: tuple[Any, ...] = (0, 0, NO_STRIDES)
    if activations is not None:
        activations = _cpu_view.resolved(activations)
        grad_alpha = masked.new_empty((batch, channels))
        values = activations.data_ptr(), DTYPE_CODES[activations.dtype], activations.stride()
    if alpha is not None:
        alpha = _cpu_view.dense(alpha, accumulate)
        grad_activations = torch.empty(
            (batch, channels, height, width),
            dtype=dtype,
            device=like.device,
            memory_format=_layout.memory_format(channels_last),
        )
    elements = batch * channels * height * width
    written, reduced, weights, known = _cpu_view.pointers(
        (grad_activations, grad_alpha, alpha, maps)
    )
    arguments = (
        (batch, channels, height, width),
        *cotangent,
        known,
        *values,
        reduced,
        weights,
        written,
        DTYPE_CODES[dtype],
        channels_last,
        _cpu_view.streams(elements, dtype),
        masked.data_ptr(),
        _cpu_view.channel_block(batch, channels),
        _cpu_view.threads(elements),
    )
    outputs = (
        masked.new_empty(0) if grad_activations is None else grad_activations,
        masked.new_empty(0) if grad_alpha is None else grad_alpha,
    )
    return *outputs, arguments, (grad_maps, activations, alpha, maps, masked)


def cam_bwd(
    grad_maps: Tensor,
    activations: Tensor | None,
    alpha: Tensor | None,
    maps: Tensor | None,
    channels_last: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    grad_activations, grad_alpha, arguments, _alive = backward_arguments(
        grad_maps, activations, alpha, maps, channels_last, dtype
    )
    _cpu.cam_bwd(*arguments)
    return grad_activations, grad_alpha
