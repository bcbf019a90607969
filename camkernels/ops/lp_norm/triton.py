"""lp_norm in Triton: partial norms of blocks, or of tiles of the enlarged maps, joined in a fixed
order; a backward of one launch, three where maps are enlarged. Formulas: reference.py.

A block has a scale of its own, its largest magnitude, so that nothing overflows on the way. Ties
for the largest magnitude of all (p = inf) are counted in a launch of their own.
"""
# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from camkernels.ops import _triton_launch as host
from camkernels.ops._gpu import check_axis
from camkernels.ops._triton_statistics import load_pixels
from camkernels.ops._triton_warp import pair

LARGEST_MAP = 64
TILE, TILE_WARPS = tl.constexpr(16), 4
# All that a thread can have: left to itself the compiler spills to get down to 72 (sm_80).
MAX_REGISTERS = 255
ZERO, ONE, TWO, GENERAL, LARGEST, TIES = (tl.constexpr(i) for i in range(6))


@triton.jit
def power(ratio, p, KIND: tl.constexpr):
    """ratio^p, 0 at 0; ratio is not negative."""
    if KIND == TWO:
        found = ratio * ratio
    else:
        found = tl.exp2(p * tl.log2(tl.where(ratio == 0, 1.0, ratio)))
        found = tl.where(ratio == 0, 0.0, found)
    return found


@triton.jit
def largest_of(x):
    """The largest of magnitudes; a maximum passes over NaN."""
    hidden = tl.sum(tl.where(x != x, x, 0.0), 0)
    return tl.max(tl.where(x != x, 0.0, x), 0) + hidden


@triton.jit
def partial(x, norm_ptr, partial_ptr, p, KIND: tl.constexpr):
    """Write the largest magnitude and the sum of x (BLOCK,), which is 0 where there is nothing."""
    x = tl.abs(x)
    largest = largest_of(x)
    if KIND == ZERO:
        total = tl.sum(tl.where(x != 0, 1.0, 0.0) + (x - x), 0)
    elif KIND == ONE:
        total = tl.sum(x, 0)
    elif KIND == LARGEST:
        total = largest
    elif KIND == TIES:
        total = tl.sum(tl.where(x == tl.load(norm_ptr), 1.0, 0.0), 0)
    else:
        unit = tl.zeros_like(x) + tl.where(largest == 0, 1.0, largest)
        total = tl.sum(power(tl.div_rn(x, unit), p, KIND), 0)
    partial_ptr += tl.program_id(0).to(tl.int64) * 2
    tl.store(partial_ptr, largest)
    tl.store(partial_ptr + 1, total)


@triton.jit
def ties_of(ties_ptr, b, J, BLOCK_J: tl.constexpr):
    """The second partial sums of sample b, at least 1."""
    ties = tl.zeros((BLOCK_J,), tl.float32)
    for j0 in range(0, J, BLOCK_J):
        j = j0 + tl.arange(0, BLOCK_J)
        ties += tl.load(ties_ptr + (b * J + j) * 2 + 1, mask=j < J, other=0.0)
    return tl.maximum(tl.sum(ties, 0), 1.0)


@triton.jit
def cotangent(x, norm, given, ties, exponent, KIND: tl.constexpr):
    """Of x, whose norm and the norm's cotangent are given; exponent is p - 1."""
    sign = tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))  # NaN stays
    found = sign * tl.where(norm == 0, 0.0, given)
    unit = tl.zeros_like(x) + tl.where(norm == 0, 1.0, norm)
    if KIND == ZERO:
        found = tl.zeros_like(x)
    elif KIND == TWO:
        found *= tl.div_rn(tl.abs(x), unit)
    elif KIND == LARGEST:
        found *= tl.where(tl.abs(x) == norm, tl.div_rn(1.0, ties), 0.0)
    elif KIND == GENERAL:
        found *= power(tl.div_rn(tl.abs(x), unit), exponent, KIND)
    return found


@triton.jit
def lp_norm_blocks_kernel(
    values_ptr, norms_ptr, partial_ptr, P, W, J, p, stride_b, stride_y, stride_x,
    FLAT: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Partial norm of block j of sample b."""
    b, j = (tl.program_id(0) // J).to(tl.int64), tl.program_id(0) % J
    pixels = j * BLOCK + tl.arange(0, BLOCK)
    x = load_pixels(values_ptr + b * stride_b, pixels, P, W, stride_y, stride_x, FLAT, False)
    partial(x, norms_ptr + b, partial_ptr, p, KIND)


@triton.jit
def reach(index, source, size):
    """The first and the last pixel of the map that outputs ``index`` (TILE,) touch."""
    index = tl.minimum(index, size - 1)
    below, above, _ = pair((2 * index + 1) * source - size, 2 * size, source - 1)
    return tl.min(below, 0), tl.max(above, 0)


@triton.jit
def matrix(index, source, size, first, COLUMNS: tl.constexpr):
    """Rows ``index`` (TILE,) and COLUMNS columns from ``first`` of P or Q; any for no output."""
    below, above, share = pair((2 * index + 1) * source - size, 2 * size, source - 1)
    column = first + tl.arange(0, COLUMNS)[None, :]
    found = tl.where(below[:, None] == column, (1 - share)[:, None], 0.0)
    found += tl.where(above[:, None] == column, share[:, None], 0.0)
    return found


@triton.jit
def tile_of(values_ptr, row, column, h, w, H, W, stride_y, stride_x):
    """P v Q^T at row, column (TILE,), 0 outside: from chunks of the map that it touches."""
    i = tl.arange(0, TILE)
    first_y, last_y = reach(row, h, H)
    first_x, last_x = reach(column, w, W)
    total = tl.zeros((TILE, TILE), tl.float32)
    for x0 in range(first_x, last_x + 1, TILE):
        part = tl.zeros((TILE, TILE), tl.float32)
        for y0 in range(first_y, last_y + 1, TILE):
            y, x = (y0 + i)[:, None], (x0 + i)[None, :]
            at = values_ptr + y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
            values = tl.load(at, mask=(y < h) & (x < w), other=0.0).to(tl.float32)
            rows = matrix(row, h, H, y0, TILE)
            part = tl.dot(rows, values, part, input_precision="ieee")
        columns = matrix(column, w, W, x0, TILE)
        total = tl.dot(part, tl.trans(columns), total, input_precision="ieee")
    # What does not exist is 0, and so is its cotangent.
    return tl.where((row < H)[:, None] & (column < W)[None, :], total, 0.0)


@triton.jit
def lp_norm_tiles_kernel(
    values_ptr, norms_ptr, partial_ptr, h, w, H, W, p, stride_b, stride_y, stride_x,
    KIND: tl.constexpr,
):  # fmt: skip
    """Partial norm of one tile of the enlarged map of sample b."""
    across = tl.cdiv(W, TILE)
    tiles = tl.cdiv(H, TILE) * across
    b, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    i = tl.arange(0, TILE)
    row, column = tile // across * TILE + i, tile % across * TILE + i
    values = tile_of(values_ptr + b * stride_b, row, column, h, w, H, W, stride_y, stride_x)
    partial(tl.ravel(values), norms_ptr + b, partial_ptr, p, KIND)


@triton.jit
def lp_norm_join_kernel(
    partial_ptr, norms_ptr, J, p, inverse, KIND: tl.constexpr, BLOCK_J: tl.constexpr
):
    """Program (b,): the norm of sample b from its partial norms; inverse is 1 / p."""
    b = tl.program_id(0).to(tl.int64)
    partial_ptr += b * J * 2
    sums = tl.zeros((BLOCK_J,), tl.float32)
    largest = 0.0
    for j0 in range(0, J, BLOCK_J):
        j = j0 + tl.arange(0, BLOCK_J)
        x = tl.load(partial_ptr + j * 2, mask=j < J, other=0.0)
        most = largest_of(x)
        largest = tl.where((most > largest) | (most != most), most, largest)
        if KIND <= ONE:
            sums += tl.load(partial_ptr + j * 2 + 1, mask=j < J, other=0.0)
    if (KIND == TWO) | (KIND == GENERAL):
        unit = sums + tl.where(largest == 0, 1.0, largest)
        for j0 in range(0, J, BLOCK_J):
            j = j0 + tl.arange(0, BLOCK_J)
            x = tl.load(partial_ptr + j * 2, mask=j < J, other=0.0)
            total = tl.load(partial_ptr + j * 2 + 1, mask=j < J, other=0.0)
            sums += power(tl.div_rn(x, unit), p, KIND) * total
    norm = tl.sum(sums, 0)
    if KIND == LARGEST:
        norm = largest
    elif KIND == TWO:
        norm = largest * tl.sqrt_rn(norm)
    elif KIND == GENERAL:
        norm = largest * power(norm, inverse, KIND)
    tl.store(norms_ptr + b, norm)


@triton.jit(do_not_specialize=["stride_grad"])
def lp_norm_bwd_kernel(
    grad_ptr, values_ptr, norms_ptr, ties_ptr, out_ptr, P, W, J, exponent,
    stride_grad, stride_b, stride_y, stride_x,
    FLAT: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """The cotangent of block j of sample b."""
    b, j = (tl.program_id(0) // J).to(tl.int64), tl.program_id(0) % J
    pixels = j * BLOCK + tl.arange(0, BLOCK)
    x = load_pixels(values_ptr + b * stride_b, pixels, P, W, stride_y, stride_x, FLAT, False)
    norm, given = tl.load(norms_ptr + b), tl.load(grad_ptr + b * stride_grad).to(tl.float32)
    ties = 1.0
    if KIND == LARGEST:
        ties = ties_of(ties_ptr, b, J, BLOCK_J)
    found = cotangent(x, norm, given, ties, exponent, KIND)
    out_ptr += b * P + pixels
    tl.store(out_ptr, found.to(out_ptr.dtype.element_ty), mask=pixels < P)


@triton.jit(do_not_specialize=["stride_grad"])
def lp_norm_tiles_bwd_kernel(
    grad_ptr, values_ptr, norms_ptr, ties_ptr, sums_ptr, splits, chunk, h, w, H, W, exponent,
    stride_grad, stride_b, stride_y, stride_x,
    KIND: tl.constexpr, MAP_Y: tl.constexpr, MAP_X: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """P^T dV Q of ``chunk`` tiles of the enlarged map of sample b."""
    across = tl.cdiv(W, TILE)
    tiles = tl.cdiv(H, TILE) * across
    b, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    values_ptr += b * stride_b
    norm, given = tl.load(norms_ptr + b), tl.load(grad_ptr + b * stride_grad).to(tl.float32)
    ties = 1.0
    if KIND == LARGEST:
        ties = ties_of(ties_ptr, b, tiles, BLOCK_J)
    i = tl.arange(0, TILE)
    sums = tl.zeros((MAP_Y, MAP_X), tl.float32)
    for tile in range(split * chunk, tl.minimum(split * chunk + chunk, tiles)):
        row, column = tile // across * TILE + i, tile % across * TILE + i
        values = tile_of(values_ptr, row, column, h, w, H, W, stride_y, stride_x)
        found = cotangent(values, norm, given, ties, exponent, KIND)
        rows = matrix(row, h, H, 0, MAP_Y)
        columns = matrix(column, w, W, 0, MAP_X)
        part = tl.zeros((MAP_Y, TILE), tl.float32)
        part = tl.dot(tl.trans(rows), found, part, input_precision="ieee")
        sums = tl.dot(part, columns, sums, input_precision="ieee")
    y, x = tl.arange(0, MAP_Y)[:, None], tl.arange(0, MAP_X)[None, :]
    sums_ptr += (tl.program_id(0).to(tl.int64) * h + y) * w + x
    tl.store(sums_ptr, sums, mask=(y < h) & (x < w))


@triton.jit
def lp_norm_maps_join_kernel(sums_ptr, out_ptr, splits, P, BLOCK: tl.constexpr):
    """Program (b, j): BLOCK pixels of sample b, from the sums of its programs."""
    b = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(sums_ptr + (b * splits + split) * P + p, mask=p < P, other=0.0)
    out_ptr += b * P + p
    tl.store(out_ptr, total.to(out_ptr.dtype.element_ty), mask=p < P)


def _kind(p: float) -> int:
    named = {0.0: ZERO, 1.0: ONE, 2.0: TWO, math.inf: LARGEST}
    return int(named.get(p, GENERAL).value)


def _block(pixels: int) -> int:
    return min(max(32, host.power_of_two(pixels)), host.TILE // 2)


def _warps(block: int) -> int:
    return min(max(1, block // 256), host.NUM_WARPS)


def _planes(values: Tensor) -> Tensor:
    """(B, h, w) as it is; other ranks as one row per sample, copied where that has no strides."""
    if values.dim() == 3:
        return values
    return values.reshape(values.shape[0], 1, values.shape[1:].numel())


def _check_map(values: Tensor, size: Sequence[int]) -> None:
    sides = values.shape[1:]
    if max(sides) > LARGEST_MAP:
        raise ValueError(
            f"values: the Triton kernels enlarge maps up to {LARGEST_MAP} x {LARGEST_MAP}, got "
            f"{sides[0]} x {sides[1]}; F.interpolate followed by lp_norm takes larger ones"
        )
    for side, length in zip(sides, size, strict=True):
        check_axis(side, side, length)


def _partial(values: Tensor, norms: Tensor, p: float, size: Sequence[int], kind: int) -> Tensor:
    """(B, J, 2): the largest magnitude and the sum of each block or tile."""
    strides = host.pixel_strides(values)
    pixels = host.check_pixels(values, "values")
    if size:
        count = host.cdiv(size[0], TILE.value) * host.cdiv(size[1], TILE.value)
    else:
        block = _block(pixels)
        count = host.cdiv(pixels, block)
    found = torch.empty((len(values), count, 2), dtype=torch.float32, device=values.device)
    grid, exponent = (len(values) * count,), p if math.isfinite(p) else 0.0
    if size:
        host.launch(
            lp_norm_tiles_kernel, grid, values, values, norms, found,
            *values.shape[1:], *size, exponent, *values.stride(),
            KIND=kind, num_warps=TILE_WARPS, maxnreg=host.MAX_REGISTERS,
        )  # fmt: skip
    else:
        host.launch(
            lp_norm_blocks_kernel, grid, values, values, norms, found,
            pixels, values.shape[2], count, exponent,
            values.stride(0), strides.stride_y, strides.stride_x,
            FLAT=strides.flat, KIND=kind, BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
    return found


def _block_j(count: int) -> int:
    return min(max(16, host.power_of_two(count)), 1024)


def lp_norm_fwd(values: Tensor, p: float, size: Sequence[int]) -> Tensor:
    """(B,) float32."""
    values = _planes(values)
    if size:
        _check_map(values, size)
    norms = torch.empty(len(values), dtype=torch.float32, device=values.device)
    if len(values):
        kind = _kind(p)
        found = _partial(values, norms, p, size, kind)
        exponents = (p, 1 / p) if kind == GENERAL.value else (0.0, 0.0)
        host.launch(
            lp_norm_join_kernel, (len(values),), values, found, norms, found.shape[1], *exponents,
            KIND=kind, BLOCK_J=_block_j(found.shape[1]), num_warps=1,
        )  # fmt: skip
    return norms


def lp_norm_bwd(
    grad_norms: Tensor, values: Tensor, norms: Tensor, p: float, size: Sequence[int]
) -> Tensor:
    """The cotangent of the values, contiguous in their dtype."""
    out = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    values, norms, kind = _planes(values), norms.contiguous(), _kind(p)
    if not len(values):
        return out
    ties = norms  # not read
    if kind == LARGEST.value:
        ties = _partial(values, norms, p, size, TIES.value)
    exponent = p - 1 if kind == GENERAL.value else 0.0
    if size:
        _check_map(values, size)
        _tiles_bwd(grad_norms, values, norms, ties, out, exponent, size, kind)
        return out
    pixels = host.check_pixels(values, "values")
    strides, block = host.pixel_strides(values), _block(pixels)
    count = host.cdiv(pixels, block)
    host.launch(
        lp_norm_bwd_kernel, (len(values) * count,), values, grad_norms, values, norms, ties, out,
        pixels, values.shape[2], count, exponent,
        grad_norms.stride(0), values.stride(0), strides.stride_y, strides.stride_x,
        FLAT=strides.flat, KIND=kind, BLOCK=block, BLOCK_J=_block_j(count),
        num_warps=_warps(block),
    )  # fmt: skip
    return out


def _tiles_bwd(
    grad_norms: Tensor,
    values: Tensor,
    norms: Tensor,
    ties: Tensor,
    out: Tensor,
    exponent: float,
    size: Sequence[int],
    kind: int,
) -> None:
    tiles = host.cdiv(size[0], TILE.value) * host.cdiv(size[1], TILE.value)
    chunk = host.channel_chunk(len(values), tiles, 1, values.device)
    splits = host.cdiv(tiles, chunk)
    height, width = values.shape[1:]
    blocks: dict[str, Any] = {
        "MAP_Y": max(TILE.value, host.power_of_two(height)),
        "MAP_X": max(TILE.value, host.power_of_two(width)),
        "BLOCK_J": _block_j(tiles),
    }
    shape = (len(values), splits, height, width)
    sums = torch.empty(shape, dtype=torch.float32, device=values.device)
    host.launch(
        lp_norm_tiles_bwd_kernel, (len(values) * splits,), values,
        grad_norms, values, norms, ties, sums, splits, chunk, height, width, *size, exponent,
        grad_norms.stride(0), *values.stride(), KIND=kind, **blocks,
        num_warps=TILE_WARPS, maxnreg=MAX_REGISTERS,
    )  # fmt: skip
    block = min(max(32, host.power_of_two(height * width)), 1024)
    host.launch(
        lp_norm_maps_join_kernel, (len(values), host.cdiv(height * width, block)), values,
        sums, out, splits, height * width, BLOCK=block, num_warps=max(1, block // 256),
    )  # fmt: skip
