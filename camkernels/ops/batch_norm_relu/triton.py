"""BatchNorm, residual add and ReLU in Triton: one launch each. Formulas: reference.py.

Elementwise kernels make one pass over tiles of memory. Sums per channel are split over programs;
the last one to arrive adds the partial sums in a fixed order, so equal inputs give equal bits.
"""
# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from camkernels.ops import _triton_launch as host
from camkernels.ops._triton_batch_norm import (
    BACKWARD_TILE,
    FORWARD_TILE,
    before_relu,
    bytes_from,
    bytes_of_mask,
    channels_of,
    elementwise,
    finite_or_zero,
    masked,
    moments,
    moments_of_partials,
    place,
    reduction,
    rows_of,
    scale_of,
    store_partial,
    sum_of_partials,
    sum_of_tile,
    tile_of_channels,
    tile_offsets,
    values_of,
)
from camkernels.ops._triton_cam import arrived_last


@triton.jit
def bn_stats_kernel(
    z_ptr, mean_ptr, squares_ptr, scratch_ptr, counters_ptr, N, L, C, tiles, chunk,
    SPLIT: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Program (k, split): mean and squared deviations of channel block k from a chunk of tiles.

    Sums are taken of what is left after the mean of the first tile is subtracted. Where that is
    one of m tiles it lies at most sqrt(m) standard deviations off: a large mean does not cancel.
    """
    k, split = tl.program_id(0), tl.program_id(1)
    L = L * ALIGN
    c = k * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = split * chunk
    end = tl.minimum(begin + chunk, tiles)
    rows, row_exists, l0, count = tile_of_channels(
        begin, k, N, L, C, CHANNELS_LAST, BLOCK_R, BLOCK_L
    )
    offsets, inside = tile_offsets(rows, row_exists, l0, L, BLOCK_L)
    z = values_of(z_ptr, offsets, inside)
    origin = finite_or_zero(sum_of_tile(z, CHANNELS_LAST) / count)
    firsts = tl.where(inside, z - origin[None, :], 0.0)
    seconds = firsts * firsts
    for t in range(begin + 1, end):
        rows, row_exists, l0, more = tile_of_channels(
            t, k, N, L, C, CHANNELS_LAST, BLOCK_R, BLOCK_L
        )
        offsets, inside = tile_offsets(rows, row_exists, l0, L, BLOCK_L)
        shift = tl.where(inside, values_of(z_ptr, offsets, inside) - origin[None, :], 0.0)
        firsts += shift
        seconds += shift * shift
        count += more
    shift, squares = moments(
        sum_of_tile(firsts, CHANNELS_LAST), sum_of_tile(seconds, CHANNELS_LAST), count
    )
    if SPLIT:
        n_splits = tl.num_programs(1)
        store_partial(scratch_ptr, 0, split, n_splits, C, c, origin)
        store_partial(scratch_ptr, 1, split, n_splits, C, c, shift)
        store_partial(scratch_ptr, 2, split, n_splits, C, c, squares)
        store_partial(scratch_ptr, 3, split, n_splits, C, c, count + tl.zeros_like(shift))
        if arrived_last(counters_ptr + k, n_splits):
            mean, squares = moments_of_partials(scratch_ptr, n_splits, C, c, BLOCK_C, BLOCK_S)
            tl.store(mean_ptr + c, mean, mask=c < C)
            tl.store(squares_ptr + c, squares, mask=c < C)
            tl.store(counters_ptr + k, 0)  # for the next launch
    else:
        tl.store(mean_ptr + c, origin + shift, mask=c < C)
        tl.store(squares_ptr + c, squares, mask=c < C)


@triton.jit
def bn_sums_kernel(
    grad_ptr, other_ptr, z_ptr, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, mask_ptr,
    sums_ptr, scratch_ptr, counters_ptr, N, L, C, tiles, chunk,
    RELU: tl.constexpr, GUIDED: tl.constexpr,
    SPLIT: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Program (k, split): sums of g, of g zhat and, where there is another tensor, of g times it.

    g is ``grad``, masked where there is a ReLU.
    """
    k, split = tl.program_id(0), tl.program_id(1)
    L = L * ALIGN
    c = k * BLOCK_C + tl.arange(0, BLOCK_C)
    of_tile, exists = c[None, :], c[None, :] < C
    mean, rstd = values_of(mean_ptr, of_tile, exists), values_of(rstd_ptr, of_tile, exists)
    scale = scale_of(rstd, gamma_ptr, of_tile, exists)
    plain = tl.zeros((BLOCK_R, BLOCK_L), tl.float32)
    by_deviation = tl.zeros((BLOCK_R, BLOCK_L), tl.float32)
    by_other = tl.zeros((BLOCK_R, BLOCK_L), tl.float32)
    begin = split * chunk
    for t in range(begin, tl.minimum(begin + chunk, tiles)):
        rows, row_exists, l0, _ = tile_of_channels(t, k, N, L, C, CHANNELS_LAST, BLOCK_R, BLOCK_L)
        offsets, inside = tile_offsets(rows, row_exists, l0, L, BLOCK_L)
        grad = values_of(grad_ptr, offsets, inside)
        deviation = values_of(z_ptr, offsets, inside) - mean
        grad = masked(
            grad, deviation, scale, beta_ptr, of_tile, exists, mask_ptr, rows, row_exists, l0, L,
            RELU, GUIDED, BLOCK_R, BLOCK_L,
        )  # fmt: skip
        plain += grad
        by_deviation += grad * deviation
        if other_ptr is not None:
            by_other += grad * values_of(other_ptr, offsets, inside)
    rstd = tl.sum(rstd, 0)  # (BLOCK_C,)
    first = sum_of_tile(plain, CHANNELS_LAST)
    second = sum_of_tile(by_deviation, CHANNELS_LAST) * rstd
    third = sum_of_tile(by_other, CHANNELS_LAST)
    if SPLIT:
        n_splits = tl.num_programs(1)
        store_partial(scratch_ptr, 0, split, n_splits, C, c, first)
        store_partial(scratch_ptr, 1, split, n_splits, C, c, second)
        if other_ptr is not None:
            store_partial(scratch_ptr, 2, split, n_splits, C, c, third)
        if arrived_last(counters_ptr + k, n_splits):
            first = sum_of_partials(scratch_ptr, 0, n_splits, C, c, BLOCK_C, BLOCK_S)
            second = sum_of_partials(scratch_ptr, 1, n_splits, C, c, BLOCK_C, BLOCK_S)
            tl.store(sums_ptr + c, first, mask=c < C)
            tl.store(sums_ptr + C + c, second, mask=c < C)
            if other_ptr is not None:
                third = sum_of_partials(scratch_ptr, 2, n_splits, C, c, BLOCK_C, BLOCK_S)
                tl.store(sums_ptr + 2 * C + c, third, mask=c < C)
            tl.store(counters_ptr + k, 0)  # for the next launch
    else:
        tl.store(sums_ptr + c, first, mask=c < C)
        tl.store(sums_ptr + C + c, second, mask=c < C)
        if other_ptr is not None:
            tl.store(sums_ptr + 2 * C + c, third, mask=c < C)


@triton.jit
def bn_fwd_kernel(
    z_ptr, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, residual_ptr, out_ptr, mask_ptr, R, L, C,
    RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """One tile of a, and of the mask."""
    L = L * ALIGN
    r0, l0 = place(L, BLOCK_R, BLOCK_L)
    c, exists = channels_of(r0, l0, C, CHANNELS_LAST, BLOCK_R, BLOCK_L)
    rows = r0 + tl.arange(0, BLOCK_R)
    offsets, inside = tile_offsets(rows, rows < R, l0, L, BLOCK_L)
    deviation = values_of(z_ptr, offsets, inside) - values_of(mean_ptr, c, exists)
    scale = scale_of(values_of(rstd_ptr, c, exists), gamma_ptr, c, exists)
    u = before_relu(deviation, scale, beta_ptr, c, exists)
    if residual_ptr is not None:
        u += values_of(residual_ptr, offsets, inside)
    closed = u <= 0  # false for NaN, which stays
    a = u
    if RELU:
        a = tl.where(closed, 0.0, u)
    tl.store(out_ptr + offsets, a.to(out_ptr.dtype.element_ty), mask=inside)
    if mask_ptr is not None:
        mask_bytes = bytes_from(inside & (closed == 0), BLOCK_R, BLOCK_L)
        offsets, inside = bytes_of_mask(rows, rows < R, l0, L, BLOCK_L)
        tl.store(mask_ptr + offsets, mask_bytes, mask=inside)


@triton.jit
def bn_bwd_kernel(
    grad_ptr, z_ptr, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, mask_ptr, sums_ptr, addend_ptr,
    grad_z_ptr, grad_residual_ptr, R, L, C, inv_count,
    RELU: tl.constexpr, GUIDED: tl.constexpr, SCALED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """One tile of the cotangents of z and of the residual."""
    L = L * ALIGN
    r0, l0 = place(L, BLOCK_R, BLOCK_L)
    c, exists = channels_of(r0, l0, C, CHANNELS_LAST, BLOCK_R, BLOCK_L)
    rows = r0 + tl.arange(0, BLOCK_R)
    offsets, inside = tile_offsets(rows, rows < R, l0, L, BLOCK_L)
    rstd = values_of(rstd_ptr, c, exists)
    scale = scale_of(rstd, gamma_ptr, c, exists)
    mean_grad = values_of(sums_ptr, c, exists) * inv_count
    slope = values_of(sums_ptr + C, c, exists) * inv_count
    deviation = values_of(z_ptr, offsets, inside) - values_of(mean_ptr, c, exists)
    grad_u = masked(
        values_of(grad_ptr, offsets, inside), deviation, scale, beta_ptr, c, exists,
        mask_ptr, rows, rows < R, l0, L, RELU, GUIDED, BLOCK_R, BLOCK_L,
    )  # fmt: skip
    grad_z = grad_u - (mean_grad + deviation * rstd * slope)
    if SCALED:
        grad_z *= scale
    if addend_ptr is not None:
        grad_z += values_of(addend_ptr, offsets, inside)
    tl.store(grad_z_ptr + offsets, grad_z.to(grad_z_ptr.dtype.element_ty), mask=inside)
    if grad_residual_ptr is not None:
        grad_u = grad_u.to(grad_residual_ptr.dtype.element_ty)
        tl.store(grad_residual_ptr + offsets, grad_u, mask=inside)


@triton.jit
def bn_bwd_bwd_kernel(
    grad_grad_ptr, grad_grad_residual_ptr, grad_prime_ptr, z_ptr, mean_ptr, rstd_ptr, gamma_ptr,
    beta_ptr, mask_ptr, sums_ptr, grad_sums_ptr, c_gamma_ptr, c_beta_ptr, to_grad_ptr, to_z_ptr,
    R, L, C, inv_count,
    RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """One tile of the cotangents of g and of z; to_grad may be grad_grad, to_z grad_prime."""
    L = L * ALIGN
    r0, l0 = place(L, BLOCK_R, BLOCK_L)
    c, exists = channels_of(r0, l0, C, CHANNELS_LAST, BLOCK_R, BLOCK_L)
    rows = r0 + tl.arange(0, BLOCK_R)
    offsets, inside = tile_offsets(rows, rows < R, l0, L, BLOCK_L)
    rstd = values_of(rstd_ptr, c, exists)
    scale = scale_of(rstd, gamma_ptr, c, exists)
    sum_h_zhat = values_of(grad_sums_ptr + C, c, exists)
    mean_h = values_of(grad_sums_ptr, c, exists) * inv_count
    slope = sum_h_zhat * inv_count
    # to_z = by_h h' + by_grad g' + by_zhat zhat
    common = -scale * rstd * inv_count
    by_h = common * values_of(sums_ptr + C, c, exists)
    by_grad = common * sum_h_zhat
    by_zhat = common * values_of(grad_sums_ptr + 2 * C, c, exists)

    deviation = values_of(z_ptr, offsets, inside) - values_of(mean_ptr, c, exists)
    zhat = deviation * rstd
    h = values_of(grad_grad_ptr, offsets, inside) - (mean_h + zhat * slope)
    to_grad = h * scale
    if grad_grad_residual_ptr is not None:
        to_grad += values_of(grad_grad_residual_ptr, offsets, inside)
    if c_gamma_ptr is not None:
        c_gamma = values_of(c_gamma_ptr, c, exists)
        to_grad += zhat * c_gamma
        by_grad += rstd * c_gamma
    if c_beta_ptr is not None:
        to_grad += values_of(c_beta_ptr, c, exists)
    to_grad = masked(
        to_grad, deviation, scale, beta_ptr, c, exists, mask_ptr, rows, rows < R, l0, L,
        RELU, False, BLOCK_R, BLOCK_L,
    )  # fmt: skip
    to_z = by_h * h + by_grad * values_of(grad_prime_ptr, offsets, inside) + by_zhat * zhat
    tl.store(to_grad_ptr + offsets, to_grad.to(to_grad_ptr.dtype.element_ty), mask=inside)
    tl.store(to_z_ptr + offsets, to_z.to(to_z_ptr.dtype.element_ty), mask=inside)


def used_mask(mask: Tensor | None, relu: bool) -> Tensor | None:
    return mask if relu and mask is not None and mask.numel() else None


def bn_stats(z: Tensor) -> tuple[Tensor, Tensor]:
    """mean (C,), and the sum of squared deviations from it (C,)."""
    mean, squares = (z.new_empty(z.shape[1], dtype=torch.float32) for _ in range(2))
    if z.numel() == 0:
        return mean.zero_(), squares.zero_()
    reduction(bn_stats_kernel, z, None, 4, z, mean, squares)
    return mean, squares


def bn_fwd(
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    want_mask: bool,
) -> tuple[Tensor, Tensor]:
    """a, in dtype and layout of z; and the mask (an empty uint8 tensor unless wanted)."""
    out = torch.empty_like(z)
    mask = z.new_empty(0, dtype=torch.uint8)
    if want_mask:
        rows = rows_of(z, True)
        mask = z.new_empty((rows.number, host.cdiv(rows.length, 8)), dtype=torch.uint8)
    if z.numel():
        wanted = mask if want_mask else None
        elementwise(
            bn_fwd_kernel, z, wanted, FORWARD_TILE,
            z, mean, rstd, gamma, beta, residual, out, wanted, RELU=relu,
        )  # fmt: skip
    return out, mask


def bn_bwd_reduce(
    grad: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mask: Tensor | None,
    relu: bool,
    guided: bool,
) -> Tensor:
    """(2, C): S_g and S_gz."""
    sums, mask = z.new_empty((2, z.shape[1]), dtype=torch.float32), used_mask(mask, relu)
    if z.numel() == 0:
        return sums.zero_()
    reduction(
        bn_sums_kernel, z, mask, 2, grad, None, z, mean, rstd, gamma, beta, mask, sums,
        RELU=relu, GUIDED=guided and relu,
    )  # fmt: skip
    return sums


def bn_bwd(
    grad: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mask: Tensor | None,
    sums: Tensor,
    inv_count: float,
    relu: bool,
    guided: bool,
    scaled: bool,
    addend: Tensor | None,
    want_residual: bool,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """g', or gamma rstd g' plus ``addend``; and g_u, the cotangent of the residual (empty unless
    wanted). In dtype and layout of z; with ``inplace`` one of them, the latter where it is wanted,
    is written over grad."""
    mask = used_mask(mask, relu)
    grad_z = grad if inplace and not want_residual else torch.empty_like(z)
    residual = grad if inplace and want_residual else torch.empty_like(z) if want_residual else None
    if z.numel():
        elementwise(
            bn_bwd_kernel, z, mask, BACKWARD_TILE,
            grad, z, mean, rstd, gamma, beta, mask, sums, addend, grad_z,
            residual, float(inv_count),
            RELU=relu, GUIDED=guided and relu, SCALED=scaled,
        )  # fmt: skip
    return grad_z, z.new_empty(0) if residual is None else residual


def bn_bwd_bwd_reduce(
    grad_grad: Tensor, grad_prime: Tensor, z: Tensor, mean: Tensor, rstd: Tensor
) -> Tensor:
    """(3, C): S_h, S_hz, Q of h = grad_grad and g' = grad_prime."""
    sums = z.new_empty((3, z.shape[1]), dtype=torch.float32)
    if z.numel() == 0:
        return sums.zero_()
    reduction(
        bn_sums_kernel, z, None, 3, grad_grad, grad_prime, z, mean, rstd, None, None, None, sums,
        RELU=False, GUIDED=False,
    )  # fmt: skip
    return sums


def bn_bwd_bwd(
    grad_grad: Tensor,
    grad_grad_residual: Tensor | None,
    grad_prime: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mask: Tensor | None,
    sums: Tensor,
    grad_sums: Tensor,
    inv_count: float,
    c_gamma: Tensor | None,
    c_beta: Tensor | None,
    relu: bool,
    inplace: bool,
    reuse_prime: bool = False,
) -> tuple[Tensor, Tensor]:
    """Cotangents of g (in the memory of ``grad_grad`` with ``inplace``) and of z (in that of
    ``grad_prime`` with ``reuse_prime``)."""
    to_grad = grad_grad if inplace else torch.empty_like(z)
    to_z = grad_prime if reuse_prime else torch.empty_like(z)
    mask = used_mask(mask, relu)
    if z.numel():
        elementwise(
            bn_bwd_bwd_kernel, z, mask, BACKWARD_TILE,
            grad_grad, grad_grad_residual, grad_prime, z, mean, rstd, gamma, beta, mask,
            sums, grad_sums, c_gamma, c_beta, to_grad, to_z, float(inv_count), RELU=relu,
        )  # fmt: skip
    return to_grad, to_z
