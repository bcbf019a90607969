"""cam_pixels in Triton: one launch each way. Formulas: reference.py."""
# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from camkernels.ops import _layout
from camkernels.ops import _triton_launch as host
from camkernels.ops._triton_cam import pixel_offsets
from camkernels.ops.cam_weights.op import empty_as
from camkernels.ops.cam_weights.triton import Launch, load_block, store_block


@triton.jit
def cam_pixels_fwd_kernel(
    activations_ptr, gradients_ptr, maps_ptr, K, P, W,
    stride_b, stride_k, stride_y, stride_x, g_stride_b, g_stride_k, g_stride_y, g_stride_x,
    POSITIVE: tl.constexpr, RELU: tl.constexpr, FLAT: tl.constexpr, G_FLAT: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Program (b, j): BLOCK_P pixels of the map of sample b, from all channels."""
    b = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    P = P * ALIGN
    activations_ptr += b * stride_b * ALIGN
    gradients_ptr += b * g_stride_b * ALIGN
    acc = tl.zeros((BLOCK_K, BLOCK_P), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        a = load_block(activations_ptr, k, p, K, P, W, stride_k * ALIGN, stride_y, stride_x, FLAT)
        g = load_block(
            gradients_ptr, k, p, K, P, W, g_stride_k * ALIGN, g_stride_y, g_stride_x, G_FLAT
        )
        if POSITIVE:
            g = tl.where(g <= 0, 0.0, g)  # keeps NaN
        acc += g * a
    maps = tl.sum(acc, 0)
    if RELU:
        maps = tl.where(maps < 0, 0.0, maps)
    tl.store(maps_ptr + b * P + p, maps, mask=p < P)


@triton.jit(do_not_specialize=["grad_stride_b", "grad_stride_y", "grad_stride_x"])
def cam_pixels_bwd_kernel(
    grad_ptr, maps_ptr, activations_ptr, gradients_ptr, to_a_ptr, to_g_ptr, K, P, W,
    grad_stride_b, grad_stride_y, grad_stride_x,
    stride_b, stride_k, stride_y, stride_x, g_stride_b, g_stride_k, g_stride_y, g_stride_x,
    POSITIVE: tl.constexpr, GRAD_FLAT: tl.constexpr, FLAT: tl.constexpr, G_FLAT: tl.constexpr,
    A_LAST: tl.constexpr, G_LAST: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Program (b, j): both cotangents of BLOCK_K channels of sample b."""
    b = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    P = P * ALIGN
    activations_ptr += b * stride_b * ALIGN
    gradients_ptr += b * g_stride_b * ALIGN
    grad_ptr += b * grad_stride_b
    if to_a_ptr is not None:
        to_a_ptr += b * K * P
    if to_g_ptr is not None:
        to_g_ptr += b * K * P
    for p0 in range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        offsets = pixel_offsets(p, W, grad_stride_y, grad_stride_x, GRAD_FLAT)
        d = tl.load(grad_ptr + offsets, mask=p < P, other=0.0).to(tl.float32)
        if maps_ptr is not None:
            d = tl.where(tl.load(maps_ptr + b * P + p, mask=p < P, other=0.0) <= 0, 0.0, d)
        g = load_block(
            gradients_ptr, k, p, K, P, W, g_stride_k * ALIGN, g_stride_y, g_stride_x, G_FLAT
        )
        if to_g_ptr is not None:
            a = load_block(
                activations_ptr, k, p, K, P, W, stride_k * ALIGN, stride_y, stride_x, FLAT
            )
            found = a * d[None, :]
            if POSITIVE:
                found = tl.where(g <= 0, 0.0, found)
            store_block(to_g_ptr, found, k, p, K, P, G_LAST)
        if to_a_ptr is not None:
            if POSITIVE:
                g = tl.where(g <= 0, 0.0, g)
            store_block(to_a_ptr, g * d[None, :], k, p, K, P, A_LAST)


def cam_pixels_fwd(activations: Tensor, gradients: Tensor, positive: bool, relu: bool) -> Tensor:
    batch, _, height, width = activations.shape
    maps = activations.new_empty((batch, height, width), dtype=torch.float32)
    if batch:
        work = Launch(activations, gradients)
        grid = (batch, host.cdiv(height * width, work.tile.BLOCK_P))
        host.launch(
            cam_pixels_fwd_kernel, grid, activations,
            activations, gradients, maps, *work.sizes, *work.strides,
            POSITIVE=positive, RELU=relu, **work.layouts, **work.blocks,
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
    to_a, to_g = empty_as(activations, want_activations), empty_as(gradients, want_gradients)
    if activations.shape[0]:
        work = Launch(activations, gradients)
        of_grad = host.pixel_strides(grad_maps)
        host.launch(
            cam_pixels_bwd_kernel, work.grid, activations,
            grad_maps, None if maps is None else maps.contiguous(), activations, gradients,
            to_a if want_activations else None, to_g if want_gradients else None, *work.sizes,
            grad_maps.stride(0), of_grad.stride_y, of_grad.stride_x, *work.strides,
            POSITIVE=positive, GRAD_FLAT=of_grad.flat,
            A_LAST=_layout.is_channels_last(activations),
            G_LAST=_layout.is_channels_last(gradients), **work.layouts, **work.blocks,
        )  # fmt: skip
    return to_a, to_g
