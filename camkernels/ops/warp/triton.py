"""warp in Triton: one launch forward, two backward. Formulas: reference.py.

The backward gathers: each pixel of the source sums over the outputs that touch it, first along the
rows of the cotangent, then down the columns of what that leaves (float32 scratch (B, C, H, w)).
"""
# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from camkernels.ops import _triton_launch as host
from camkernels.ops._gpu import check_axis
from camkernels.ops._triton_warp import load_box, taps, touching, weight_of
from camkernels.ops.warp.reference import Size

BLOCK = 1024
BOX_STRIDES = ["stride_box_b", "stride_box_i", "stride_flips"]


@triton.jit
def across(
    plane_ptr, row, a, b, c, d, w_a, w_b, w_c, w_d, stride_y, stride_x, COMPOSED: tl.constexpr
):
    """Rows ``row`` (BLOCK_Y,) of source Q^T."""
    line = plane_ptr + row.to(tl.int64)[:, None] * stride_y
    total = tl.load(line + a.to(tl.int64)[None, :] * stride_x).to(tl.float32) * w_a[None, :]
    total += tl.load(line + b.to(tl.int64)[None, :] * stride_x).to(tl.float32) * w_b[None, :]
    if COMPOSED:
        total += tl.load(line + c.to(tl.int64)[None, :] * stride_x).to(tl.float32) * w_c[None, :]
        total += tl.load(line + d.to(tl.int64)[None, :] * stride_x).to(tl.float32) * w_d[None, :]
    return total


@triton.jit(do_not_specialize=BOX_STRIDES)
def warp_fwd_kernel(
    source_ptr, boxes_ptr, flips_ptr, out_ptr,
    C, source_y, source_x, via_y, via_x, size_y, size_x,
    stride_b, stride_c, stride_y, stride_x, stride_box_b, stride_box_i, stride_flips,
    COMPOSED: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """A block of outputs of one plane. Taps always exist, so that only the store is masked."""
    blocks_x = tl.cdiv(size_x, BLOCK_X)
    blocks = tl.cdiv(size_y, BLOCK_Y) * blocks_x
    plane, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    b, channel = (plane // C).to(tl.int64), (plane % C).to(tl.int64)
    top, left, height, width, flip, valid = load_box(
        boxes_ptr, flips_ptr, b, via_y, via_x, stride_box_b, stride_box_i, stride_flips
    )
    y = block // blocks_x * BLOCK_Y + tl.arange(0, BLOCK_Y)
    x = block % blocks_x * BLOCK_X + tl.arange(0, BLOCK_X)
    r_a, r_b, r_c, r_d, v_a, v_b, v_c, v_d = taps(
        tl.minimum(y, size_y - 1), top, height, 0, source_y, via_y, size_y, COMPOSED
    )
    c_a, c_b, c_c, c_d, w_a, w_b, w_c, w_d = taps(
        tl.minimum(x, size_x - 1), left, width, flip, source_x, via_x, size_x, COMPOSED
    )
    source_ptr += b * stride_b + channel * stride_c
    total = v_a[:, None] * across(
        source_ptr, r_a, c_a, c_b, c_c, c_d, w_a, w_b, w_c, w_d, stride_y, stride_x, COMPOSED
    )
    total += v_b[:, None] * across(
        source_ptr, r_b, c_a, c_b, c_c, c_d, w_a, w_b, w_c, w_d, stride_y, stride_x, COMPOSED
    )
    if COMPOSED:
        total += v_c[:, None] * across(
            source_ptr, r_c, c_a, c_b, c_c, c_d, w_a, w_b, w_c, w_d, stride_y, stride_x, COMPOSED
        )
        total += v_d[:, None] * across(
            source_ptr, r_d, c_a, c_b, c_c, c_d, w_a, w_b, w_c, w_d, stride_y, stride_x, COMPOSED
        )
    total = tl.where(valid, total, float("nan"))
    out_ptr += (plane.to(tl.int64) * size_y + y[:, None]) * size_x + x[None, :]
    exists = (y < size_y)[:, None] & (x < size_x)[None, :]
    tl.store(out_ptr, total.to(out_ptr.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=BOX_STRIDES)
def warp_bwd_kernel(
    grad_ptr, boxes_ptr, flips_ptr, out_ptr,
    C, lines, source, via, size, via_y, via_x,
    stride_b, stride_c, stride_line, stride_size, out_plane, out_line, out_source,
    stride_box_b, stride_box_i, stride_flips,
    COLUMNS: tl.constexpr, COMPOSED: tl.constexpr,
    BLOCK_LINE: tl.constexpr, BLOCK_SOURCE: tl.constexpr,
):  # fmt: skip
    """Lines of ``size`` outputs back to ``source`` pixels: rows where COLUMNS, else columns."""
    blocks_source = tl.cdiv(source, BLOCK_SOURCE)
    blocks = tl.cdiv(lines, BLOCK_LINE) * blocks_source
    plane, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    b, channel = (plane // C).to(tl.int64), (plane % C).to(tl.int64)
    top, left, height, width, flip, valid = load_box(
        boxes_ptr, flips_ptr, b, via_y, via_x, stride_box_b, stride_box_i, stride_flips
    )
    if COLUMNS:
        begin, length = left, width
    else:
        begin, length, flip = top, height, flip - flip
    line = block // blocks_source * BLOCK_LINE + tl.arange(0, BLOCK_LINE)
    pixel = block % blocks_source * BLOCK_SOURCE + tl.arange(0, BLOCK_SOURCE)
    exists = (line < lines)[:, None] & (pixel < source)[None, :]
    start, count = touching(
        tl.minimum(pixel, source - 1), begin, length, source, via, size, COMPOSED
    )
    grad_ptr += b * stride_b + channel * stride_c + line.to(tl.int64)[:, None] * stride_line
    total = tl.zeros((BLOCK_LINE, BLOCK_SOURCE), tl.float32)
    for k in range(tl.max(count, 0)):
        index = tl.minimum(start + k, size - 1)
        weight = weight_of(pixel, index, begin, length, source, via, size, COMPOSED)
        weight = tl.where(k < count, weight, 0.0)
        index += flip * (size - 1 - 2 * index)
        touched = exists & (weight != 0)[None, :]
        grad = tl.load(
            grad_ptr + index.to(tl.int64)[None, :] * stride_size, mask=touched, other=0.0
        )
        total += grad.to(tl.float32) * weight[None, :]
    total = tl.where(valid, total, float("nan"))
    out_ptr += plane.to(tl.int64) * out_plane
    out_ptr += line.to(tl.int64)[:, None] * out_line + pixel.to(tl.int64)[None, :] * out_source
    tl.store(out_ptr, total.to(out_ptr.dtype.element_ty), mask=exists)


def _blocks(down: int, along: int) -> tuple[int, int]:
    """Of an array (down, along) with rows side by side in memory."""
    block = min(host.power_of_two(along), 64)
    return min(host.power_of_two(down), BLOCK // block), block


def _box_arguments(boxes: Tensor, flips: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[int, ...]]:
    return (boxes, flips.view(torch.uint8)), (*boxes.stride(), flips.stride(0))


def warp_fwd(source: Tensor, boxes: Tensor, flips: Tensor, via: Size, size: Size) -> Tensor:
    batch, channels, *shape = source.shape
    out = torch.empty((batch, channels, *size), dtype=source.dtype, device=source.device)
    for axis in range(2):
        check_axis(shape[axis], via[axis], size[axis])
    if out.numel():
        pointers, box_strides = _box_arguments(boxes, flips)
        block_y, block_x = _blocks(*size)
        blocks = host.cdiv(size[0], block_y) * host.cdiv(size[1], block_x)
        host.launch(
            warp_fwd_kernel, (batch * channels * blocks,), source,
            source, *pointers, out, channels, *shape, *via, *size, *source.stride(), *box_strides,
            COMPOSED=tuple(shape) != tuple(via), BLOCK_Y=block_y, BLOCK_X=block_x,
            num_warps=host.NUM_WARPS,
        )  # fmt: skip
    return out


def warp_bwd(grad: Tensor, boxes: Tensor, flips: Tensor, shape: Size, via: Size) -> Tensor:
    """The cotangent of the source, (B, C, h, w) contiguous in the dtype of ``grad``."""
    batch, channels, *size = grad.shape
    out = torch.empty((batch, channels, *shape), dtype=grad.dtype, device=grad.device)
    for axis in range(2):
        check_axis(shape[axis], via[axis], size[axis])
    if not out.numel():
        return out
    narrow = torch.empty(
        (batch, channels, size[0], shape[1]), dtype=torch.float32, device=grad.device
    )
    pointers, box_strides = _box_arguments(boxes, flips)
    for columns, given, made in ((True, grad, narrow), (False, narrow, out)):
        # The axis that shrinks, and the other; a plane of ``made`` is contiguous.
        axis, other = (1, 0) if columns else (0, 1)
        lines, pixels = made.shape[2 + other], shape[axis]
        blocks = _blocks(*made.shape[2:])
        block_line, block_source = blocks[other], blocks[axis]
        programs = host.cdiv(lines, block_line) * host.cdiv(pixels, block_source)
        host.launch(
            warp_bwd_kernel, (batch * channels * programs,), grad,
            given, *pointers, made, channels, lines, pixels, via[axis], size[axis], *via,
            given.stride(0), given.stride(1), given.stride(2 + other), given.stride(2 + axis),
            made.shape[2] * made.shape[3], made.stride(2 + other), made.stride(2 + axis),
            *box_strides,
            COLUMNS=columns, COMPOSED=tuple(shape) != tuple(via),
            BLOCK_LINE=block_line, BLOCK_SOURCE=block_source, num_warps=host.NUM_WARPS,
        )  # fmt: skip
    return out
