"""Activations and gradients straight to the statistics, in Triton: one launch each way.

Formulas: reference.py of this room, of cam and of map_statistics.
"""
# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from camkernels.ops import _triton_launch as host
from camkernels.ops._triton_cam import channel_cotangents, make_map, pixel_offsets
from camkernels.ops._triton_statistics import (
    cotangent_coefficients,
    load_pixels,
    pixel_cotangent,
    write_statistics,
)
from camkernels.ops.cam.triton import Backward, forward_launch
from camkernels.ops.map_statistics.triton import (
    COTANGENT_STRIDES,
    COUNT,
    cotangent_arguments,
    empty_statistics,
)


@triton.jit
def cam_statistics_fwd_kernel(
    activations_ptr, gradients_ptr, alpha_ptr, maps_ptr, scratch_ptr, counters_ptr,
    K, P, W, chunk,
    stride_b, stride_k, stride_y, stride_x,
    stride_gradients_b, stride_gradients_k, stride_gradients_y, stride_gradients_x,
    stride_alpha_b, stride_alpha_k,
    total_ptr, entropy_ptr, area_ptr, dispersion_ptr, mean_ptr, variance_ptr, centroid_ptr,
    covariance_ptr,
    RELU: tl.constexpr, FLAT: tl.constexpr, FLAT_GRADIENTS: tl.constexpr, SPLIT: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program (b, split): as cam_fwd_kernel; who completes the map also takes its statistics."""
    P = P * ALIGN
    wrote, total = make_map(
        activations_ptr, gradients_ptr, alpha_ptr, maps_ptr, scratch_ptr, counters_ptr,
        K, P, W, chunk,
        stride_b * ALIGN, stride_k * ALIGN, stride_y, stride_x,
        stride_gradients_b * ALIGN, stride_gradients_k * ALIGN,
        stride_gradients_y, stride_gradients_x,
        stride_alpha_b, stride_alpha_k,
        RELU, FLAT, FLAT_GRADIENTS, SPLIT, BLOCK_K, BLOCK_P, BLOCK_S, BLOCK_R,
    )  # fmt: skip
    if wrote:
        b = tl.program_id(0).to(tl.int64)
        tl.store(total_ptr + b, total)
        tl.debug_barrier()  # the map is read back by other threads than wrote it
        write_statistics(
            b, maps_ptr + b * P, P, W, 0, 1,
            entropy_ptr, area_ptr, dispersion_ptr, mean_ptr, variance_ptr, centroid_ptr,
            covariance_ptr, True, False, BLOCK_R,
        )  # fmt: skip


@triton.jit(do_not_specialize=COTANGENT_STRIDES)
def cam_statistics_bwd_kernel(
    maps_ptr, grad_maps_ptr, activations_ptr, alpha_ptr, grad_activations_ptr, grad_alpha_ptr,
    entropy_ptr, area_ptr, dispersion_ptr, mean_ptr, variance_ptr, centroid_ptr, covariance_ptr,
    grad_entropy_ptr, grad_area_ptr, grad_dispersion_ptr, grad_mean_ptr, grad_variance_ptr,
    grad_centroid_ptr, grad_covariance_ptr,
    K, P, W,
    stride_grad_b, stride_grad_y, stride_grad_x,
    stride_b, stride_k, stride_y, stride_x,
    stride_alpha_b, stride_alpha_k,
    stride_entropy, stride_area, stride_dispersion, stride_mean, stride_variance,
    stride_centroid_b, stride_centroid_i,
    stride_covariance_b, stride_covariance_i, stride_covariance_j,
    RELU: tl.constexpr, FLAT_GRAD: tl.constexpr, FLAT: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    STATISTICS: tl.constexpr,
    ENTROPY: tl.constexpr, DISPERSION: tl.constexpr, QUADRATIC: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Program (b, j): as cam_bwd_kernel, with D from the statistics' cotangents."""
    b = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    P = P * ALIGN
    (
        mean, variance, entropy, dispersion, row, column,
        to_entropy, to_dispersion, to_mean, to_variance, q, q_y, q_x, q_yy, q_yx, q_xx,
    ) = cotangent_coefficients(
        b,
        entropy_ptr, area_ptr, dispersion_ptr, mean_ptr, variance_ptr, centroid_ptr,
        covariance_ptr,
        grad_entropy_ptr, grad_area_ptr, grad_dispersion_ptr, grad_mean_ptr, grad_variance_ptr,
        grad_centroid_ptr, grad_covariance_ptr,
        stride_entropy, stride_area, stride_dispersion, stride_mean, stride_variance,
        stride_centroid_b, stride_centroid_i,
        stride_covariance_b, stride_covariance_i, stride_covariance_j,
    )  # fmt: skip
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
        m = load_pixels(maps_ptr + b * P, p, P, W, 0, 1, True, False)
        cotangent = tl.zeros((BLOCK_P,), tl.float32)
        if grad_maps_ptr is not None:
            pixels = pixel_offsets(p, W, stride_grad_y, stride_grad_x, FLAT_GRAD)
            grad_ptr = grad_maps_ptr + b * stride_grad_b + pixels
            cotangent += tl.load(grad_ptr, mask=p < P, other=0.0).to(tl.float32)
        if STATISTICS:
            cotangent += pixel_cotangent(
                m, p, P, W, mean, variance, entropy, dispersion, row, column,
                to_entropy, to_dispersion, to_mean, to_variance, q, q_y, q_x, q_yy, q_yx, q_xx,
                ENTROPY, DISPERSION, QUADRATIC,
            )  # fmt: skip
        if RELU:
            cotangent = tl.where(m <= 0, 0.0, cotangent)
        acc = channel_cotangents(
            tl.where(p < P, cotangent, 0.0), acc, activations_ptr, grad_activations_ptr, alpha,
            k, p, K, P, W, stride_k * ALIGN, stride_y, stride_x, FLAT, CHANNELS_LAST,
        )  # fmt: skip
    if activations_ptr is not None:
        tl.store(grad_alpha_ptr + b * K + k, tl.sum(acc, 1), mask=k < K)


def cam_statistics_fwd(activations: Tensor, gradients: Tensor, relu: bool) -> tuple[Tensor, ...]:
    """maps (B, h, w), alpha (B, K) or a placeholder, total (B,), then the seven statistics."""
    batch, _, height, width = activations.shape
    maps = activations.new_empty((batch, height, width), dtype=torch.float32)
    pooled = gradients.dim() == 4
    kept = maps.new_empty(gradients.shape[:2] if pooled and batch == 0 else 0)
    total = maps.new_empty(batch)
    statistics = empty_statistics(maps)
    if batch > 0:
        grid, args, constants, alpha = forward_launch(activations, gradients, maps, relu)
        host.launch(cam_statistics_fwd_kernel, grid, maps, *args, total, *statistics, **constants)
        kept = alpha if pooled else kept
    return maps, kept, total, *statistics


def cam_statistics_bwd(
    maps: Tensor,
    activations: Tensor | None,
    alpha: Tensor | None,
    grad_maps: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, Tensor]:
    """Cotangents of A and of alpha; arguments as the reference's."""
    statistics, grads = arguments[:COUNT], arguments[COUNT : 2 * COUNT]
    relu, channels_last, dtype = arguments[2 * COUNT :]
    work = Backward(maps, activations, alpha, channels_last, dtype)
    if maps.shape[0] > 0:
        pointers, grad_strides, terms = cotangent_arguments(statistics, grads)
        of_grad, stride_grad_b = host.PixelStrides(0, 0, True), 0
        if grad_maps is not None:
            of_grad, stride_grad_b = host.pixel_strides(grad_maps), grad_maps.stride(0)
        host.launch(
            cam_statistics_bwd_kernel, work.grid, maps,
            maps.contiguous(), grad_maps, *work.tensors, *pointers, *work.sizes,
            stride_grad_b, of_grad.stride_y, of_grad.stride_x, *work.strides, *grad_strides,
            RELU=relu, FLAT_GRAD=of_grad.flat,
            STATISTICS=any(grad is not None for grad in grads), **terms, **work.constants,
        )  # fmt: skip
    return work.grad_activations, work.grad_alpha
