"""Device functions of the weighted channel sum, shared by the rooms cam and cam_statistics.

B samples, K channels, P = h w pixels. Blocks are (BLOCK_K, BLOCK_P).
"""
# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def pixel_offsets(p, W, stride_y, stride_x, FLAT: tl.constexpr):
    """64-bit offsets of the pixels p (BLOCK_P,)."""
    offsets = p.to(tl.int64) * stride_x
    if not FLAT:
        offsets = (p // W).to(tl.int64) * stride_y + (p % W).to(tl.int64) * stride_x
    return offsets


@triton.jit
def pool_gradients(
    gradients_ptr, alpha_ptr, k_begin, k_end, P, W, stride_k, stride_y, stride_x,
    FLAT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """alpha_k = 1/P sum_p G_kp for the channels k_begin to k_end of one sample."""
    for k0 in range(k_begin, k_end, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        rows = gradients_ptr + k.to(tl.int64)[:, None] * stride_k  # (BLOCK_K, 1)
        acc = tl.zeros((BLOCK_K, BLOCK_P), tl.float32)
        for p0 in range(0, P, BLOCK_P):
            p = p0 + tl.arange(0, BLOCK_P)
            inside = (k[:, None] < k_end) & (p[None, :] < P)
            offsets = pixel_offsets(p, W, stride_y, stride_x, FLAT)[None, :]
            acc += tl.load(rows + offsets, mask=inside, other=0.0).to(tl.float32)
        tl.store(alpha_ptr + k, tl.sum(acc, 1) / P, mask=k < k_end)


@triton.jit
def weighted_sum(
    activations_ptr, alpha_ptr, k_begin, k_end, p, P, W,
    stride_k, stride_y, stride_x, stride_alpha_k,
    FLAT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """sum_k alpha_k A_k over the channels k_begin to k_end, at the pixels p (BLOCK_P,)."""
    columns = activations_ptr + pixel_offsets(p, W, stride_y, stride_x, FLAT)[None, :]
    acc = tl.zeros((BLOCK_K, BLOCK_P), tl.float32)
    for k0 in range(k_begin, k_end, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        inside = (k[:, None] < k_end) & (p[None, :] < P)
        rows = k.to(tl.int64)[:, None] * stride_k
        values = tl.load(columns + rows, mask=inside, other=0.0).to(tl.float32)
        weights_ptr = alpha_ptr + k.to(tl.int64) * stride_alpha_k
        alpha = tl.load(weights_ptr, mask=k < k_end, other=0.0).to(tl.float32)
        acc += alpha[:, None] * values
    # A NaN weight times the padding would leave a NaN behind the last pixel.
    return tl.where(p < P, tl.sum(acc, 0), 0.0)


@triton.jit
def sum_of_splits(scratch_ptr, n_splits, p, P, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr):
    """The partial maps (n_splits, P) of one sample, added in a fixed order, at the pixels p."""
    acc = tl.zeros((BLOCK_S, BLOCK_R), tl.float32)
    for s0 in range(0, n_splits, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        inside = (s[:, None] < n_splits) & (p[None, :] < P)
        partial_ptr = scratch_ptr + s.to(tl.int64)[:, None] * P + p[None, :]
        # .cg: from L2, since other multiprocessors wrote them and this L1 is not coherent.
        acc += tl.load(partial_ptr, mask=inside, other=0.0, cache_modifier=".cg")
    return tl.sum(acc, 0)


@triton.jit
def arrived_last(counter_ptr, n_splits):
    """Whether this program is the last of its sample; if so, it sees what the others stored."""
    tl.debug_barrier()  # every thread's stores come before the one thread's release below
    earlier = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    return earlier == n_splits - 1


@triton.jit
def rectified(values, RELU: tl.constexpr):
    if RELU:
        values = tl.where(values < 0, 0.0, values)  # keeps NaN
    return values


@triton.jit
def make_map(
    activations_ptr, gradients_ptr, alpha_ptr, maps_ptr, scratch_ptr, counters_ptr,
    K, P, W, chunk,
    stride_b, stride_k, stride_y, stride_x,
    stride_gradients_b, stride_gradients_k, stride_gradients_y, stride_gradients_x,
    stride_alpha_b, stride_alpha_k,
    RELU: tl.constexpr, FLAT: tl.constexpr, FLAT_GRADIENTS: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The map of one sample from this program's channels, or from all once the last arrives.

    Returns whether this program wrote the map, and the map's sum before any ReLU.
    """
    b = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    n_splits = tl.num_programs(1)
    k_begin = split * chunk
    k_end = tl.minimum(k_begin + chunk, K)
    activations_ptr += b * stride_b
    alpha_ptr += b * stride_alpha_b
    maps_ptr += b * P
    if gradients_ptr is not None:
        pool_gradients(
            gradients_ptr + b * stride_gradients_b, alpha_ptr, k_begin, k_end, P, W,
            stride_gradients_k, stride_gradients_y, stride_gradients_x,
            FLAT_GRADIENTS, BLOCK_K, BLOCK_P,
        )  # fmt: skip
        tl.debug_barrier()  # alpha is read back below, by other threads than wrote it

    wrote = tl.full((), 1, tl.int1)
    total = tl.zeros((), tl.float32)
    for p0 in range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        plain = weighted_sum(
            activations_ptr, alpha_ptr, k_begin, k_end, p, P, W,
            stride_k, stride_y, stride_x, stride_alpha_k, FLAT, BLOCK_K, BLOCK_P,
        )  # fmt: skip
        if SPLIT:
            tl.store(scratch_ptr + (b * n_splits + split) * P + p, plain, mask=p < P)
        else:
            total += tl.sum(plain, 0)
            tl.store(maps_ptr + p, rectified(plain, RELU), mask=p < P)
    if SPLIT:
        wrote = arrived_last(counters_ptr + b, n_splits)
        if wrote:
            for p0 in range(0, P, BLOCK_R):
                p = p0 + tl.arange(0, BLOCK_R)
                plain = sum_of_splits(
                    scratch_ptr + b * n_splits * P, n_splits, p, P, BLOCK_S, BLOCK_R
                )
                total += tl.sum(plain, 0)
                tl.store(maps_ptr + p, rectified(plain, RELU), mask=p < P)
            tl.store(counters_ptr + b, 0)  # for the next launch
    return wrote, total


@triton.jit
def channel_cotangents(
    cotangent, acc, activations_ptr, grad_activations_ptr, alpha, k, p, K, P, W,
    stride_k, stride_y, stride_x,
    FLAT: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """One tile of the backward: writes alpha_k D, returns acc (BLOCK_K, BLOCK_P) plus D A.

    ``cotangent`` is D (BLOCK_P,), zero behind the last pixel; the pointers are one sample's.
    """
    inside = (k[:, None] < K) & (p[None, :] < P)
    if grad_activations_ptr is not None:
        grad = (alpha[:, None] * cotangent[None, :]).to(grad_activations_ptr.dtype.element_ty)
        if CHANNELS_LAST:
            offsets = p.to(tl.int64)[None, :] * K + k[:, None]
        else:
            offsets = k.to(tl.int64)[:, None] * P + p[None, :]
        tl.store(grad_activations_ptr + offsets, grad, mask=inside)
    if activations_ptr is not None:
        pixels = pixel_offsets(p, W, stride_y, stride_x, FLAT)[None, :]
        rows = k.to(tl.int64)[:, None] * stride_k
        values = tl.load(activations_ptr + rows + pixels, mask=inside, other=0.0)
        acc += values.to(tl.float32) * cotangent[None, :]
    return acc
