"""Crop, resize and flip along one axis in Triton, shared by warp and warped_ssim. Formulas:
warp/reference.py.

A position is a fraction of two integers, so its floor is exact and the share is rounded once; in
float32 a position in a picture of 500 pixels is off by 3e-5 pixels. Integers are 32 bit
(``_gpu.check_axis``), offsets 64 bit.
"""
# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def load_box(boxes_ptr, flips_ptr, b, via_y, via_x, stride_b, stride_i, stride_flips):
    """Top, left, height, width, flip (0 or 1), valid of sample b; a pixel where not valid.

    What is compared cannot overflow, as top + height could.
    """
    boxes_ptr += b * stride_b
    top, left = tl.load(boxes_ptr), tl.load(boxes_ptr + stride_i)
    height, width = tl.load(boxes_ptr + 2 * stride_i), tl.load(boxes_ptr + 3 * stride_i)
    valid = (top >= 0) & (left >= 0) & (height > 0) & (width > 0)
    valid = valid & (height <= via_y - top) & (width <= via_x - left)
    top, left = tl.where(valid, top, 0).to(tl.int32), tl.where(valid, left, 0).to(tl.int32)
    height, width = tl.where(valid, height, 1).to(tl.int32), tl.where(valid, width, 1).to(tl.int32)
    flip = (tl.load(flips_ptr + b * stride_flips) != 0).to(tl.int32)
    return top, left, height, width, flip, valid


@triton.jit
def pair(numerator, denominator, last):
    """The two pixels that numerator / denominator, kept within 0 to last, lies between, and the
    second's share."""
    numerator = tl.minimum(tl.maximum(numerator, 0), last * denominator)
    below = numerator // denominator
    share = (numerator - below * denominator).to(tl.float32) / denominator
    return below, tl.minimum(below + 1, last), share


@triton.jit
def resized(pixel, source, via):
    """Two pixels of the source, for pixels of the resized one."""
    return pair((2 * pixel + 1) * source - via, 2 * via, source - 1)


@triton.jit
def taps(index, begin, length, flip, source, via, size, COMPOSED: tl.constexpr):
    """Pixels of the source and weights (BLOCK,) of the outputs ``index``, which must exist.

    Four of each; the last two weights are 0 unless COMPOSED (via is not the source's size).
    """
    index += flip * (size - 1 - 2 * index)
    one, other, share = pair((2 * index + 1) * length - size, 2 * size, length - 1)
    one += begin
    other += begin
    if COMPOSED:
        a, b, first = resized(one, source, via)
        c, d, second = resized(other, source, via)
        w_a, w_b = (1 - share) * (1 - first), (1 - share) * first
        w_c, w_d = share * (1 - second), share * second
    else:
        a, b, c, d = one, other, one, other
        w_a, w_b = 1 - share, share
        w_c, w_d = share - share, share - share
    return a, b, c, d, w_a, w_b, w_c, w_d


@triton.jit
def touching(pixel, begin, length, source, via, size, COMPOSED: tl.constexpr):
    """The first of the outputs that may have ``pixel`` (BLOCK,) as a tap, and how many, before
    mirroring.

    The map of coordinates is monotone: it is inverted at one pixel less and one more. Where it is
    kept within its ends, the inverse lies beyond the last output and is kept within these too.
    """
    first, last = pixel, pixel
    if COMPOSED:
        first = tl.maximum((2 * pixel - 1) * via - source, 0) // (2 * source)
        last = (tl.maximum((2 * pixel + 3) * via - source, 0) + 2 * source - 1) // (2 * source)
        last = tl.minimum(last, via - 1)
    first -= begin
    last -= begin
    start = tl.maximum((2 * first - 1) * size - length, 0) // (2 * length)
    stop = (tl.maximum((2 * last + 3) * size - length, 0) + 2 * length - 1) // (2 * length)
    stop = tl.minimum(stop, size - 1)
    none = (last < 0) | (first > length - 1)
    return start, tl.where(none, 0, stop - start + 1)


@triton.jit
def weight_of(pixel, index, begin, length, source, via, size, COMPOSED: tl.constexpr):
    """Entries of P or Q at outputs ``index`` (before mirroring) and pixels (BLOCK,)."""
    a, b, c, d, w_a, w_b, w_c, w_d = taps(index, begin, length, 0, source, via, size, COMPOSED)
    weight = tl.where(a == pixel, w_a, 0.0) + tl.where(b == pixel, w_b, 0.0)
    if COMPOSED:
        weight += tl.where(c == pixel, w_c, 0.0) + tl.where(d == pixel, w_d, 0.0)
    return weight
