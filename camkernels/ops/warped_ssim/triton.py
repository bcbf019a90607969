"""warped_ssim in Triton: three launches each. Formulas: reference.py.

First the taps of P and Q, eight numbers a row: made where they are used, their divisions of
integers would cost more than the rest. Then as ssim/triton.py, but a block of pixels is made from a
map, P map Q^T, with the rows of P and Q that the block needs and the pixels of the map that it
touches. Backward: a program goes over several tiles of windows, and sums P^T (cotangent of a block)
Q of these windows alone, so that no pixel is ever stored; the programs' sums are joined in a fixed
order.
"""
# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from camkernels.ops import _triton_launch as host
from camkernels.ops._gpu import check_axis
from camkernels.ops._triton_warp import load_box, taps
from camkernels.ops.ssim.arguments import weights_on, window_arguments
from camkernels.ops.ssim.triton import (
    TILE,
    add_across,
    add_down,
    band,
    cotangents,
    existing,
    filtered,
    join,
    load_tile,
    parts,
    product,
)
from camkernels.ops.warped_ssim.reference import Size

LARGEST_MAP = 64
BLOCK = 1024
BOX_STRIDES = ["stride_box_b", "stride_box_i", "stride_flips"]


@triton.jit(do_not_specialize=BOX_STRIDES)
def warped_ssim_taps_kernel(
    boxes_ptr, flips_ptr, taps_ptr, batch,
    map_y, map_x, other_y, other_x, via_y, via_x, size_y, size_x,
    stride_box_b, stride_box_i, stride_flips, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (b, j): rows of P, then of Q, of sample b, or of the enlargement where b is B.

    A row is four pixels (exact in float32) and four weights, NaN where the box is not valid.
    """
    b = tl.program_id(0)
    boxed = b < batch
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    down = n < size_y
    top, left, height, width, flip, valid = load_box(
        boxes_ptr, flips_ptr, tl.minimum(b, batch - 1).to(tl.int64), via_y, via_x,
        stride_box_b, stride_box_i, stride_flips,
    )  # fmt: skip
    size = tl.where(down, size_y, size_x)
    index = tl.minimum(tl.where(down, n, n - size_y), size - 1)
    source = tl.where(down, tl.where(boxed, map_y, other_y), tl.where(boxed, map_x, other_x))
    via = tl.where(boxed, tl.where(down, via_y, via_x), size)
    begin = tl.where(boxed, tl.where(down, top, left), 0)
    length = tl.where(boxed, tl.where(down, height, width), size)
    flip = tl.where(boxed & (n >= size_y), flip, 0)
    one, two, three, four, w_one, w_two, w_three, w_four = taps(
        index, begin, length, flip, source, via, size, True
    )
    exists, known = n < size_y + size_x, valid | (b == batch)
    taps_ptr += (b.to(tl.int64) * (size_y + size_x) + n) * 8
    tl.store(taps_ptr, one.to(tl.float32), mask=exists)
    tl.store(taps_ptr + 1, two.to(tl.float32), mask=exists)
    tl.store(taps_ptr + 2, three.to(tl.float32), mask=exists)
    tl.store(taps_ptr + 3, four.to(tl.float32), mask=exists)
    tl.store(taps_ptr + 4, tl.where(known, w_one, float("nan")), mask=exists)
    tl.store(taps_ptr + 5, tl.where(known, w_two, float("nan")), mask=exists)
    tl.store(taps_ptr + 6, tl.where(known, w_three, float("nan")), mask=exists)
    tl.store(taps_ptr + 7, tl.where(known, w_four, float("nan")), mask=exists)


@triton.jit
def reach(taps_ptr, index, size):
    """The first and the last pixel of the map that rows ``index`` (CHUNK,) touch."""
    taps_ptr += tl.minimum(tl.maximum(index, 0), size - 1) * 8
    first, last = tl.load(taps_ptr), tl.load(taps_ptr + 3)
    # Mirrored, positions fall: the ends are where they are.
    return tl.min(first, 0).to(tl.int32), tl.max(last, 0).to(tl.int32)


@triton.jit
def matrix(taps_ptr, index, size, first, COLUMNS: tl.constexpr):
    """Rows ``index`` (CHUNK,) and COLUMNS columns from ``first`` of P or Q; zero for no output."""
    exists = ((index >= 0) & (index < size))[:, None]
    taps_ptr += index[:, None] * 8
    column = (first + tl.arange(0, COLUMNS)).to(tl.float32)[None, :]
    found = tl.zeros((index.shape[0], COLUMNS), tl.float32)
    for tap in tl.static_range(4):
        pixel = tl.load(taps_ptr + tap, mask=exists, other=-1.0)
        weight = tl.load(taps_ptr + 4 + tap, mask=exists, other=0.0)
        found += tl.where(pixel == column, weight, 0.0)
    return found


@triton.jit
def block_of(
    map_ptr, taps_ptr, row, column, map_y, map_x, size_y, size_x, stride_y, stride_x,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """P map Q^T at row, column (CHUNK,), 0 outside the picture."""
    i = tl.arange(0, CHUNK)
    first_y, last_y = reach(taps_ptr, row, size_y)
    first_x, last_x = reach(taps_ptr + size_y * 8, column, size_x)
    total = tl.zeros((CHUNK, CHUNK), tl.float32)
    for x0 in range(first_x, last_x + 1, CHUNK):
        part = tl.zeros((CHUNK, CHUNK), tl.float32)
        for y0 in range(first_y, last_y + 1, CHUNK):
            values = load_tile(map_ptr, y0 + i, x0 + i, map_y, map_x, stride_y, stride_x)
            part = product(matrix(taps_ptr, row, size_y, y0, CHUNK), values, part)
        q = matrix(taps_ptr + size_y * 8, column, size_x, x0, CHUNK)
        total = product(part, tl.trans(q), total)
    return total


@triton.jit
def means(
    map_ptr, other_ptr, taps_ptr, other_taps_ptr, weights_ptr, row, column,
    map_y, map_x, other_y, other_x, size_y, size_x, length_y, length_x,
    stride_y, stride_x, other_stride_y, other_stride_x, OUT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """E u, E v, E (uu + vv), E uv of the windows whose first pixel is row, column and after."""
    o, i = tl.arange(0, OUT), tl.arange(0, CHUNK)
    mu = tl.zeros((OUT, OUT), tl.float32)
    nu, squares, products = mu, mu, mu
    for j0 in range(0, OUT + length_x - 1, CHUNK):
        one = tl.zeros((OUT, CHUNK), tl.float32)
        two, three, four = one, one, one
        for i0 in range(0, OUT + length_y - 1, CHUNK):
            y, x = row + i0 + i, column + j0 + i
            u = block_of(
                map_ptr, taps_ptr, y, x, map_y, map_x, size_y, size_x, stride_y, stride_x, CHUNK
            )
            v = block_of(
                other_ptr, other_taps_ptr, y, x, other_y, other_x, size_y, size_x,
                other_stride_y, other_stride_x, CHUNK,
            )  # fmt: skip
            down = band(weights_ptr, length_y, o[:, None], (i0 + i)[None, :], False)
            one, two, three, four = add_down(u, v, down, one, two, three, four)
        across = band(weights_ptr + length_y, length_x, o[None, :], (j0 + i)[:, None], False)
        mu, nu, squares, products = add_across(
            one, two, three, four, across, mu, nu, squares, products
        )
    return mu, nu, squares, products


@triton.jit
def warped_ssim_fwd_kernel(
    maps_ptr, others_ptr, taps_ptr, weights_ptr, sums_ptr,
    batch, map_y, map_x, other_y, other_x, size_y, size_x,
    rows, columns, length_y, length_x, pad_y, pad_x, c1, c2,
    stride_b, stride_y, stride_x, other_stride_b, other_stride_y, other_stride_x,
    OUT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The sum of S over a tile of windows."""
    tiles_x = tl.cdiv(columns, OUT)
    tiles = tl.cdiv(rows, OUT) * tiles_x
    b, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    row, column = tile // tiles_x * OUT, tile % tiles_x * OUT
    sample = (size_y + size_x) * 8  # of the taps
    mu, nu, squares, products = means(
        maps_ptr + b * stride_b, others_ptr + b * other_stride_b,
        taps_ptr + b * sample, taps_ptr + (b - b + batch) * sample, weights_ptr,
        row - pad_y, column - pad_x,
        map_y, map_x, other_y, other_x, size_y, size_x, length_y, length_x,
        stride_y, stride_x, other_stride_y, other_stride_x, OUT, CHUNK,
    )  # fmt: skip
    luminance, structure, _, _ = parts(mu, nu, squares, products, c1, c2)
    values = tl.where(existing(row, column, rows, columns, OUT), luminance * structure, 0.0)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(tl.sum(values, 1), 0))


@triton.jit
def store_sum(sums_ptr, slot, total, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """total (ROWS, COLUMNS) to slot of sums (., height, width)."""
    i, j = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    sums_ptr += (slot * height + i[:, None]) * width + j[None, :]
    tl.store(sums_ptr, total, mask=(i < height)[:, None] & (j < width)[None, :])


@triton.jit(do_not_specialize=["stride_grad"])
def warped_ssim_bwd_kernel(
    grad_ptr, maps_ptr, others_ptr, taps_ptr, weights_ptr, sums_ptr, other_sums_ptr,
    batch, splits, chunk, map_y, map_x, other_y, other_x, size_y, size_x,
    rows, columns, length_y, length_x, pad_y, pad_x, c1, c2, windows, stride_grad,
    stride_b, stride_y, stride_x, other_stride_b, other_stride_y, other_stride_x,
    MAP_Y: tl.constexpr, MAP_X: tl.constexpr, OTHER_Y: tl.constexpr, OTHER_X: tl.constexpr,
    WANT_MAPS: tl.constexpr, WANT_OTHERS: tl.constexpr, OUT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """What the windows of ``chunk`` tiles give to the cotangents of a sample's two maps."""
    tiles_x = tl.cdiv(columns, OUT)
    tiles = tl.cdiv(rows, OUT) * tiles_x
    b, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    grad = tl.div_rn(tl.load(grad_ptr + b * stride_grad).to(tl.float32), windows)
    maps_ptr += b * stride_b
    others_ptr += b * other_stride_b
    other_taps_ptr = taps_ptr + (b - b + batch) * (size_y + size_x) * 8
    taps_ptr += b * (size_y + size_x) * 8
    o, i = tl.arange(0, OUT), tl.arange(0, CHUNK)
    total = tl.zeros((MAP_Y, MAP_X), tl.float32)
    other_total = tl.zeros((OTHER_Y, OTHER_X), tl.float32)
    for tile in range(split * chunk, tl.minimum(split * chunk + chunk, tiles)):
        row, column = tile // tiles_x * OUT, tile % tiles_x * OUT
        exists = existing(row, column, rows, columns, OUT)
        row -= pad_y
        column -= pad_x
        mu, nu, squares, products = means(
            maps_ptr, others_ptr, taps_ptr, other_taps_ptr, weights_ptr, row, column,
            map_y, map_x, other_y, other_x, size_y, size_x, length_y, length_x,
            stride_y, stride_x, other_stride_y, other_stride_x, OUT, CHUNK,
        )  # fmt: skip
        luminance, structure, below_luminance, below_structure = parts(
            mu, nu, squares, products, c1, c2
        )
        to_squares, to_products, to_mu, to_nu = cotangents(
            mu, nu, luminance, structure, below_luminance, below_structure, grad, exists
        )
        for i0 in range(0, OUT + length_y - 1, CHUNK):
            up = band(weights_ptr, length_y, o[None, :], (i0 + i)[:, None], False)
            y = row + i0 + i
            for j0 in range(0, OUT + length_x - 1, CHUNK):
                back = band(weights_ptr + length_y, length_x, o[:, None], (j0 + i)[None, :], False)
                x = column + j0 + i
                u = block_of(
                    maps_ptr, taps_ptr, y, x, map_y, map_x, size_y, size_x, stride_y, stride_x,
                    CHUNK,
                )  # fmt: skip
                v = block_of(
                    others_ptr, other_taps_ptr, y, x, other_y, other_x, size_y, size_x,
                    other_stride_y, other_stride_x, CHUNK,
                )  # fmt: skip
                by_squares = filtered(to_squares, up, back)
                by_products = filtered(to_products, up, back)
                if WANT_MAPS:
                    to_u = filtered(to_mu, up, back) + 2 * u * by_squares + v * by_products
                    p = matrix(taps_ptr, y, size_y, 0, MAP_Y)
                    q = matrix(taps_ptr + size_y * 8, x, size_x, 0, MAP_X)
                    total += filtered(to_u, tl.trans(p), q)
                if WANT_OTHERS:
                    to_v = filtered(to_nu, up, back) + 2 * v * by_squares + u * by_products
                    p = matrix(other_taps_ptr, y, size_y, 0, OTHER_Y)
                    q = matrix(other_taps_ptr + size_y * 8, x, size_x, 0, OTHER_X)
                    other_total += filtered(to_v, tl.trans(p), q)
    slot = tl.program_id(0).to(tl.int64)
    if WANT_MAPS:
        store_sum(sums_ptr, slot, total, map_y, map_x, MAP_Y, MAP_X)
    if WANT_OTHERS:
        store_sum(other_sums_ptr, slot, other_total, other_y, other_x, OTHER_Y, OTHER_X)


@triton.jit
def warped_ssim_join_kernel(sums_ptr, out_ptr, splits, pixels, BLOCK: tl.constexpr):
    """Program (b, j): BLOCK pixels of sample b, from the sums of its programs."""
    b = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(sums_ptr + (b * splits + split) * pixels + p, mask=p < pixels, other=0.0)
    out_ptr += b * pixels + p
    tl.store(out_ptr, total.to(out_ptr.dtype.element_ty), mask=p < pixels)


def _blocks(maps: Tensor, others: Tensor, via: Size, size: Size) -> dict[str, int]:
    """Powers of two that hold the maps; what the kernels cannot take raises."""
    blocks = []
    for name, tensor, by in (("maps", maps, via), ("others", others, size)):
        sides = tensor.shape[1:]
        if max(sides) > LARGEST_MAP:
            raise ValueError(
                f"{name}: the Triton kernels take maps up to {LARGEST_MAP} x {LARGEST_MAP}, got "
                f"{sides[0]} x {sides[1]}; ck.warp followed by ck.ssim takes larger ones"
            )
        for side, through, end in zip(sides, by, size, strict=True):
            check_axis(side, through, end)
            blocks.append(max(16, host.power_of_two(side)))
    return dict(zip(("MAP_Y", "MAP_X", "OTHER_Y", "OTHER_X"), blocks, strict=True))


def _taps(
    maps: Tensor, others: Tensor, boxes: Tensor, flips: Tensor, via: Size, size: Size
) -> Tensor:
    """Rows of P and Q of every sample, and of the enlargement, (B + 1, H + W, 8) float32."""
    taps = torch.empty((len(maps) + 1, sum(size), 8), dtype=torch.float32, device=maps.device)
    host.launch(
        warped_ssim_taps_kernel, (len(taps), host.cdiv(sum(size), 128)), maps,
        boxes, flips.view(torch.uint8), taps, len(maps), *maps.shape[1:], *others.shape[1:],
        *via, *size, *boxes.stride(), flips.stride(0), BLOCK=128, num_warps=4,
    )  # fmt: skip
    return taps


def _join(sums: Tensor, maps: Tensor) -> Tensor:
    """Sums (B, splits, h, w) over the splits, in the dtype of the maps."""
    out = torch.empty(maps.shape, dtype=maps.dtype, device=maps.device)
    pixels = out.shape[1] * out.shape[2]
    block = min(max(32, host.power_of_two(pixels)), BLOCK)
    host.launch(
        warped_ssim_join_kernel, (len(out), host.cdiv(pixels, block)), maps,
        sums, out, sums.shape[1], pixels, BLOCK=block, num_warps=max(1, block // 256),
    )  # fmt: skip
    return out


def warped_ssim_fwd(
    maps: Tensor,
    others: Tensor,
    boxes: Tensor,
    flips: Tensor,
    via: Size,
    size: Size,
    rows: Sequence[float],
    columns: Sequence[float],
    c1: float,
    c2: float,
    same: bool,
) -> Tensor:
    """(B,) float32, from maps (B, h, w) and others (B, h', w')."""
    _blocks(maps, others, via, size)
    if len(maps) == 0:
        return torch.empty(0, dtype=torch.float32, device=maps.device)
    windows, arguments = window_arguments(size, rows, columns, same)
    tiles = host.cdiv(windows[0], TILE["OUT"]) * host.cdiv(windows[1], TILE["OUT"])
    sums = torch.empty((len(maps), tiles), dtype=torch.float32, device=maps.device)
    host.launch(
        warped_ssim_fwd_kernel, (sums.numel(),), maps,
        maps, others, _taps(maps, others, boxes, flips, via, size),
        weights_on(rows, columns, maps.device), sums, len(maps), *maps.shape[1:],
        *others.shape[1:], *size, *windows, *arguments, c1, c2, *maps.stride(), *others.stride(),
        **TILE,
    )  # fmt: skip
    return join(sums, windows[0] * windows[1])


def warped_ssim_bwd(
    grad: Tensor,
    maps: Tensor,
    others: Tensor,
    boxes: Tensor,
    flips: Tensor,
    via: Size,
    size: Size,
    rows: Sequence[float],
    columns: Sequence[float],
    c1: float,
    c2: float,
    same: bool,
    want_maps: bool,
    want_others: bool,
) -> tuple[Tensor, Tensor]:
    """Cotangents of maps and others (empty where not wanted), contiguous in their dtypes."""
    blocks = _blocks(maps, others, via, size)
    # The sums of larger maps take more registers; so does what is compiled for a side of one pixel.
    sides = (*maps.shape[1:], *others.shape[1:])
    tile = TILE if min(sides) > 1 and max(sides) <= 16 else {**TILE, "maxnreg": 255}
    wanted, both = (want_maps, want_others), (maps, others)
    if len(maps) == 0 or not any(wanted):
        to_maps, to_others = (
            torch.empty(t.shape if w else (0,), dtype=t.dtype, device=t.device)
            for t, w in zip(both, wanted, strict=True)
        )
        return to_maps, to_others
    windows, arguments = window_arguments(size, rows, columns, same)
    tiles = host.cdiv(windows[0], TILE["OUT"]) * host.cdiv(windows[1], TILE["OUT"])
    chunk = host.channel_chunk(len(maps), tiles, 1, maps.device)
    splits = host.cdiv(tiles, chunk)
    sums = [
        torch.empty(
            (len(t), splits, *t.shape[1:]) if w else (0,), dtype=torch.float32, device=t.device
        )
        for t, w in zip(both, wanted, strict=True)
    ]
    host.launch(
        warped_ssim_bwd_kernel, (len(maps) * splits,), maps,
        grad, maps, others, _taps(maps, others, boxes, flips, via, size),
        weights_on(rows, columns, maps.device), *sums, len(maps), splits, chunk,
        *maps.shape[1:], *others.shape[1:], *size, *windows, *arguments, c1, c2,
        float(windows[0] * windows[1]), grad.stride(0), *maps.stride(), *others.stride(), **blocks,
        WANT_MAPS=want_maps, WANT_OTHERS=want_others, **tile,
    )  # fmt: skip
    to_maps, to_others = (
        _join(s, t) if w else torch.empty(0, dtype=t.dtype, device=t.device)
        for s, t, w in zip(sums, both, wanted, strict=True)
    )
    return to_maps, to_others
