"""What the kernels of the room batch_norm_relu share: tiles of rows of memory, masks, sums; launch.

A dense tensor is R rows of length L in the order of memory, as in the room's reference.py: a row
is one plane of contiguous z, one pixel of channels_last z. Blocks are (BLOCK_R, BLOCK_L).
"""
# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from camkernels.ops import _layout
from camkernels.ops import _triton_launch as host


@triton.jit
def place(L, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr):
    """First row (64 bit) and first column of this program's tile; neighbours side by side."""
    across = tl.cdiv(L, BLOCK_L)
    r0 = (tl.program_id(0) // across).to(tl.int64) * BLOCK_R
    return r0, (tl.program_id(0) % across) * BLOCK_L


@triton.jit
def channels_of(
    r0, l0, C, CHANNELS_LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr
):
    """Channel of every column, (1, BLOCK_L), or of every row, (BLOCK_R, 1); and which exist."""
    if CHANNELS_LAST:
        c = (l0 + tl.arange(0, BLOCK_L))[None, :]
    else:
        c = (((r0 % C).to(tl.int32) + tl.arange(0, BLOCK_R)) % C)[:, None]
    return c, c < C


@triton.jit
def values_of(pointer, offsets, inside):
    return tl.load(pointer + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def scale_of(rstd, gamma_ptr, c, exists):
    """gamma rstd."""
    scale = rstd
    if gamma_ptr is not None:
        scale *= values_of(gamma_ptr, c, exists)
    return scale


@triton.jit
def before_relu(deviation, scale, beta_ptr, c, exists):
    """u = gamma rstd (z - mean) + beta. One rounding is spelled out, so that the backward finds
    the very u of the forward, whatever the compiler fuses."""
    if beta_ptr is not None:
        return tl.fma(deviation, scale, values_of(beta_ptr, c, exists) + tl.zeros_like(deviation))
    return deviation * scale


@triton.jit
def bytes_of_mask(rows, row_exists, l0, L, BLOCK_L: tl.constexpr):
    """Offsets (BLOCK_R, BLOCK_L / 8) into the mask, and which exist."""
    length = (L + 7) // 8
    q = l0 // 8 + tl.arange(0, BLOCK_L // 8)
    return rows[:, None] * length + q[None, :], row_exists[:, None] & (q[None, :] < length)


@triton.jit
def bits_of(mask_bytes, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr):
    """(BLOCK_R, BLOCK_L) of the bytes (BLOCK_R, BLOCK_L / 8). Each byte is loaded once."""
    bits = (mask_bytes[:, :, None] >> tl.arange(0, 8).to(tl.uint8)[None, None, :]) & 1
    return tl.reshape(bits, (BLOCK_R, BLOCK_L)) != 0


@triton.jit
def bytes_from(bits, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr):
    """(BLOCK_R, BLOCK_L / 8) of the bits (BLOCK_R, BLOCK_L)."""
    eights = tl.reshape(bits.to(tl.int32), (BLOCK_R, BLOCK_L // 8, 8))
    return tl.sum(eights << tl.arange(0, 8)[None, None, :], 2).to(tl.uint8)


@triton.jit
def masked(
    grad, deviation, scale, beta_ptr, c, exists, mask_ptr, rows, row_exists, l0, L,
    RELU: tl.constexpr, GUIDED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """g_u, with 1[u > 0] from the mask where there is one."""
    if RELU:
        if GUIDED:
            grad = tl.where(grad < 0, 0.0, grad)  # keeps NaN
        if mask_ptr is not None:
            offsets, inside = bytes_of_mask(rows, row_exists, l0, L, BLOCK_L)
            open_ = bits_of(tl.load(mask_ptr + offsets, mask=inside, other=0), BLOCK_R, BLOCK_L)
            grad = tl.where(open_, grad, 0.0)
        else:
            closed = before_relu(deviation, scale, beta_ptr, c, exists) <= 0  # false for NaN
            grad = tl.where(closed, 0.0, grad)
    return grad


# ---- sums per channel: one program walks a chunk of the tiles of BLOCK_C channels ----


@triton.jit
def tile_of_channels(
    t, k, N, L, C,
    CHANNELS_LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Tile t of channel block k: its rows and which exist, its first column, how many elements.

    N: how many rows hold the channel; of contiguous z these are every C-th, from the k-th on.
    """
    step = tl.full((), BLOCK_R, tl.int64)
    if CHANNELS_LAST:
        first = t * step
        l0 = k * BLOCK_L
        count = tl.minimum(N - first, BLOCK_R).to(tl.float32)
    else:
        across = tl.cdiv(L, BLOCK_L)
        first = (t // across) * step
        l0 = (t % across) * BLOCK_L
        count = (tl.minimum(N - first, BLOCK_R) * tl.minimum(L - l0, BLOCK_L)).to(tl.float32)
    x = first + tl.arange(0, BLOCK_R)
    rows = x
    if not CHANNELS_LAST:
        rows = x * C + k
    return rows, x < N, l0, count


@triton.jit
def tile_offsets(rows, row_exists, l0, L, BLOCK_L: tl.constexpr):
    l = l0 + tl.arange(0, BLOCK_L)  # noqa: E741
    return rows[:, None] * L + l[None, :], row_exists[:, None] & (l[None, :] < L)


@triton.jit
def sum_of_tile(acc, CHANNELS_LAST: tl.constexpr):
    """(BLOCK_C,): the sums of a tile per channel; of contiguous z a tile has one channel."""
    sums = tl.sum(acc, 0)
    if not CHANNELS_LAST:
        sums = tl.sum(sums, 0) + tl.zeros((1,), tl.float32)
    return sums


@triton.jit
def store_partial(scratch_ptr, i, split, n_splits, C, c, values):
    pointer = scratch_ptr + (i * n_splits + split).to(tl.int64) * C + c
    tl.store(pointer, values, mask=c < C)


@triton.jit
def load_partials(scratch_ptr, i, s, n_splits, C, c):
    """(BLOCK_S, BLOCK_C). .cg: from L2, since other multiprocessors wrote them and this L1 is not
    coherent."""
    pointers = scratch_ptr + (i * n_splits + s).to(tl.int64)[:, None] * C + c[None, :]
    inside = (s[:, None] < n_splits) & (c[None, :] < C)
    return tl.load(pointers, mask=inside, other=0.0, cache_modifier=".cg")


@triton.jit
def sum_of_partials(scratch_ptr, i, n_splits, C, c, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """The i-th sum of the splits, added in a fixed order."""
    acc = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for s0 in range(0, n_splits, BLOCK_S):
        acc += load_partials(scratch_ptr, i, s0 + tl.arange(0, BLOCK_S), n_splits, C, c)
    return tl.sum(acc, 0)


@triton.jit
def moments_of_partials(scratch_ptr, n_splits, C, c, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """Mean and sum of squared deviations from those of the splits (Chan, Golub and LeVeque).

    A split's mean comes as two numbers, origin and shift: rounded to one, what means that are
    large but close to one another differ by would be lost. They are taken relative to the origin
    of split 0, which lies so near that little cancels in the last line.
    """
    base = tl.load(scratch_ptr + c, mask=c < C, other=0.0, cache_modifier=".cg")
    counts = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    firsts = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    seconds = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for s0 in range(0, n_splits, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        origin = load_partials(scratch_ptr, 0, s, n_splits, C, c)
        count = load_partials(scratch_ptr, 3, s, n_splits, C, c)  # zero behind the last split
        shift = origin - base[None, :] + load_partials(scratch_ptr, 1, s, n_splits, C, c)
        counts += count
        firsts += count * shift
        seconds += load_partials(scratch_ptr, 2, s, n_splits, C, c) + count * shift * shift
    count = tl.maximum(tl.sum(counts, 0), 1)
    shift, squares = moments(tl.sum(firsts, 0), tl.sum(seconds, 0), count)
    return base + shift, squares


@triton.jit
def finite_or_zero(x):
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def moments(first, second, count):
    """Mean and sum of squared deviations from the sums of values and of squares."""
    shift = first / count
    squares = second - first * shift
    return shift, tl.where(squares < 0, 0.0, squares)  # keeps NaN


# ---- host ----


class Rows(NamedTuple):
    """A dense tensor as rows of memory."""

    number: int
    length: int
    channels: int
    channels_last: bool
    align: int  # as host.alignment: the kernels take the length divided by it


def rows_of(z: Tensor, mask: bool) -> Rows:
    batch, channels, height, width = z.shape
    pixels = height * width
    # Maps of one pixel lie in memory as pixels of many channels do, but the mask's rows differ.
    if _layout.is_channels_last(z) or (pixels == 1 and not mask):
        return Rows(batch * pixels, channels, channels, True, math.gcd(16, channels))
    host.check_pixels(z, "z")
    return Rows(batch * channels, pixels, channels, False, math.gcd(16, pixels))


# Elements of a tile: as many as leave enough registers for several programs a multiprocessor, by
# how many tensors a kernel reads and writes at once.
FORWARD_TILE, BACKWARD_TILE = host.TILE, host.TILE // 2


def elementwise(
    kernel: Any, z: Tensor, mask: Tensor | None, elements: int, *args: Any, **constants: Any
) -> None:
    """Launch over all tiles of z; the kernel takes R, L, C after the tensors."""
    tensors = [a for a in args if not isinstance(a, float)]
    rows = rows_of(z, mask is not None)
    block_l = host.pixel_block(rows.length, 128 if rows.channels_last else 512)
    across = host.cdiv(rows.length, block_l)
    if rows.align < 4:  # one element a load, hence an address each in registers
        elements //= 2
    wanted = host.PROGRAMS_PER_MULTIPROCESSOR * host.multiprocessors(z.device)
    while elements > 1024 and rows.number * rows.length < wanted * elements:
        elements //= 2  # a small tensor: rather more programs than long ones
    block_r = max(1, min(host.power_of_two(rows.number), elements // block_l))
    host.launch(
        kernel, (across * host.cdiv(rows.number, block_r),), z,
        *tensors, rows.number, rows.length // rows.align, rows.channels,
        *(a for a in args if isinstance(a, float)), **constants,
        CHANNELS_LAST=rows.channels_last, ALIGN=rows.align, BLOCK_R=block_r, BLOCK_L=block_l,
        num_warps=host.NUM_WARPS,
    )  # fmt: skip


# A program of a reduction has 8 warps of 32 bytes a thread and tensor, and there are two of them a
# multiprocessor (for which MAX_REGISTERS just suffices): fewer and longer programs than elsewhere,
# since the last one adds what all have left.
SUMS_WARPS, SUMS_TILE, SUMS_PER_MULTIPROCESSOR = 8, 4096, 2


def reduction(
    kernel: Any, z: Tensor, mask: Tensor | None, sums: int, *args: Any, **constants: Any
) -> None:
    """Launch over all channels; the kernel takes scratch for ``sums`` partial sums after args."""
    rows = rows_of(z, mask is not None)
    halved = rows.align < 4 or z.element_size() == 4
    elements = SUMS_TILE // 2 if halved else SUMS_TILE
    if rows.channels_last:
        # Few channels a program, as long as they fill 64 bytes: less for the last one to add.
        count, block_l = rows.number, host.pixel_block(rows.channels, 32)
        block_c = block_l = block_l if rows.channels <= 128 else 64
    else:
        count = rows.number // rows.channels
        block_c, block_l = 1, host.pixel_block(rows.length, elements)
    block_r = max(1, min(host.power_of_two(count), elements // block_l))
    tiles = host.cdiv(count, block_r)
    if not rows.channels_last:
        tiles *= host.cdiv(rows.length, block_l)
    blocks = host.cdiv(rows.channels, block_c)
    wanted = host.cdiv(SUMS_PER_MULTIPROCESSOR * host.multiprocessors(z.device), blocks)
    chunk = host.cdiv(tiles, min(wanted, tiles))
    n_splits = host.cdiv(tiles, chunk)
    split = n_splits > 1
    host.launch(
        kernel, (blocks, n_splits), z, *args,
        z.new_empty((sums, n_splits, rows.channels), dtype=torch.float32) if split else None,
        host.arrival_counters(blocks, z.device) if split else None,
        count, rows.length // rows.align, rows.channels, tiles, chunk,
        **constants, SPLIT=split, CHANNELS_LAST=rows.channels_last, ALIGN=rows.align,
        BLOCK_R=block_r, BLOCK_L=block_l, BLOCK_C=block_c,
        BLOCK_S=min(host.power_of_two(n_splits), SUMS_TILE // 2 // block_c, 128),
        num_warps=SUMS_WARPS, maxnreg=host.MAX_REGISTERS,
    )  # fmt: skip
