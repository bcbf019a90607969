"""min_max in Triton: one launch forward, one backward. Formulas: reference.py."""
# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from camkernels.ops import _triton_launch as host
from camkernels.ops._triton_statistics import load_pixels

TINY = tl.constexpr(2.0**-126)


@triton.jit
def min_max_fwd_kernel(
    maps_ptr, out_ptr, extremes_ptr, P, W, stride_b, stride_y, stride_x,
    FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (b,): map b normalised, and its extremes."""
    b = tl.program_id(0).to(tl.int64)
    maps_ptr += b * stride_b
    out_ptr += b * P
    zeros = tl.zeros((BLOCK,), tl.float32)
    lows, highs, hidden = zeros + float("inf"), zeros - float("inf"), zeros
    for p0 in range(0, P, BLOCK):
        p = p0 + tl.arange(0, BLOCK)
        m = load_pixels(maps_ptr, p, P, W, stride_y, stride_x, FLAT, False)
        inside = (p < P) & (m == m)
        lows = tl.minimum(lows, tl.where(inside, m, float("inf")))
        highs = tl.maximum(highs, tl.where(inside, m, -float("inf")))
        hidden = tl.where(m != m, m, hidden)  # extremes pass over NaN
    nothing = tl.sum(tl.where(hidden != hidden, hidden, 0.0), 0)
    low, high = tl.min(lows, 0) + nothing, tl.max(highs, 0) + nothing
    tl.store(extremes_ptr + 2 * b, low)
    tl.store(extremes_ptr + 2 * b + 1, high)
    span = high - low
    constant = span <= TINY
    visible = span - span
    unit = zeros + tl.where(constant, 1.0, span)
    for p0 in range(0, P, BLOCK):
        p = p0 + tl.arange(0, BLOCK)
        m = load_pixels(maps_ptr, p, P, W, stride_y, stride_x, FLAT, False)
        normal = tl.div_rn(m - low, unit) + visible
        tl.store(out_ptr + p, tl.where(constant, 0.0, normal), mask=p < P)


@triton.jit(do_not_specialize=["grad_stride_b", "grad_stride_y", "grad_stride_x"])
def min_max_bwd_kernel(
    grad_ptr, maps_ptr, extremes_ptr, out_ptr, P, W, stride_b, stride_y, stride_x,
    grad_stride_b, grad_stride_y, grad_stride_x,
    FLAT: tl.constexpr, GRAD_FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (b,): the cotangent of map b."""
    b = tl.program_id(0).to(tl.int64)
    maps_ptr += b * stride_b
    grad_ptr += b * grad_stride_b
    out_ptr += b * P
    low, high = tl.load(extremes_ptr + 2 * b), tl.load(extremes_ptr + 2 * b + 1)
    span = high - low
    constant = span <= TINY
    zeros = tl.zeros((BLOCK,), tl.float32)
    unit = zeros + tl.where(constant, 1.0, span)
    to_lows, to_highs, lows, highs = zeros, zeros, zeros, zeros
    for p0 in range(0, P, BLOCK):
        p = p0 + tl.arange(0, BLOCK)
        m = load_pixels(maps_ptr, p, P, W, stride_y, stride_x, FLAT, False)
        g = load_pixels(grad_ptr, p, P, W, grad_stride_y, grad_stride_x, GRAD_FLAT, False)
        normal = tl.where(p < P, tl.div_rn(m - low, unit), 0.0)
        to_lows += g * (normal - 1)
        to_highs -= g * normal
        lows += tl.where((p < P) & (m == low), 1.0, 0.0)
        highs += tl.where((p < P) & (m == high), 1.0, 0.0)
    to_low = tl.div_rn(tl.sum(to_lows, 0), tl.maximum(tl.sum(lows, 0), 1.0))
    to_high = tl.div_rn(tl.sum(to_highs, 0), tl.maximum(tl.sum(highs, 0), 1.0))
    for p0 in range(0, P, BLOCK):
        p = p0 + tl.arange(0, BLOCK)
        m = load_pixels(maps_ptr, p, P, W, stride_y, stride_x, FLAT, False)
        g = load_pixels(grad_ptr, p, P, W, grad_stride_y, grad_stride_x, GRAD_FLAT, False)
        # Products, so that NaN in a cotangent reaches every pixel.
        g += to_low * tl.where(m == low, 1.0, 0.0) + to_high * tl.where(m == high, 1.0, 0.0)
        found = tl.where(constant, 0.0, tl.div_rn(g, unit))
        tl.store(out_ptr + p, found.to(out_ptr.dtype.element_ty), mask=p < P)


def _blocks(pixels: int) -> dict[str, int]:
    block = min(max(32, host.power_of_two(pixels)), 1024)
    return {"BLOCK": block, "num_warps": max(1, block // 256)}


def min_max_fwd(maps: Tensor) -> tuple[Tensor, Tensor]:
    pixels = host.check_pixels(maps, "maps")
    out = torch.empty(maps.shape, dtype=torch.float32, device=maps.device)
    extremes = torch.empty((maps.shape[0], 2), dtype=torch.float32, device=maps.device)
    if maps.shape[0]:
        strides = host.pixel_strides(maps)
        host.launch(
            min_max_fwd_kernel, (maps.shape[0],), maps, maps, out, extremes,
            pixels, maps.shape[2], maps.stride(0), strides.stride_y, strides.stride_x,
            FLAT=strides.flat, **_blocks(pixels),
        )  # fmt: skip
    return out, extremes


def min_max_bwd(grad: Tensor, maps: Tensor, extremes: Tensor) -> Tensor:
    pixels = host.check_pixels(maps, "maps")
    out = torch.empty(maps.shape, dtype=maps.dtype, device=maps.device)
    if maps.shape[0]:
        strides, given = host.pixel_strides(maps), host.pixel_strides(grad)
        shared: dict[str, Any] = {"FLAT": strides.flat, "GRAD_FLAT": given.flat}
        host.launch(
            min_max_bwd_kernel, (maps.shape[0],), maps, grad, maps, extremes.contiguous(), out,
            pixels, maps.shape[2], maps.stride(0), strides.stride_y, strides.stride_x,
            grad.stride(0), given.stride_y, given.stride_x, **shared, **_blocks(pixels),
            maxnreg=host.MAX_REGISTERS,  # left to itself it spills for 80 (sm_120)
        )  # fmt: skip
    return out
