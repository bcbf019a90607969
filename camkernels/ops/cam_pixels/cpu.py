"""cam_pixels by the C++ kernel of csrc/cam_methods. Signatures: reference.py."""

from __future__ import annotations

import torch
from torch import Tensor

from camkernels import _cpu
from camkernels.ops import _cpu_view, _layout, _native
from camkernels.ops.cam_weights.cpu import pair, targets
from camkernels.ops.cam_weights.op import empty_as


def cam_pixels_fwd(activations: Tensor, gradients: Tensor, positive: bool, relu: bool) -> Tensor:
    activations, gradients = _native.resolved(activations), _native.resolved(gradients)
    batch, channels, height, width = activations.shape
    dtype = _layout.accumulate_dtype(activations.dtype)
    maps = activations.new_empty((batch, height, width), dtype=dtype)
    block = _cpu_view.channel_block(batch, channels)
    blocks = -(-channels // block)
    partial = maps if blocks == 1 else maps.new_empty((batch, blocks, height, width))
    _cpu.cam_pixels(
        *pair(activations, gradients), positive, relu, maps.data_ptr(), partial.data_ptr(), block,
        0, 0, False, 0, False, _cpu_view.threads(activations.numel()),
    )  # fmt: skip
    return maps


def cam_pixels_bwd(
    grad_maps: Tensor,
    activations: Tensor,
    gradients: Tensor,
    maps: Tensor | None,
    positive: bool,
    want_activations: bool,
    want_gradients: bool,
) -> tuple[Tensor, Tensor]:
    activations, gradients = _native.resolved(activations), _native.resolved(gradients)
    outputs = empty_as(activations, want_activations), empty_as(gradients, want_gradients)
    if activations.numel():
        dtype = _layout.accumulate_dtype(activations.dtype)
        masked = _native.dense(grad_maps, dtype)  # of the size of a map
        if maps is not None:
            masked = torch.where(maps <= 0, 0.0, masked)
        _cpu.cam_pixels(
            *pair(activations, gradients), positive, False, 0, 0, 1, masked.data_ptr(),
            *targets(outputs, (activations, gradients)), _cpu_view.threads(activations.numel()),
        )  # fmt: skip
    return outputs
