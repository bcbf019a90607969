"""Statistics of maps in Triton: one launch forward, one backward. Formulas: reference.py."""
# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from camkernels.ops import _triton_launch as host
from camkernels.ops._triton_statistics import (
    cotangent_coefficients,
    load_pixels,
    pixel_cotangent,
    write_statistics,
)
from camkernels.ops.map_statistics.reference import Statistics

COUNT = len(Statistics._fields)
# 0 for the cotangent of a sum, 1 or more for others: no reason to compile anew.
COTANGENT_STRIDES = [
    *(f"stride_{name}" for name in Statistics._fields[:5]),
    *("stride_centroid_b", "stride_centroid_i"),
    *(f"stride_covariance_{axis}" for axis in "bij"),
]


@triton.jit
def map_statistics_fwd_kernel(
    maps_ptr,
    entropy_ptr, area_ptr, dispersion_ptr, mean_ptr, variance_ptr, centroid_ptr, covariance_ptr,
    P, W, stride_b, stride_y, stride_x,
    FLAT: tl.constexpr, CLAMP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (b,): all statistics of map b."""
    b = tl.program_id(0).to(tl.int64)
    write_statistics(
        b, maps_ptr + b * stride_b, P, W, stride_y, stride_x,
        entropy_ptr, area_ptr, dispersion_ptr, mean_ptr, variance_ptr, centroid_ptr,
        covariance_ptr, FLAT, CLAMP, BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=COTANGENT_STRIDES)
def map_statistics_bwd_kernel(
    maps_ptr, grad_maps_ptr,
    entropy_ptr, area_ptr, dispersion_ptr, mean_ptr, variance_ptr, centroid_ptr, covariance_ptr,
    grad_entropy_ptr, grad_area_ptr, grad_dispersion_ptr, grad_mean_ptr, grad_variance_ptr,
    grad_centroid_ptr, grad_covariance_ptr,
    P, W, stride_b, stride_y, stride_x,
    stride_entropy, stride_area, stride_dispersion, stride_mean, stride_variance,
    stride_centroid_b, stride_centroid_i,
    stride_covariance_b, stride_covariance_i, stride_covariance_j,
    FLAT: tl.constexpr, CLAMP: tl.constexpr,
    ENTROPY: tl.constexpr, DISPERSION: tl.constexpr, QUADRATIC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (b, j): the cotangent of BLOCK pixels of map b."""
    b = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
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
    m = load_pixels(maps_ptr + b * stride_b, p, P, W, stride_y, stride_x, FLAT, CLAMP)
    grad = pixel_cotangent(
        m, p, P, W, mean, variance, entropy, dispersion, row, column,
        to_entropy, to_dispersion, to_mean, to_variance, q, q_y, q_x, q_yy, q_yx, q_xx,
        ENTROPY, DISPERSION, QUADRATIC,
    )  # fmt: skip
    if CLAMP:
        grad = tl.where(m <= 0, 0.0, grad)
    grad_maps_ptr += b * P + p
    tl.store(grad_maps_ptr, grad.to(grad_maps_ptr.dtype.element_ty), mask=p < P)


def empty_statistics(maps: Tensor) -> Statistics:
    """Outputs of a forward: separate contiguous float32 tensors."""
    batch = maps.shape[0]
    scalars = (maps.new_empty(batch, dtype=torch.float32) for _ in range(COUNT - 2))
    return Statistics(
        *scalars,
        centroid=maps.new_empty((batch, 2), dtype=torch.float32),
        covariance=maps.new_empty((batch, 2, 2), dtype=torch.float32),
    )


def cotangent_arguments(
    statistics: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> tuple[tuple[Tensor | None, ...], tuple[int, ...], dict[str, Any]]:
    """Pointers, strides of the cotangents, and which terms there are, for a backward kernel."""
    saved = tuple(s.contiguous() for s in statistics)
    ranks = (1, 1, 1, 1, 1, 2, 3)
    strides = (
        stride
        for grad, rank in zip(grads, ranks, strict=True)
        for stride in ((0,) * rank if grad is None else grad.stride())
    )
    given = Statistics(*(grad is not None for grad in grads))  # type: ignore[arg-type]
    terms = {
        "ENTROPY": given.entropy,
        "DISPERSION": given.dispersion,
        "QUADRATIC": given.area or given.centroid or given.covariance,
    }
    return (*saved, *grads), tuple(strides), terms


def map_statistics_fwd(maps: Tensor, clamp: bool) -> Statistics:
    """The statistics of maps (B, h, w)."""
    pixels = host.check_pixels(maps, "maps")
    statistics = empty_statistics(maps)
    if maps.shape[0] > 0:
        strides = host.pixel_strides(maps)
        block = min(max(32, host.power_of_two(pixels)), 1024)
        host.launch(
            map_statistics_fwd_kernel, (maps.shape[0],), maps,
            maps, *statistics, pixels, maps.shape[2],
            maps.stride(0), strides.stride_y, strides.stride_x,
            FLAT=strides.flat, CLAMP=clamp, BLOCK=block, num_warps=max(1, block // 256),
        )  # fmt: skip
    return statistics


def map_statistics_bwd(maps: Tensor, *arguments: Any) -> Tensor:
    """Cotangent of the maps: maps, the seven statistics, their cotangents (or None), clamp."""
    statistics, grads, clamp = arguments[:COUNT], arguments[COUNT : 2 * COUNT], arguments[-1]
    grad_maps = torch.empty(maps.shape, dtype=maps.dtype, device=maps.device)
    if maps.shape[0] > 0:
        pixels = host.check_pixels(maps, "maps")
        strides = host.pixel_strides(maps)
        pointers, grad_strides, terms = cotangent_arguments(statistics, grads)
        block = min(max(32, host.power_of_two(pixels)), 1024)
        host.launch(
            map_statistics_bwd_kernel, (maps.shape[0], host.cdiv(pixels, block)), maps,
            maps, grad_maps, *pointers, pixels, maps.shape[2],
            maps.stride(0), strides.stride_y, strides.stride_x, *grad_strides,
            FLAT=strides.flat, CLAMP=clamp, **terms, BLOCK=block, num_warps=max(1, block // 256),
        )  # fmt: skip
    return grad_maps
