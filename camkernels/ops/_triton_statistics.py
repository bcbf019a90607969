"""Device functions of the statistics of one map, shared by map_statistics and cam_statistics.

P = h w pixels, in blocks (BLOCK,). Divisions are the correctly rounded ones: the approximate ones
flush a denormal mean to zero. Formulas and conventions: map_statistics/reference.py.
"""
# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"

import triton
import triton.language as tl

from camkernels.ops._triton_cam import pixel_offsets, rectified

# 64 eps and the smallest normal number of float32, as area_tolerance and dead_threshold say.
AREA_TOLERANCE = tl.constexpr(2.0**-17)
DEAD_THRESHOLD = tl.constexpr(2.0**-126)


@triton.jit
def load_pixels(maps_ptr, p, P, W, stride_y, stride_x, FLAT: tl.constexpr, CLAMP: tl.constexpr):
    """Values of the pixels p (BLOCK,) in float32, zero behind the last one."""
    offsets = pixel_offsets(p, W, stride_y, stride_x, FLAT)
    values = tl.load(maps_ptr + offsets, mask=p < P, other=0.0).to(tl.float32)
    return rectified(values, CLAMP)


@triton.jit
def coordinates(p, W):
    """Row and column of the pixels p (BLOCK,)."""
    return (p // W).to(tl.float32), (p % W).to(tl.float32)


@triton.jit
def statistics_of_map(
    maps_ptr, P, W, stride_y, stride_x,
    FLAT: tl.constexpr, CLAMP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Entropy, area, dispersion, mean, variance, row, column, C_yy, C_yx, C_xx of one map.

    Four passes, which after the first read from the cache: scale; sum; moments about the mean and
    entropy; covariance about the centroid (centred sums: nothing cancels).
    """
    zeros = tl.zeros((BLOCK,), tl.float32)
    largest, negative = zeros, zeros
    for p0 in range(0, P, BLOCK):
        p = p0 + tl.arange(0, BLOCK)
        m = load_pixels(maps_ptr, p, P, W, stride_y, stride_x, FLAT, CLAMP)
        # A maximum may pass over NaN; an infinite scale turns the whole map into NaN below.
        largest = tl.maximum(largest, tl.where(m != m, float("inf"), tl.abs(m)))
        negative = tl.maximum(negative, tl.where(m < 0, 1.0, 0.0))
    scale = tl.max(largest, 0)
    dead = scale < DEAD_THRESHOLD
    scale = tl.where(dead, 1.0, scale)
    valid = tl.where(tl.max(negative, 0) > 0, float("nan"), 1.0)

    acc = zeros
    for p0 in range(0, P, BLOCK):
        p = p0 + tl.arange(0, BLOCK)
        m = load_pixels(maps_ptr, p, P, W, stride_y, stride_x, FLAT, CLAMP)
        acc += tl.where(dead, 0.0, tl.div_rn(m, zeros + scale))
    total = tl.sum(acc, 0)
    count = tl.full((), 0.0, tl.float32) + P
    mean = tl.div_rn(total, count)  # of m / scale
    divisor = tl.where(dead, 1.0, total)

    squares, rows, columns, entropies = zeros, zeros, zeros, zeros
    for p0 in range(0, P, BLOCK):
        p = p0 + tl.arange(0, BLOCK)
        m = load_pixels(maps_ptr, p, P, W, stride_y, stride_x, FLAT, CLAMP)
        u = tl.where(dead, 0.0, tl.div_rn(m, zeros + scale))
        squares += tl.where(p < P, (u - mean) * (u - mean), 0.0)
        share = tl.div_rn(u, zeros + divisor) * valid
        y, x = coordinates(p, W)
        rows += share * y
        columns += share * x
        entropies -= share * tl.log(tl.where(share == 0, 1.0, share))
    variance = tl.div_rn(tl.sum(squares, 0), count)
    row, column = tl.sum(rows, 0), tl.sum(columns, 0)

    acc_yy, acc_yx, acc_xx = zeros, zeros, zeros
    for p0 in range(0, P, BLOCK):
        p = p0 + tl.arange(0, BLOCK)
        m = load_pixels(maps_ptr, p, P, W, stride_y, stride_x, FLAT, CLAMP)
        u = tl.where(dead, 0.0, tl.div_rn(m, zeros + scale))
        share = tl.div_rn(u, zeros + divisor) * valid
        y, x = coordinates(p, W)
        acc_yy += share * (y - row) * (y - row)
        acc_yx += share * (y - row) * (x - column)
        acc_xx += share * (x - column) * (x - column)
    yy, yx, xx = tl.sum(acc_yy, 0), tl.sum(acc_yx, 0), tl.sum(acc_xx, 0)

    live_mean = tl.where(dead, 1.0, mean)
    return (
        tl.sum(entropies, 0),
        area(yy, yx, xx, tl.div_rn(count, tl.full((), 0.0, tl.float32) + W), W),
        tl.div_rn(variance, live_mean * live_mean),
        mean * scale,
        variance * scale * scale,
        row, column, yy, yx, xx,
    )  # fmt: skip


@triton.jit
def area(yy, yx, xx, H, W):
    """sqrt(det C), 0 where the ellipse is degenerate."""
    determinant = yy * xx - yx * yx
    flat_y, flat_x = AREA_TOLERANCE * H, AREA_TOLERANCE * W
    degenerate = (determinant <= AREA_TOLERANCE * yy * xx) | (yy <= flat_y * flat_y)
    degenerate = degenerate | (xx <= flat_x * flat_x)
    return tl.where(degenerate, 0.0, tl.sqrt(tl.where(degenerate, 1.0, determinant)))


@triton.jit
def write_statistics(
    b, maps_ptr, P, W, stride_y, stride_x,
    entropy_ptr, area_ptr, dispersion_ptr, mean_ptr, variance_ptr, centroid_ptr, covariance_ptr,
    FLAT: tl.constexpr, CLAMP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Statistics of the map at ``maps_ptr``, to place b of contiguous outputs."""
    entropy, ellipse, dispersion, mean, variance, row, column, yy, yx, xx = statistics_of_map(
        maps_ptr, P, W, stride_y, stride_x, FLAT, CLAMP, BLOCK
    )
    tl.store(entropy_ptr + b, entropy)
    tl.store(area_ptr + b, ellipse)
    tl.store(dispersion_ptr + b, dispersion)
    tl.store(mean_ptr + b, mean)
    tl.store(variance_ptr + b, variance)
    tl.store(centroid_ptr + b * 2, row)
    tl.store(centroid_ptr + b * 2 + 1, column)
    tl.store(covariance_ptr + b * 4, yy)
    tl.store(covariance_ptr + b * 4 + 1, yx)
    tl.store(covariance_ptr + b * 4 + 2, yx)
    tl.store(covariance_ptr + b * 4 + 3, xx)


@triton.jit
def cotangent_coefficients(
    b,
    entropy_ptr, area_ptr, dispersion_ptr, mean_ptr, variance_ptr, centroid_ptr, covariance_ptr,
    grad_entropy_ptr, grad_area_ptr, grad_dispersion_ptr, grad_mean_ptr, grad_variance_ptr,
    grad_centroid_ptr, grad_covariance_ptr,
    stride_entropy, stride_area, stride_dispersion, stride_mean, stride_variance,
    stride_centroid_b, stride_centroid_i,
    stride_covariance_b, stride_covariance_i, stride_covariance_j,
):  # fmt: skip
    """What the cotangent of a pixel needs of its map; see pixel_cotangent.

    The terms of area, centroid and covariance are one quadratic polynomial in (dy, dx):
    q + q_y dy + q_x dx + q_yy dy^2 + q_yx dy dx + q_xx dx^2.
    """
    zero = tl.zeros((), tl.float32)
    mean, variance = tl.load(mean_ptr + b), tl.load(variance_ptr + b)
    entropy, dispersion = tl.load(entropy_ptr + b), tl.load(dispersion_ptr + b)
    row, column = tl.load(centroid_ptr + b * 2), tl.load(centroid_ptr + b * 2 + 1)
    to_entropy, to_dispersion, to_mean, to_variance = zero, zero, zero, zero
    q, q_y, q_x, q_yy, q_yx, q_xx = zero, zero, zero, zero, zero, zero
    if grad_entropy_ptr is not None:
        to_entropy = tl.load(grad_entropy_ptr + b * stride_entropy).to(tl.float32)
    if grad_dispersion_ptr is not None:
        to_dispersion = 2 * tl.load(grad_dispersion_ptr + b * stride_dispersion).to(tl.float32)
    if grad_mean_ptr is not None:
        to_mean = tl.load(grad_mean_ptr + b * stride_mean).to(tl.float32)
    if grad_variance_ptr is not None:
        to_variance = 2 * tl.load(grad_variance_ptr + b * stride_variance).to(tl.float32)
    yy, yx = tl.load(covariance_ptr + b * 4), tl.load(covariance_ptr + b * 4 + 1)
    xx = tl.load(covariance_ptr + b * 4 + 3)
    if grad_area_ptr is not None:
        ellipse = tl.load(area_ptr + b)
        to_area = tl.load(grad_area_ptr + b * stride_area).to(tl.float32)
        none = ellipse == 0  # degenerate: no gradient
        half = tl.where(none, 0.0, tl.div_rn(to_area, 2 * tl.where(none, 1.0, ellipse)))
        q_yy += half * xx
        q_xx += half * yy
        q_yx -= 2 * half * yx
        q -= 2 * half * ellipse * ellipse
    if grad_centroid_ptr is not None:
        grad_ptr = grad_centroid_ptr + b * stride_centroid_b
        q_y += tl.load(grad_ptr).to(tl.float32)
        q_x += tl.load(grad_ptr + stride_centroid_i).to(tl.float32)
    if grad_covariance_ptr is not None:
        grad_ptr = grad_covariance_ptr + b * stride_covariance_b
        to_yy = tl.load(grad_ptr).to(tl.float32)
        to_yx = tl.load(grad_ptr + stride_covariance_j).to(tl.float32)
        to_yx += tl.load(grad_ptr + stride_covariance_i).to(tl.float32)
        to_xx = tl.load(grad_ptr + stride_covariance_i + stride_covariance_j).to(tl.float32)
        q_yy += to_yy
        q_yx += to_yx
        q_xx += to_xx
        q -= to_yy * yy + to_yx * yx + to_xx * xx
    return (
        mean, variance, entropy, dispersion, row, column,
        to_entropy, to_dispersion, to_mean, to_variance, q, q_y, q_x, q_yy, q_yx, q_xx,
    )  # fmt: skip


@triton.jit
def pixel_cotangent(
    m, p, P, W, mean, variance, entropy, dispersion, row, column,
    to_entropy, to_dispersion, to_mean, to_variance, q, q_y, q_x, q_yy, q_yx, q_xx,
    ENTROPY: tl.constexpr, DISPERSION: tl.constexpr, QUADRATIC: tl.constexpr,
):  # fmt: skip
    """Cotangent of the pixel values m (BLOCK,) from those of the statistics.

    ENTROPY, DISPERSION, QUADRATIC: whether there are such terms; a NaN statistic that was not
    asked for must not reach the result.
    """
    count = tl.full(m.shape, 0.0, tl.float32) + P
    dead = (mean == 0) & (variance == 0)
    divisor = tl.full(m.shape, 0.0, tl.float32) + tl.where(dead, 1.0, mean)
    v = tl.div_rn(m, divisor)  # Z p
    live = tl.zeros(m.shape, tl.float32)  # times 1 / S
    if ENTROPY:
        positive = m > 0
        log_p = tl.log(tl.where(positive, tl.div_rn(v, count), 1.0))
        # Nothing to a pixel at 0, but NaN where the entropy is NaN.
        live -= to_entropy * tl.where(positive, log_p + entropy, 0.0 * entropy)
    if DISPERSION:
        live += to_dispersion * (v - 1 - dispersion)
    if QUADRATIC:
        y, x = coordinates(p, W)
        dy, dx = y - row, x - column
        live += q + dy * (q_y + q_yy * dy + q_yx * dx) + dx * (q_x + q_xx * dx)
    grad = tl.zeros(m.shape, tl.float32)
    if (ENTROPY or DISPERSION) or QUADRATIC:  # a signed map may have a mean of 0
        grad = tl.where(dead, 0.0, tl.div_rn(tl.div_rn(live, divisor), count))
    deviation = tl.where(dead, 0.0, m - mean)
    return grad + tl.div_rn(to_mean + to_variance * deviation, count)
