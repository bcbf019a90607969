"""Arguments of the kernels of cam, as C++ and CUDA take them: allocates and passes pointers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from camkernels.ops import _layout, _native
from camkernels.ops._native import DTYPE_CODES, NO_STRIDES


class Work(NamedTuple):
    """How a backend shares out activations (B, K, h, w)."""

    block: int
    """Channels per block; blocks of one sample become partial maps that are added in order."""
    threads: int
    streams: Callable[[Tensor], bool]
    """Whether an output is stored past the caches."""
    masked: bool
    """Whether a backward needs scratch of the size of the maps."""


# Of a shape, and a tensor on the device.
Split = Callable[[Sequence[int], Tensor], Work]


def forward_arguments(
    activations: Tensor, gradients: Tensor, relu: bool, split: Split
) -> tuple[Tensor, Tensor, tuple[Any, ...], tuple[Tensor, ...]]:
    """maps, alpha, the arguments of the kernel, and what must stay alive while it runs.

    ``split`` says how a backend shares the work out.
    """
    activations, gradients = _native.resolved(activations), _native.resolved(gradients)
    batch, channels, height, width = shape = activations.shape
    dtype = _layout.accumulate_dtype(activations.dtype)
    maps = activations.new_empty((batch, height, width), dtype=dtype)
    if gradients.dim() == 4:
        alpha = activations.new_empty((batch, channels), dtype=dtype)
        pooled = gradients.data_ptr(), DTYPE_CODES[gradients.dtype], gradients.stride()
    else:
        alpha = _native.dense(gradients, dtype)
        pooled = 0, 0, NO_STRIDES
    work = split(activations.shape, activations)
    blocks = -(-channels // work.block)
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
        work.block,
        relu,
        work.threads,
    )
    return maps, alpha, arguments, (activations, gradients, partial)


def backward_arguments(
    grad_maps: Tensor | None,
    activations: Tensor | None,
    alpha: Tensor | None,
    maps: Tensor | None,
    channels_last: bool,
    dtype: torch.dtype,
    split: Split,
) -> tuple[Tensor, Tensor, tuple[Any, ...], tuple[Any, ...]]:
    """grad_activations, grad_alpha (placeholders where not wanted), arguments, what stays alive.

    ``split`` says how a backend shares the work out.
    """
    like = grad_maps if grad_maps is not None else maps
    assert like is not None
    batch, height, width = like.shape
    given = activations if activations is not None else alpha
    channels = 1 if given is None else given.shape[1]
    accumulate = _layout.accumulate_dtype(like.dtype)
    code = DTYPE_CODES[accumulate]
    work = split((batch, channels, height, width), like)
    masked = like.new_empty((batch, height, width) if work.masked else 0, dtype=accumulate)
    cotangent: tuple[Any, ...] = (0, code, NO_STRIDES)
    if grad_maps is not None:
        grad_maps = _native.resolved(grad_maps).to(accumulate)
        stride_b, stride_h, stride_w = grad_maps.stride()
        cotangent = grad_maps.data_ptr(), code, (stride_b, 0, stride_h, stride_w)
    if maps is not None:
        maps = _native.dense(maps, accumulate)

    grad_alpha = grad_activations = None
    values: tuple[Any, ...] = (0, 0, NO_STRIDES)
    if activations is not None:
        activations = _native.resolved(activations)
        grad_alpha = masked.new_empty((batch, channels))
        values = activations.data_ptr(), DTYPE_CODES[activations.dtype], activations.stride()
    if alpha is not None:
        alpha = _native.dense(alpha, accumulate)
        grad_activations = torch.empty(
            (batch, channels, height, width),
            dtype=dtype,
            device=like.device,
            memory_format=_layout.memory_format(channels_last),
        )
    streams = grad_activations is not None and work.streams(grad_activations)
    written, reduced, weights, known = _native.pointers((grad_activations, grad_alpha, alpha, maps))
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
        streams,
        masked.data_ptr(),
        work.block,
        work.threads,
    )
    outputs = (
        masked.new_empty(0) if grad_activations is None else grad_activations,
        masked.new_empty(0) if grad_alpha is None else grad_alpha,
    )
    return *outputs, arguments, (grad_maps, activations, alpha, maps, masked)
