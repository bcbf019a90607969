"""cam_weights in Triton: one launch each way. Formulas: reference.py.

A program has BLOCK_K channels of a sample and passes over their pixels twice, backward of
Grad-CAM++ three times: after the first what it reads comes from the cache.
"""
# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from camkernels.ops import _layout
from camkernels.ops import _triton_launch as host
from camkernels.ops._triton_cam import pixel_offsets
from camkernels.ops.cam_weights.op import empty_as


@triton.jit
def load_block(
    base_ptr, k, p, K, P, W, stride_k, stride_y, stride_x, FLAT: tl.constexpr
):  # fmt: skip
    """(BLOCK_K, BLOCK_P) in float32, 0 where there is nothing."""
    offsets = pixel_offsets(p, W, stride_y, stride_x, FLAT)[None, :]
    rows = k.to(tl.int64)[:, None] * stride_k
    inside = (k < K)[:, None] & (p < P)[None, :]
    return tl.load(base_ptr + rows + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_block(base_ptr, value, k, p, K, P, LAST: tl.constexpr):
    """To a dense tensor, whose sample begins at base_ptr."""
    rows, columns = k.to(tl.int64)[:, None], p.to(tl.int64)[None, :]
    offsets = rows * P + columns
    if LAST:
        offsets = columns * K + rows
    inside = (k < K)[:, None] & (p < P)[None, :]
    tl.store(base_ptr + offsets, value.to(base_ptr.dtype.element_ty), mask=inside)


@triton.jit
def share_of(g, total, eps, EPS: tl.constexpr):
    """Which pixels count in Grad-CAM++, G there (1 elsewhere), 2 + S G + eps / G^2, eps / G^2."""
    counted = (g <= 0) == 0  # NaN counts
    square = g * g
    extra = g - g
    if EPS:
        counted = counted & ((square <= 0) == 0)
        extra = tl.div_rn(extra + eps, tl.where(counted, square, 1.0))
    g = tl.where(counted, g, 1.0)
    return counted, g, 2 + total[:, None] * g + extra, extra


@triton.jit
def totals_of(
    activations_ptr, gradients_ptr, k, K, P, W, stride_k, stride_y, stride_x,
    g_stride_k, g_stride_y, g_stride_x,
    PLUS: tl.constexpr, FLAT: tl.constexpr, G_FLAT: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """S (BLOCK_K,), and sum A G unless PLUS."""
    total = tl.zeros((BLOCK_K, BLOCK_P), tl.float32)
    product = total
    for p0 in range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        a = load_block(activations_ptr, k, p, K, P, W, stride_k * ALIGN, stride_y, stride_x, FLAT)
        total += a
        if not PLUS:
            g = load_block(
                gradients_ptr, k, p, K, P, W, g_stride_k * ALIGN, g_stride_y, g_stride_x, G_FLAT
            )
            product += a * g
    return tl.sum(total, 1), tl.sum(product, 1)


@triton.jit(do_not_specialize=["eps"])
def cam_weights_fwd_kernel(
    activations_ptr, gradients_ptr, weights_ptr, eps, K, P, W,
    stride_b, stride_k, stride_y, stride_x, g_stride_b, g_stride_k, g_stride_y, g_stride_x,
    PLUS: tl.constexpr, EPS: tl.constexpr, FLAT: tl.constexpr, G_FLAT: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Program (b, j): the weights of BLOCK_K channels of sample b."""
    b = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    P = P * ALIGN
    activations_ptr += b * stride_b * ALIGN
    gradients_ptr += b * g_stride_b * ALIGN
    total, product = totals_of(
        activations_ptr, gradients_ptr, k, K, P, W, stride_k, stride_y, stride_x,
        g_stride_k, g_stride_y, g_stride_x, PLUS, FLAT, G_FLAT, ALIGN, BLOCK_K, BLOCK_P,
    )  # fmt: skip
    if PLUS:
        acc = tl.zeros((BLOCK_K, BLOCK_P), tl.float32)
        for p0 in range(0, P, BLOCK_P):
            p = p0 + tl.arange(0, BLOCK_P)
            g = load_block(
                gradients_ptr, k, p, K, P, W, g_stride_k * ALIGN, g_stride_y, g_stride_x, G_FLAT
            )
            counted, g, below, _ = share_of(g, total, eps, EPS)
            acc += tl.where(counted, tl.div_rn(g, below), 0.0)
        weights = tl.sum(acc, 1) + (total - total)  # NaN where a value is not finite
    else:
        weights = tl.div_rn(product, total + eps)
    tl.store(weights_ptr + b * K + k, weights, mask=k < K)


@triton.jit(do_not_specialize=["eps", "grad_stride_b", "grad_stride_k"])
def cam_weights_bwd_kernel(
    grad_ptr, activations_ptr, gradients_ptr, to_a_ptr, to_g_ptr, eps, K, P, W,
    grad_stride_b, grad_stride_k,
    stride_b, stride_k, stride_y, stride_x, g_stride_b, g_stride_k, g_stride_y, g_stride_x,
    PLUS: tl.constexpr, EPS: tl.constexpr, FLAT: tl.constexpr, G_FLAT: tl.constexpr,
    A_LAST: tl.constexpr, G_LAST: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Program (b, j): both cotangents of BLOCK_K channels of sample b."""
    b = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    P = P * ALIGN
    activations_ptr += b * stride_b * ALIGN
    gradients_ptr += b * g_stride_b * ALIGN
    grad_ptr += b * grad_stride_b + k.to(tl.int64) * grad_stride_k
    grad = tl.load(grad_ptr, mask=k < K, other=0.0).to(tl.float32)
    if to_a_ptr is not None:
        to_a_ptr += b * K * P
    if to_g_ptr is not None:
        to_g_ptr += b * K * P
    total, product = totals_of(
        activations_ptr, gradients_ptr, k, K, P, W, stride_k, stride_y, stride_x,
        g_stride_k, g_stride_y, g_stride_x, PLUS, FLAT, G_FLAT, ALIGN, BLOCK_K, BLOCK_P,
    )  # fmt: skip
    below_all = tl.where(k < K, total + eps, 1.0)
    scale, shift = tl.div_rn(grad, below_all), tl.div_rn(product, below_all)
    acc = tl.zeros((BLOCK_K, BLOCK_P), tl.float32)
    for p0 in range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        g = load_block(
            gradients_ptr, k, p, K, P, W, g_stride_k * ALIGN, g_stride_y, g_stride_x, G_FLAT
        )
        if PLUS:
            counted, g, below, extra = share_of(g, total, eps, EPS)
            value = tl.div_rn(g, below)
            acc -= tl.where(counted, value * value, 0.0)
            slope = tl.div_rn(2 + 3 * extra, below * below)
            if to_g_ptr is not None:
                found = grad[:, None] * tl.where(counted, slope, 0.0)
                store_block(to_g_ptr, found, k, p, K, P, G_LAST)
        else:
            a = load_block(
                activations_ptr, k, p, K, P, W, stride_k * ALIGN, stride_y, stride_x, FLAT
            )
            if to_a_ptr is not None:
                store_block(to_a_ptr, scale[:, None] * (g - shift[:, None]), k, p, K, P, A_LAST)
            if to_g_ptr is not None:
                store_block(to_g_ptr, scale[:, None] * a, k, p, K, P, G_LAST)
    if PLUS:  # noqa: SIM102 - a constant, and a pointer that is one
        if to_a_ptr is not None:
            found = (grad * tl.sum(acc, 1))[:, None] + tl.zeros((BLOCK_K, BLOCK_P), tl.float32)
            for p0 in range(0, P, BLOCK_P):
                store_block(to_a_ptr, found, k, p0 + tl.arange(0, BLOCK_P), K, P, A_LAST)


class Launch:
    """Grid, sizes, strides and constants of a kernel over activations and gradients."""

    def __init__(self, activations: Tensor, gradients: Tensor) -> None:
        batch, channels, _, width = activations.shape
        pixels = host.check_pixels(activations, "activations")
        align = host.alignment(pixels, activations, gradients)
        of_a, of_g = host.pixel_strides(activations), host.pixel_strides(gradients)
        last = _layout.is_channels_last(activations)
        # Two tensors are in registers at a time, besides sums; where rows are no plane, also the
        # address of each element.
        self.tile = host.tile(channels, pixels, last, False)
        if not (of_a.flat and of_g.flat):
            self.tile = self.tile._replace(BLOCK_K=max(1, self.tile.BLOCK_K // 4))
        self.grid = (batch, host.cdiv(channels, self.tile.BLOCK_K))
        self.sizes = (channels, pixels // align, width)
        self.strides = (
            activations.stride(0) // align, activations.stride(1) // align,
            of_a.stride_y, of_a.stride_x,
            gradients.stride(0) // align, gradients.stride(1) // align,
            of_g.stride_y, of_g.stride_x,
        )  # fmt: skip
        self.layouts = {"FLAT": of_a.flat, "G_FLAT": of_g.flat, "ALIGN": align}
        self.blocks: dict[str, Any] = {
            **self.tile._asdict(),
            "num_warps": host.NUM_WARPS,
            "maxnreg": host.MAX_REGISTERS,
        }


def cam_weights_fwd(activations: Tensor, gradients: Tensor, method: str, eps: float) -> Tensor:
    weights = activations.new_empty(activations.shape[:2], dtype=torch.float32)
    if activations.shape[0]:
        work = Launch(activations, gradients)
        host.launch(
            cam_weights_fwd_kernel, work.grid, activations,
            activations, gradients, weights, eps, *work.sizes, *work.strides,
            PLUS=method == "gradcam++", EPS=eps != 0, **work.layouts, **work.blocks,
        )  # fmt: skip
    return weights


def cam_weights_bwd(
    grad: Tensor,
    activations: Tensor,
    gradients: Tensor,
    method: str,
    eps: float,
    want_activations: bool,
    want_gradients: bool,
) -> tuple[Tensor, Tensor]:
    to_a, to_g = empty_as(activations, want_activations), empty_as(gradients, want_gradients)
    if activations.shape[0]:
        work = Launch(activations, gradients)
        host.launch(
            cam_weights_bwd_kernel, work.grid, activations,
            grad, activations, gradients,
            to_a if want_activations else None, to_g if want_gradients else None, eps,
            *work.sizes, *grad.stride(), *work.strides,
            PLUS=method == "gradcam++", EPS=eps != 0,
            A_LAST=_layout.is_channels_last(activations),
            G_LAST=_layout.is_channels_last(gradients), **work.layouts, **work.blocks,
        )  # fmt: skip
    return to_a, to_g
