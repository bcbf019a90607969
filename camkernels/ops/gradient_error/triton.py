"""gradient_error in Triton: two launches forward, three where a norm or a mean is divided by or
subtracted first; one backward. Formulas: reference.py.

Programs sum blocks of a sample into float32 partial sums, which are joined in a fixed order.
"""
# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from camkernels.ops import _triton_launch as host
from camkernels.ops.gradient_error import flat
from camkernels.ops.gradient_error.reference import ERRORS, STATISTICS

SIGMOID, CENTERED, COSINE, HISTOGRAM, PAPER = (tl.constexpr(i) for i in range(len(ERRORS)))
TINY = tl.constexpr(2.0**-126)
FIRST, LAST = tl.constexpr(2), tl.constexpr(5)  # partial sums of a block in either pass


@triton.jit
def load_pair(delta_ptr, guided_ptr, b, p, n, stride_delta, stride_guided):
    """Entries p (BLOCK,) of both sides in float32, 0 behind the last one."""
    d = tl.load(delta_ptr + b * stride_delta + p, mask=p < n, other=0.0).to(tl.float32)
    g = tl.load(guided_ptr + b * stride_guided + p, mask=p < n, other=0.0).to(tl.float32)
    return d, g


@triton.jit
def sigmoid(x):
    """sigma(x) and sigma'(x); neither cancels at either end, and infinity shows."""
    t = tl.exp(-tl.abs(x))
    inverse = 1 / (1 + t)
    return tl.where(x < 0, t, 1.0) * inverse + (x - x), t * inverse * inverse


@triton.jit
def largest(x):
    """Largest magnitude; a maximum may pass over NaN, infinity turns all into NaN later."""
    return tl.max(tl.where(x != x, float("inf"), tl.abs(x)), 0)


@triton.jit
def first_sums(first_ptr, b, J, BLOCK_J: tl.constexpr):
    """The two sums of the first pass over sample b."""
    one, other = tl.zeros((BLOCK_J,), tl.float32), tl.zeros((BLOCK_J,), tl.float32)
    for j0 in range(0, J, BLOCK_J):
        j = j0 + tl.arange(0, BLOCK_J)
        at = first_ptr + (b * J + j) * FIRST
        one += tl.load(at, mask=j < J, other=0.0)
        other += tl.load(at + 1, mask=j < J, other=0.0)
    return tl.sum(one, 0), tl.sum(other, 0)


@triton.jit
def gradient_error_first_kernel(
    delta_ptr, guided_ptr, first_ptr, n, J, stride_delta, stride_guided,
    ERROR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (b, j): sum of d, or the 1-norms of d and g, over block j of sample b."""
    b, j = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p = j * BLOCK + tl.arange(0, BLOCK)
    d, g = load_pair(delta_ptr, guided_ptr, b, p, n, stride_delta, stride_guided)
    if ERROR != CENTERED:
        d, g = tl.abs(d), tl.abs(g)
    tl.store(first_ptr + (b * J + j) * FIRST, tl.sum(d, 0))
    tl.store(first_ptr + (b * J + j) * FIRST + 1, tl.sum(g, 0))


@triton.jit
def gradient_error_last_kernel(
    delta_ptr, guided_ptr, first_ptr, last_ptr, n, J, stride_delta, stride_guided,
    ERROR: tl.constexpr, BLOCK: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Program (b, j): the sums that the error is made of, over block j of sample b."""
    b, j = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p = j * BLOCK + tl.arange(0, BLOCK)
    zeros = tl.zeros((BLOCK,), tl.float32)
    d, g = load_pair(delta_ptr, guided_ptr, b, p, n, stride_delta, stride_guided)
    last_ptr += (b * J + j) * LAST
    if ERROR <= CENTERED:
        if ERROR == CENTERED:
            total, _ = first_sums(first_ptr, b, J, BLOCK_J)
            d -= tl.div_rn(total, tl.full((), 0.0, tl.float32) + n)
        value, slope = sigmoid(d)
        tl.store(last_ptr, tl.sum(g * value, 0))
        tl.store(last_ptr + 1, tl.sum(g * slope, 0))
    elif ERROR == COSINE:
        d_scale, g_scale = largest(d), largest(g)
        u = tl.div_rn(d, zeros + tl.where(d_scale == 0, 1.0, d_scale))
        w = tl.div_rn(g, zeros + tl.where(g_scale == 0, 1.0, g_scale))
        tl.store(last_ptr, d_scale)
        tl.store(last_ptr + 1, g_scale)
        tl.store(last_ptr + 2, tl.sum(u * u, 0))
        tl.store(last_ptr + 3, tl.sum(w * w, 0))
        tl.store(last_ptr + 4, tl.sum(u * w, 0))
    else:
        ours, theirs = tl.abs(d), tl.abs(g)
        if ERROR == HISTOGRAM:
            d_norm, g_norm = first_sums(first_ptr, b, J, BLOCK_J)
            ours = tl.div_rn(ours, zeros + tl.where(d_norm < TINY, 1.0, d_norm))
            theirs = tl.div_rn(theirs, zeros + tl.where(g_norm < TINY, 1.0, g_norm))
        tl.store(last_ptr, tl.sum(tl.where(ours <= theirs, ours, theirs), 0))
        tl.store(last_ptr + 1, tl.sum(tl.where(ours <= theirs, ours, 0.0), 0))


@triton.jit
def join_cosine(last_ptr, b, J, BLOCK_J: tl.constexpr):
    """Cosine and the two norms, from blocks that each have a scale of their own."""
    zeros = tl.zeros((BLOCK_J,), tl.float32)
    d_scale, g_scale = zeros, zeros
    for j0 in range(0, J, BLOCK_J):
        j = j0 + tl.arange(0, BLOCK_J)
        at = last_ptr + (b * J + j) * LAST
        d_scale = tl.maximum(d_scale, tl.load(at, mask=j < J, other=0.0))
        g_scale = tl.maximum(g_scale, tl.load(at + 1, mask=j < J, other=0.0))
    d_most, g_most = tl.max(d_scale, 0), tl.max(g_scale, 0)
    d_unit, g_unit = tl.where(d_most == 0, 1.0, d_most), tl.where(g_most == 0, 1.0, g_most)
    dd, gg, dg = zeros, zeros, zeros
    for j0 in range(0, J, BLOCK_J):
        j = j0 + tl.arange(0, BLOCK_J)
        at = last_ptr + (b * J + j) * LAST
        x = tl.div_rn(tl.load(at, mask=j < J, other=0.0), zeros + d_unit)
        y = tl.div_rn(tl.load(at + 1, mask=j < J, other=0.0), zeros + g_unit)
        dd += x * x * tl.load(at + 2, mask=j < J, other=0.0)
        gg += y * y * tl.load(at + 3, mask=j < J, other=0.0)
        dg += x * y * tl.load(at + 4, mask=j < J, other=0.0)
    d_root, g_root = tl.sqrt_rn(tl.sum(dd, 0)), tl.sqrt_rn(tl.sum(gg, 0))
    product = d_root * g_root
    cosine = tl.div_rn(tl.sum(dg, 0), tl.where(product == 0, 1.0, product))
    return cosine, d_most * d_root, g_most * g_root


@triton.jit
def gradient_error_join_kernel(
    first_ptr, last_ptr, errors_ptr, statistics_ptr, n, J,
    ERROR: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Program (b,): error and statistics of sample b from its partial sums."""
    b = tl.program_id(0).to(tl.int64)
    count = tl.full((), 0.0, tl.float32) + n
    one, two = tl.zeros((BLOCK_J,), tl.float32), tl.zeros((BLOCK_J,), tl.float32)
    for j0 in range(0, J, BLOCK_J):
        j = j0 + tl.arange(0, BLOCK_J)
        if ERROR != COSINE:
            one += tl.load(last_ptr + (b * J + j) * LAST, mask=j < J, other=0.0)
            two += tl.load(last_ptr + (b * J + j) * LAST + 1, mask=j < J, other=0.0)
    total, second = tl.sum(one, 0), tl.sum(two, 0)
    zero = count - count
    error, known, d_norm, g_norm = -total, zero, zero, zero
    if ERROR == CENTERED:
        mean, _ = first_sums(first_ptr, b, J, BLOCK_J)
        known, d_norm = tl.div_rn(mean, count), tl.div_rn(second, count)
    elif ERROR != SIGMOID:
        if ERROR == COSINE:
            known, d_norm, g_norm = join_cosine(last_ptr, b, J, BLOCK_J)
            error = -known
        else:
            d_norm, g_norm = first_sums(first_ptr, b, J, BLOCK_J)
            known = second
        dead = (d_norm < TINY) | (g_norm < TINY)
        if ERROR == PAPER:
            known = tl.div_rn(total, tl.where(dead, 1.0, d_norm))
            error = -tl.div_rn(known, tl.where(dead, 1.0, g_norm))
        visible = (d_norm + g_norm) - (d_norm + g_norm)  # a minimum passes over NaN
        error, known = tl.where(dead, 0.0, error + visible), tl.where(dead, 0.0, known + visible)
        d_norm, g_norm = tl.where(dead, 0.0, d_norm), tl.where(dead, 0.0, g_norm)
    tl.store(errors_ptr + b, error)
    tl.store(statistics_ptr + b * 3, known)
    tl.store(statistics_ptr + b * 3 + 1, d_norm)
    tl.store(statistics_ptr + b * 3 + 2, g_norm)


@triton.jit(do_not_specialize=["stride_errors"])
def gradient_error_bwd_kernel(
    grad_errors_ptr, delta_ptr, guided_ptr, statistics_ptr, grad_delta_ptr,
    n, stride_errors, stride_delta, stride_guided,
    ERROR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (b, j): the cotangent of BLOCK entries of sample b."""
    b = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    zeros = tl.zeros((BLOCK,), tl.float32)
    d, g = load_pair(delta_ptr, guided_ptr, b, p, n, stride_delta, stride_guided)
    e = -tl.load(grad_errors_ptr + b * stride_errors).to(tl.float32)
    known = tl.load(statistics_ptr + b * 3)
    d_norm, g_norm = tl.load(statistics_ptr + b * 3 + 1), tl.load(statistics_ptr + b * 3 + 2)
    if ERROR <= CENTERED:
        _, slope = sigmoid(d - known)
        grad = e * (g * slope - d_norm)
    else:
        dead = (d_norm == 0) | (g_norm == 0)
        d_unit, g_unit = zeros + tl.where(dead, 1.0, d_norm), zeros + tl.where(dead, 1.0, g_norm)
        if ERROR == COSINE:
            grad = tl.div_rn(e * (tl.div_rn(g, g_unit) - known * tl.div_rn(d, d_unit)), d_unit)
        else:
            ours, theirs = tl.abs(d), tl.abs(g)
            if ERROR == HISTOGRAM:
                ours, theirs = tl.div_rn(ours, d_unit), tl.div_rn(theirs, g_unit)
            sign = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))  # NaN stays
            grad = e * sign * (tl.where(ours <= theirs, 1.0, 0.0) - known)
            if ERROR == PAPER:
                grad = tl.div_rn(grad, g_unit)
            grad = tl.div_rn(grad, d_unit)
        grad = tl.where(dead, 0.0, grad)
    grad_delta_ptr += b * n + p
    tl.store(grad_delta_ptr, grad.to(grad_delta_ptr.dtype.element_ty), mask=p < n)


def _block(entries: int) -> int:
    return min(max(32, host.power_of_two(entries)), host.TILE // 2)


def _entries(delta: Tensor) -> int:
    entries = delta.shape[1:].numel()
    if entries > host.MAX_PIXELS:
        raise ValueError(
            f"gradients: the Triton kernels take up to 2^31 - 1 entries per sample, got {entries}"
        )
    return entries


def gradient_error_fwd(delta: Tensor, guided: Tensor, error: str) -> tuple[Tensor, Tensor]:
    batch, n = delta.shape[0], _entries(delta)
    errors = delta.new_empty(batch, dtype=torch.float32)
    statistics = delta.new_empty((batch, STATISTICS), dtype=torch.float32)
    if batch == 0:
        return errors, statistics
    delta, guided = flat.in_one_order(delta, guided)
    block = _block(n)
    blocks = host.cdiv(n, block)
    first = delta.new_empty((batch, blocks, FIRST.value), dtype=torch.float32)
    last = delta.new_empty((batch, blocks, LAST.value), dtype=torch.float32)
    kind = ERRORS.index(error)
    block_j = min(max(16, host.power_of_two(blocks)), 1024)
    sizes = (n, blocks, delta.stride(0), guided.stride(0))
    if error not in ("sigmoid", "cosine"):
        host.launch(
            gradient_error_first_kernel, (batch, blocks), delta, delta, guided, first, *sizes,
            ERROR=kind, BLOCK=block, num_warps=host.NUM_WARPS,
        )  # fmt: skip
    host.launch(
        gradient_error_last_kernel, (batch, blocks), delta, delta, guided, first, last, *sizes,
        ERROR=kind, BLOCK=block, BLOCK_J=block_j, num_warps=host.NUM_WARPS,
    )  # fmt: skip
    host.launch(
        gradient_error_join_kernel, (batch,), delta, first, last, errors, statistics, n, blocks,
        ERROR=kind, BLOCK_J=block_j, num_warps=1,
    )  # fmt: skip
    return errors, statistics


def gradient_error_bwd(
    grad_errors: Tensor, delta: Tensor, guided: Tensor, statistics: Tensor, error: str
) -> Tensor:
    n = _entries(delta)
    delta, guided = flat.in_one_order(delta, guided)
    grad_delta = flat.like_samples_of(delta, delta.dtype)
    if delta.shape[0]:
        block = _block(n)
        host.launch(
            gradient_error_bwd_kernel, (delta.shape[0], host.cdiv(n, block)), delta,
            grad_errors, delta, guided, statistics.contiguous(), grad_delta,
            n, grad_errors.stride(0), delta.stride(0), guided.stride(0),
            ERROR=ERRORS.index(error), BLOCK=block, num_warps=host.NUM_WARPS,
        )  # fmt: skip
    return grad_delta
