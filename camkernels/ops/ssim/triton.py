"""ssim in Triton: two launches each. Formulas: reference.py.

A program has OUT x OUT windows of one plane. A filter is two products with banded Toeplitz
matrices, (OUT, pixels) values (pixels, OUT), over blocks of CHUNK x CHUNK pixels. Forward: sums of
S per program, which are joined in a fixed order. Backward: the cotangents of the windows' means
(float32 scratch, three or four numbers a window), then the adjoint filter over these, so that
nothing is filtered twice and every pixel is written once.
"""
# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from camkernels.ops import _triton_launch as host
from camkernels.ops.ssim.arguments import weights_on, window_arguments

# Variances are differences of means of squares: tf32 would leave nothing of them.
PRECISION = tl.constexpr("ieee")
# A product outside the tensor cores holds whole rows and columns in registers: longer ones spill,
# and loads ahead of their turn (stages) take what is left. The limit is said since ptxas by itself
# spills a few to get down to 80.
TILE = {"OUT": 16, "CHUNK": 16, "num_warps": 8, "num_stages": 1, "maxnreg": host.MAX_REGISTERS}


@triton.jit
def product(one, other, total):
    return tl.dot(one, other, total, input_precision=PRECISION)


@triton.jit
def filtered(values, down, across):
    zeros = tl.zeros((down.shape[0], values.shape[1]), tl.float32)
    total = tl.zeros((down.shape[0], across.shape[1]), tl.float32)
    return product(product(down, values, zeros), across, total)


@triton.jit
def band(weights_ptr, length, row, column, FLIPPED: tl.constexpr):
    """Toeplitz: the window's weight number column - row, from behind where FLIPPED."""
    number = column - row
    inside = (number >= 0) & (number < length)
    if FLIPPED:
        number = length - 1 - number
    return tl.load(weights_ptr + number, mask=inside, other=0.0)


@triton.jit
def add_down(x, y, down, mu, nu, squares, products):
    """Add a block of pixels (CHUNK, CHUNK) to the sums of its columns (OUT, CHUNK).

    Only the sum of the variances is needed: four filters, not five.
    """
    return (
        product(down, x, mu), product(down, y, nu),
        product(down, x * x + y * y, squares), product(down, x * y, products),
    )  # fmt: skip


@triton.jit
def add_across(one, two, three, four, across, mu, nu, squares, products):
    """Add the sums of columns to those of the windows (OUT, OUT)."""
    return (
        product(one, across, mu), product(two, across, nu),
        product(three, across, squares), product(four, across, products),
    )  # fmt: skip


@triton.jit
def load_tile(plane_ptr, row, column, height, width, stride_y, stride_x):
    """Values in float32, 0 outside the plane."""
    inside = ((row >= 0) & (row < height))[:, None] & ((column >= 0) & (column < width))[None, :]
    plane_ptr += row.to(tl.int64)[:, None] * stride_y + column.to(tl.int64)[None, :] * stride_x
    return tl.load(plane_ptr, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def means(
    x_ptr, y_ptr, weights_ptr, top, left, height, width, length_y, length_x,
    x_stride_y, x_stride_x, y_stride_y, y_stride_x, OUT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """E x, E y, E (xx + yy), E xy of the windows from top, left."""
    o, i = tl.arange(0, OUT), tl.arange(0, CHUNK)
    mu = tl.zeros((OUT, OUT), tl.float32)
    nu, squares, products = mu, mu, mu
    for j0 in range(0, OUT + length_x - 1, CHUNK):
        one = tl.zeros((OUT, CHUNK), tl.float32)
        two, three, four = one, one, one
        for i0 in range(0, OUT + length_y - 1, CHUNK):
            row, column = top + i0 + i, left + j0 + i
            x = load_tile(x_ptr, row, column, height, width, x_stride_y, x_stride_x)
            y = load_tile(y_ptr, row, column, height, width, y_stride_y, y_stride_x)
            down = band(weights_ptr, length_y, o[:, None], (i0 + i)[None, :], False)
            one, two, three, four = add_down(x, y, down, one, two, three, four)
        across = band(weights_ptr + length_y, length_x, o[None, :], (j0 + i)[:, None], False)
        mu, nu, squares, products = add_across(
            one, two, three, four, across, mu, nu, squares, products
        )
    return mu, nu, squares, products


@triton.jit
def adjoint(
    map_ptr, weights_ptr, top, left, rows, columns, length_y, length_x,
    OUT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The flipped filter over a map (rows, columns), for pixels whose first window is top, left."""
    o, i = tl.arange(0, OUT), tl.arange(0, CHUNK)
    total = tl.zeros((OUT, OUT), tl.float32)
    for j0 in range(0, OUT + length_x - 1, CHUNK):
        part = tl.zeros((OUT, CHUNK), tl.float32)
        for i0 in range(0, OUT + length_y - 1, CHUNK):
            values = load_tile(map_ptr, top + i0 + i, left + j0 + i, rows, columns, columns, 1)
            down = band(weights_ptr, length_y, o[:, None], (i0 + i)[None, :], True)
            part = product(down, values, part)
        across = band(weights_ptr + length_y, length_x, o[None, :], (j0 + i)[:, None], True)
        total = product(part, across, total)
    return total


@triton.jit
def parts(mu, nu, squares, products, c1, c2):
    """The two factors of S, and what these were divided by."""
    below_luminance = mu * mu + nu * nu + c1
    below_structure = squares - mu * mu - nu * nu + c2
    luminance = tl.div_rn(2 * mu * nu + c1, below_luminance)
    structure = tl.div_rn(2 * (products - mu * nu) + c2, below_structure)
    return luminance, structure, below_luminance, below_structure


@triton.jit
def cotangents(mu, nu, luminance, structure, below_luminance, below_structure, grad, exists):
    """Of E xx (and E yy), E xy, mu and nu, where ``grad`` is that of every S."""
    per_luminance = tl.div_rn(2 * grad * structure, below_luminance)
    per_structure = tl.div_rn(2 * grad * luminance, below_structure)
    to_squares = -0.5 * per_structure * structure
    to_mu = per_luminance * (nu - luminance * mu) + per_structure * (structure * mu - nu)
    to_nu = per_luminance * (mu - luminance * nu) + per_structure * (structure * nu - mu)
    return (
        tl.where(exists, to_squares, 0.0), tl.where(exists, per_structure, 0.0),
        tl.where(exists, to_mu, 0.0), tl.where(exists, to_nu, 0.0),
    )  # fmt: skip


@triton.jit
def place(C, rows, columns, OUT: tl.constexpr):
    """Of this program: its plane, sample, channel, and its first row and column."""
    across = tl.cdiv(columns, OUT)
    tiles = tl.cdiv(rows, OUT) * across
    plane, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    b, channel = (plane // C).to(tl.int64), (plane % C).to(tl.int64)
    return plane.to(tl.int64), b, channel, tile // across * OUT, tile % across * OUT


@triton.jit
def existing(row, column, rows, columns, OUT: tl.constexpr):
    """Which of the OUT x OUT from row, column there are."""
    o = tl.arange(0, OUT)
    return (row + o < rows)[:, None] & (column + o < columns)[None, :]


@triton.jit
def ssim_fwd_kernel(
    x_ptr, y_ptr, weights_ptr, sums_ptr,
    C, height, width, rows, columns, length_y, length_x, pad_y, pad_x, c1, c2,
    x_stride_b, x_stride_c, x_stride_y, x_stride_x, y_stride_b, y_stride_c, y_stride_y, y_stride_x,
    OUT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The sum of S over a tile of windows."""
    _, b, channel, row, column = place(C, rows, columns, OUT)
    x_ptr += b * x_stride_b + channel * x_stride_c
    y_ptr += b * y_stride_b + channel * y_stride_c
    mu, nu, squares, products = means(
        x_ptr, y_ptr, weights_ptr, row - pad_y, column - pad_x, height, width, length_y, length_x,
        x_stride_y, x_stride_x, y_stride_y, y_stride_x, OUT, CHUNK,
    )  # fmt: skip
    luminance, structure, _, _ = parts(mu, nu, squares, products, c1, c2)
    exists = existing(row, column, rows, columns, OUT)
    values = tl.where(exists, luminance * structure, 0.0)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(tl.sum(values, 1), 0))


@triton.jit
def ssim_join_kernel(sums_ptr, values_ptr, n, windows, BLOCK: tl.constexpr):
    """Program (b,): the mean over all windows of sample b from its n sums."""
    b = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for k0 in range(0, n, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        total += tl.load(sums_ptr + b * n + k, mask=k < n, other=0.0)
    tl.store(values_ptr + b, tl.div_rn(tl.sum(total, 0), windows))


@triton.jit(do_not_specialize=["stride_grad"])
def ssim_bwd_windows_kernel(
    grad_ptr, x_ptr, y_ptr, weights_ptr, maps_ptr,
    C, height, width, rows, columns, length_y, length_x, pad_y, pad_x, c1, c2, windows,
    stride_grad, stride_map,
    x_stride_b, x_stride_c, x_stride_y, x_stride_x, y_stride_b, y_stride_c, y_stride_y, y_stride_x,
    WANT_X: tl.constexpr, WANT_Y: tl.constexpr, OUT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Maps of a tile's cotangents: of E xx, E xy, then of mu and of nu where wanted."""
    plane, b, channel, row, column = place(C, rows, columns, OUT)
    x_ptr += b * x_stride_b + channel * x_stride_c
    y_ptr += b * y_stride_b + channel * y_stride_c
    mu, nu, squares, products = means(
        x_ptr, y_ptr, weights_ptr, row - pad_y, column - pad_x, height, width, length_y, length_x,
        x_stride_y, x_stride_x, y_stride_y, y_stride_x, OUT, CHUNK,
    )  # fmt: skip
    luminance, structure, below_luminance, below_structure = parts(
        mu, nu, squares, products, c1, c2
    )
    grad = tl.div_rn(tl.load(grad_ptr + b * stride_grad).to(tl.float32), windows)
    exists = existing(row, column, rows, columns, OUT)
    to_squares, to_products, to_mu, to_nu = cotangents(
        mu, nu, luminance, structure, below_luminance, below_structure, grad, exists
    )
    o = tl.arange(0, OUT)
    maps_ptr += (plane * rows + (row + o)[:, None]) * columns + (column + o)[None, :]
    tl.store(maps_ptr, to_squares, mask=exists)
    tl.store(maps_ptr + stride_map, to_products, mask=exists)
    maps_ptr += 2 * stride_map
    if WANT_X:
        tl.store(maps_ptr, to_mu, mask=exists)
        maps_ptr += stride_map
    if WANT_Y:
        tl.store(maps_ptr, to_nu, mask=exists)


@triton.jit
def ssim_bwd_pixels_kernel(
    maps_ptr, x_ptr, y_ptr, weights_ptr, to_x_ptr, to_y_ptr,
    C, height, width, rows, columns, length_y, length_x, pad_y, pad_x, stride_map,
    x_stride_b, x_stride_c, x_stride_y, x_stride_x, y_stride_b, y_stride_c, y_stride_y, y_stride_x,
    WANT_X: tl.constexpr, WANT_Y: tl.constexpr, OUT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A tile of pixels: what the maps of cotangents that lie around it give."""
    plane, b, channel, row, column = place(C, height, width, OUT)
    top, left = row + pad_y - length_y + 1, column + pad_x - length_x + 1
    maps_ptr += plane * rows * columns
    to_squares = adjoint(
        maps_ptr, weights_ptr, top, left, rows, columns, length_y, length_x, OUT, CHUNK
    )
    to_products = adjoint(
        maps_ptr + stride_map, weights_ptr, top, left, rows, columns, length_y, length_x, OUT, CHUNK
    )
    maps_ptr += 2 * stride_map
    o = tl.arange(0, OUT)
    p, q = row + o, column + o
    x_ptr += b * x_stride_b + channel * x_stride_c
    y_ptr += b * y_stride_b + channel * y_stride_c
    x = load_tile(x_ptr, p, q, height, width, x_stride_y, x_stride_x)
    y = load_tile(y_ptr, p, q, height, width, y_stride_y, y_stride_x)
    exists = existing(row, column, height, width, OUT)
    out = (plane * height + p[:, None]) * width + q[None, :]
    if WANT_X:
        to_mu = adjoint(
            maps_ptr, weights_ptr, top, left, rows, columns, length_y, length_x, OUT, CHUNK
        )
        grad = to_mu + 2 * x * to_squares + y * to_products
        tl.store(to_x_ptr + out, grad.to(to_x_ptr.dtype.element_ty), mask=exists)
        maps_ptr += stride_map
    if WANT_Y:
        to_nu = adjoint(
            maps_ptr, weights_ptr, top, left, rows, columns, length_y, length_x, OUT, CHUNK
        )
        grad = to_nu + 2 * y * to_squares + x * to_products
        tl.store(to_y_ptr + out, grad.to(to_y_ptr.dtype.element_ty), mask=exists)


def join(sums: Tensor, windows: int) -> Tensor:
    """Means (B,) from sums (B, n)."""
    values = torch.empty(sums.shape[0], dtype=torch.float32, device=sums.device)
    block = min(max(16, host.power_of_two(sums.shape[1])), 1024)
    host.launch(
        ssim_join_kernel, (sums.shape[0],), sums,
        sums, values, sums.shape[1], float(windows), BLOCK=block, num_warps=max(1, block // 256),
    )  # fmt: skip
    return values


def ssim_fwd(
    x: Tensor,
    y: Tensor,
    rows: Sequence[float],
    columns: Sequence[float],
    c1: float,
    c2: float,
    same: bool,
) -> Tensor:
    """(B,) float32."""
    batch, channels, *size = x.shape
    host.check_pixels(x, "x")
    if batch == 0:
        return torch.empty(0, dtype=torch.float32, device=x.device)
    windows, arguments = window_arguments(size, rows, columns, same)
    tiles = host.cdiv(windows[0], TILE["OUT"]) * host.cdiv(windows[1], TILE["OUT"])
    sums = torch.empty((batch, channels * tiles), dtype=torch.float32, device=x.device)
    host.launch(
        ssim_fwd_kernel, (sums.numel(),), x,
        x, y, weights_on(rows, columns, x.device), sums,
        channels, *size, *windows, *arguments, c1, c2, *x.stride(), *y.stride(), **TILE,
    )  # fmt: skip
    return join(sums, channels * windows[0] * windows[1])


def ssim_bwd(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    rows: Sequence[float],
    columns: Sequence[float],
    c1: float,
    c2: float,
    same: bool,
    want_x: bool,
    want_y: bool,
) -> tuple[Tensor, Tensor]:
    """Cotangents of x and y (empty where not wanted), contiguous in their dtypes."""
    batch, channels, *size = x.shape
    none = (0,)
    host.check_pixels(x, "x")
    to_x = torch.empty(x.shape if want_x else none, dtype=x.dtype, device=x.device)
    to_y = torch.empty(y.shape if want_y else none, dtype=y.dtype, device=y.device)
    if batch == 0 or not (want_x or want_y):
        return to_x, to_y
    windows, arguments = window_arguments(size, rows, columns, same)
    maps = torch.empty(
        (2 + want_x + want_y, batch * channels, *windows), dtype=torch.float32, device=x.device
    )
    weights = weights_on(rows, columns, x.device)
    sizes = (channels, *size, *windows, *arguments)
    strides, want = (*x.stride(), *y.stride()), {"WANT_X": want_x, "WANT_Y": want_y}
    for out, kernel in ((windows, ssim_bwd_windows_kernel), (size, ssim_bwd_pixels_kernel)):
        tiles = host.cdiv(out[0], TILE["OUT"]) * host.cdiv(out[1], TILE["OUT"])
        grid = (batch * channels * tiles,)
        if kernel is ssim_bwd_windows_kernel:
            host.launch(
                kernel, grid, x, grad, x, y, weights, maps, *sizes, c1, c2,
                float(channels * windows[0] * windows[1]), grad.stride(0), maps.stride(0),
                *strides, **want, **TILE,
            )  # fmt: skip
        else:
            host.launch(
                kernel, grid, x, maps, x, y, weights, to_x, to_y, *sizes, maps.stride(0),
                *strides, **want, **TILE,
            )  # fmt: skip
    return to_x, to_y
