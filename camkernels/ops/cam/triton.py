"""Grad-CAM weighted sums in Triton: one launch forward, one backward. Formulas: reference.py."""
# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from camkernels.ops import _layout
from camkernels.ops import _triton_launch as host
from camkernels.ops._triton_cam import channel_cotangents, make_map, pixel_offsets


@triton.jit
def cam_fwd_kernel(
    activations_ptr, gradients_ptr, alpha_ptr, maps_ptr, scratch_ptr, counters_ptr,
    K, P, W, chunk,
    stride_b, stride_k, stride_y, stride_x,
    stride_gradients_b, stride_gradients_k, stride_gradients_y, stride_gradients_x,
    stride_alpha_b, stride_alpha_k,
    RELU: tl.constexpr, FLAT: tl.constexpr, FLAT_GRADIENTS: tl.constexpr, SPLIT: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program (b, split): the map of sample b from one chunk of its channels."""
    make_map(
        activations_ptr, gradients_ptr, alpha_ptr, maps_ptr, scratch_ptr, counters_ptr,
        K, P * ALIGN, W, chunk,
        stride_b * ALIGN, stride_k * ALIGN, stride_y, stride_x,
        stride_gradients_b * ALIGN, stride_gradients_k * ALIGN,
        stride_gradients_y, stride_gradients_x,
        stride_alpha_b, stride_alpha_k,
        RELU, FLAT, FLAT_GRADIENTS, SPLIT, BLOCK_K, BLOCK_P, BLOCK_S, BLOCK_R,
    )  # fmt: skip


@triton.jit
def cam_bwd_kernel(
    grad_maps_ptr, maps_ptr, activations_ptr, alpha_ptr, grad_activations_ptr, grad_alpha_ptr,
    K, P, W,
    stride_grad_b, stride_grad_y, stride_grad_x,
    stride_b, stride_k, stride_y, stride_x,
    stride_alpha_b, stride_alpha_k,
    FLAT_GRAD: tl.constexpr, FLAT: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Program (b, j): alpha_k D, and sum_p D A_k, for BLOCK_K channels of sample b."""
    b = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    P = P * ALIGN
    grad_maps_ptr += b * stride_grad_b
    alpha = tl.zeros((BLOCK_K,), tl.float32)
    if alpha_ptr is not None:
        weights_ptr = alpha_ptr + b * stride_alpha_b + k.to(tl.int64) * stride_alpha_k
        alpha = tl.load(weights_ptr, mask=k < K, other=0.0).to(tl.float32)
        grad_activations_ptr += b * K * P
    if activations_ptr is not None:
        activations_ptr += b * stride_b * ALIGN
    acc = tl.zeros((BLOCK_K, BLOCK_P), tl.float32)
    for p0 in range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        offsets = pixel_offsets(p, W, stride_grad_y, stride_grad_x, FLAT_GRAD)
        cotangent = tl.load(grad_maps_ptr + offsets, mask=p < P, other=0.0).to(tl.float32)
        if maps_ptr is not None:
            masked = tl.load(maps_ptr + b * P + p, mask=p < P, other=0.0) <= 0
            cotangent = tl.where(masked, 0.0, cotangent)
        acc = channel_cotangents(
            cotangent, acc, activations_ptr, grad_activations_ptr, alpha, k, p, K, P, W,
            stride_k * ALIGN, stride_y, stride_x, FLAT, CHANNELS_LAST,
        )  # fmt: skip
    if activations_ptr is not None:
        tl.store(grad_alpha_ptr + b * K + k, tl.sum(acc, 1), mask=k < K)


def forward_launch(activations: Tensor, gradients: Tensor, maps: Tensor, relu: bool) -> Any:
    """Grid, arguments and constants of a forward (of cam_statistics too), and alpha (B, K)."""
    batch, channels, _, width = activations.shape
    pixels = host.check_pixels(activations, "activations")
    pooled = gradients.dim() == 4
    alpha = maps.new_empty((batch, channels)) if pooled else gradients
    align = host.alignment(pixels, activations, gradients if pooled else None)
    of_a = host.pixel_strides(activations)
    channels_last = _layout.is_channels_last(activations)
    wide = host.is_wide(channels, align, of_a, channels_last)
    blocks = host.tile(channels, pixels, channels_last, wide)
    chunk = host.channel_chunk(batch, channels, blocks.BLOCK_K, activations.device)
    n_splits = host.cdiv(channels, chunk)
    split = n_splits > 1
    of_g = host.pixel_strides(gradients) if pooled else of_a
    g_outer = gradients.stride()[:2] if pooled else (0, 0)
    block_r = min(host.power_of_two(max(pixels, 16)), 1024)
    args = (
        activations, gradients if pooled else None, alpha, maps,
        maps.new_empty((batch, n_splits, pixels)) if split else None,
        host.arrival_counters(batch, maps.device) if split else None,
        channels, pixels // align, width, chunk,
        activations.stride(0) // align, activations.stride(1) // align,
        of_a.stride_y, of_a.stride_x,
        g_outer[0] // align, g_outer[1] // align, of_g.stride_y, of_g.stride_x,
        alpha.stride(0), alpha.stride(1),
    )  # fmt: skip
    constants = dict(
        RELU=relu, FLAT=of_a.flat, FLAT_GRADIENTS=of_g.flat, SPLIT=split, ALIGN=align,
        **blocks._asdict(), BLOCK_S=min(16, host.TILE // block_r), BLOCK_R=block_r,
        num_warps=host.NUM_WARPS, maxnreg=host.MAX_REGISTERS,
    )  # fmt: skip
    return (batch, n_splits), args, constants, alpha


def cam_fwd(activations: Tensor, gradients: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
    """Maps (B, h, w), and alpha (B, K) where gradients were given (else a placeholder)."""
    batch, _, height, width = activations.shape
    maps = activations.new_empty((batch, height, width), dtype=torch.float32)
    pooled = gradients.dim() == 4
    if batch == 0:
        return maps, maps.new_empty(gradients.shape[:2]) if pooled else maps.new_empty(0)
    grid, args, constants, alpha = forward_launch(activations, gradients, maps, relu)
    host.launch(cam_fwd_kernel, grid, maps, *args, **constants)
    return maps, alpha if pooled else maps.new_empty(0)


class Backward:
    """Outputs, arguments and constants that cam_bwd and cam_statistics_bwd share."""

    def __init__(
        self,
        maps: Tensor,
        activations: Tensor | None,
        alpha: Tensor | None,
        channels_last: bool,
        dtype: torch.dtype,
    ) -> None:
        given = activations if activations is not None else alpha
        assert given is not None  # the caller wants something
        (batch, channels), (height, width) = given.shape[:2], maps.shape[1:]
        pixels = host.check_pixels(maps, "maps")
        self.grad_activations = maps.new_empty(0, dtype=torch.float32)
        self.grad_alpha = maps.new_empty(0, dtype=torch.float32)
        if alpha is not None:
            self.grad_activations = torch.empty(
                (batch, channels, height, width), dtype=dtype, device=maps.device,
                memory_format=_layout.memory_format(channels_last),
            )  # fmt: skip
        if activations is not None:
            self.grad_alpha = maps.new_empty((batch, channels), dtype=torch.float32)
        align = host.alignment(pixels, activations)
        strides: tuple[int, ...] = (0, 0)
        of_a = host.PixelStrides(0, 1, True)
        if activations is not None:
            strides = activations.stride()[:2]
            of_a = host.pixel_strides(activations)
        wide = host.is_wide(channels, align, of_a, channels_last)
        blocks = host.tile(channels, pixels, channels_last, wide)
        self.grid = (batch, host.cdiv(channels, blocks.BLOCK_K))
        self.tensors = (
            activations,
            alpha,
            None if alpha is None else self.grad_activations,
            None if activations is None else self.grad_alpha,
        )
        self.sizes = (channels, pixels // align, width)
        self.strides = (
            strides[0] // align, strides[1] // align, of_a.stride_y, of_a.stride_x,
            *((0, 0) if alpha is None else alpha.stride()),
        )  # fmt: skip
        self.constants = dict(
            FLAT=of_a.flat, CHANNELS_LAST=channels_last, ALIGN=align, **blocks._asdict(),
            num_warps=host.NUM_WARPS,
        )  # fmt: skip


def cam_bwd(
    grad_maps: Tensor,
    activations: Tensor | None,
    alpha: Tensor | None,
    maps: Tensor | None,
    channels_last: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Cotangents of A and of alpha; which are wanted is told by alpha and activations."""
    work = Backward(grad_maps, activations, alpha, channels_last, dtype)
    if grad_maps.shape[0] > 0:
        of_grad = host.pixel_strides(grad_maps)
        host.launch(
            cam_bwd_kernel, work.grid, grad_maps,
            grad_maps, None if maps is None else maps.contiguous(), *work.tensors, *work.sizes,
            grad_maps.stride(0), of_grad.stride_y, of_grad.stride_x, *work.strides,
            FLAT_GRAD=of_grad.flat, **work.constants,
        )  # fmt: skip
    return work.grad_activations, work.grad_alpha
