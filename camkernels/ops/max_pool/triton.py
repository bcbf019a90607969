"""max_pool in Triton: one launch each. Formulas: reference.py.

A program has BLOCK elements of one sample, numbered in the order of memory: c, y, x in NCHW, and
y, x, c in channels_last. Numbers within a sample are 32 bit, offsets of samples 64 bit.
"""
# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from camkernels.ops import _triton_launch as host
from camkernels.ops.max_pool import meta
from camkernels.ops.max_pool.reference import Window, is_channels_last, laid_as

BLOCK = 1024
# Of pixels, windows and what lies in the padding around them: far below 2^31.
LARGEST_SAMPLE = 2**30


@triton.jit
def place(C, height, width, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr):
    """The sample of this program, its elements i and which exist, their c, y and x."""
    size = C * height * width
    blocks = tl.cdiv(size, BLOCK)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    if CHANNELS_LAST:
        pixel = i // C
        c = i % C
    else:
        pixel = i % (height * width)
        c = i // (height * width)
    return sample, i, i < size, c, pixel // width, pixel % width


@triton.jit
def offset_of(c, y, x, C, height, width, CHANNELS_LAST: tl.constexpr):
    """Of an element within its sample."""
    if CHANNELS_LAST:
        return (y * width + x) * C + c
    return (c * height + y) * width + x


@triton.jit
def max_pool_fwd_kernel(
    x_ptr, y_ptr, positions_ptr, C, height, width, out_height, out_width,
    KERNEL_Y: tl.constexpr, KERNEL_X: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    PADDING_Y: tl.constexpr, PADDING_X: tl.constexpr,
    DILATION_Y: tl.constexpr, DILATION_X: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Elements of y, and their positions."""
    sample, i, exists, c, row, column = place(C, out_height, out_width, CHANNELS_LAST, BLOCK)
    source = x_ptr + sample * C * height * width
    top, left = row * STRIDE_Y - PADDING_Y, column * STRIDE_X - PADDING_X
    # Where all is -infinity the first tap inside stays.
    u = (tl.maximum(-top, 0) + DILATION_Y - 1) // DILATION_Y
    v = (tl.maximum(-left, 0) + DILATION_X - 1) // DILATION_X
    position = u * KERNEL_X + v
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    for tap in range(KERNEL_Y * KERNEL_X):
        y = top + tap // KERNEL_X * DILATION_Y
        x = left + tap % KERNEL_X * DILATION_X
        inside = exists & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        offset = offset_of(c, y, x, C, height, width, CHANNELS_LAST)
        value = tl.load(source + offset, mask=inside, other=float("-inf")).to(tl.float32)
        better = (value > best) | (value != value)  # the last NaN, as in PyTorch
        best = tl.where(better, value, best)
        position = tl.where(better, tap, position)
    out = sample * C * out_height * out_width + i
    tl.store(y_ptr + out, best.to(y_ptr.dtype.element_ty), mask=exists)
    tl.store(positions_ptr + out, position.to(tl.uint8), mask=exists)


@triton.jit
def max_pool_gather_kernel(
    x_ptr, positions_ptr, y_ptr, C, height, width, out_height, out_width,
    KERNEL_Y: tl.constexpr, KERNEL_X: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    PADDING_Y: tl.constexpr, PADDING_X: tl.constexpr,
    DILATION_Y: tl.constexpr, DILATION_X: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Elements of y, each the value at its position."""
    sample, i, exists, c, row, column = place(C, out_height, out_width, CHANNELS_LAST, BLOCK)
    out = sample * C * out_height * out_width + i
    tap = tl.load(positions_ptr + out, mask=exists, other=0).to(tl.int32)
    y = row * STRIDE_Y - PADDING_Y + tap // KERNEL_X * DILATION_Y
    x = column * STRIDE_X - PADDING_X + tap % KERNEL_X * DILATION_X
    offset = offset_of(c, y, x, C, height, width, CHANNELS_LAST)
    value = tl.load(x_ptr + sample * C * height * width + offset, mask=exists, other=0.0)
    tl.store(y_ptr + out, value, mask=exists)


@triton.jit
def max_pool_scatter_kernel(
    grad_ptr, positions_ptr, grad_x_ptr, C, height, width, out_height, out_width,
    KERNEL_Y: tl.constexpr, KERNEL_X: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    PADDING_Y: tl.constexpr, PADDING_X: tl.constexpr,
    DILATION_Y: tl.constexpr, DILATION_X: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Elements of grad_x, each a sum over the windows that have it as a tap, in their order."""
    sample, i, exists, c, y, x = place(C, height, width, CHANNELS_LAST, BLOCK)
    pooled = sample * C * out_height * out_width
    total = tl.zeros((BLOCK,), tl.float32)
    for tap in range(KERNEL_Y * KERNEL_X):
        down = y + PADDING_Y - tap // KERNEL_X * DILATION_Y
        right = x + PADDING_X - tap % KERNEL_X * DILATION_X
        row, column = down // STRIDE_Y, right // STRIDE_X
        covered = exists & (down >= 0) & (right >= 0) & (row < out_height) & (column < out_width)
        covered &= (row * STRIDE_Y == down) & (column * STRIDE_X == right)
        offset = pooled + offset_of(c, row, column, C, out_height, out_width, CHANNELS_LAST)
        position = tl.load(positions_ptr + offset, mask=covered, other=0).to(tl.int32)
        chosen = covered & (position == tap)
        total += tl.load(grad_ptr + offset, mask=chosen, other=0.0).to(tl.float32)
    out = sample * C * height * width + i
    tl.store(grad_x_ptr + out, total.to(grad_x_ptr.dtype.element_ty), mask=exists)


def _run(
    kernel: Any, tensors: tuple[Tensor, ...], pixels: Tensor, positions: Tensor, window: Window
) -> None:
    """``pixels``: the tensor that is not pooled."""
    if pixels.shape[1:].numel() > LARGEST_SAMPLE:
        raise ValueError(
            f"x: the Triton kernels take samples of at most {LARGEST_SAMPLE} elements, got "
            f"{pixels.shape[1:].numel()}"
        )
    made = pixels if kernel is max_pool_scatter_kernel else positions
    if not made.numel():
        return
    axes = {
        f"{name.upper()}_{axis}": getattr(window, name)[i]
        for name in ("kernel", "stride", "padding", "dilation")
        for i, axis in enumerate("YX")
    }
    host.launch(
        kernel, (made.shape[0] * host.cdiv(made.shape[1:].numel(), BLOCK),), made,
        *tensors, *pixels.shape[1:], *positions.shape[2:], **axes,
        CHANNELS_LAST=is_channels_last(positions), BLOCK=BLOCK, num_warps=host.NUM_WARPS,
    )  # fmt: skip


def max_pool_fwd(x: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """y in dtype and layout of x, and the positions."""
    y, positions = meta.max_pool_fwd(x, window)
    x = laid_as(x, positions)
    _run(max_pool_fwd_kernel, (x, y, positions), x, positions, window)
    return y, positions


def max_pool_gather(x: Tensor, positions: Tensor, window: Window) -> Tensor:
    """The values of x at the positions, in the layout of these."""
    y = meta.max_pool_gather(x, positions, window)
    x = laid_as(x, positions)
    _run(max_pool_gather_kernel, (x, positions, y), x, positions, window)
    return y


def max_pool_scatter(
    grad: Tensor, positions: Tensor, window: Window, size: tuple[int, int]
) -> Tensor:
    """grad_x (B, C, *size), the transpose of the gather."""
    grad_x = meta.max_pool_scatter(grad, positions, window, size)
    grad = laid_as(grad, positions)
    tensors = (grad, positions, grad_x)
    _run(max_pool_scatter_kernel, tensors, grad_x, positions, window)
    return grad_x
