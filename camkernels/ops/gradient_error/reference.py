"""Errors between the input gradient and the guided one in plain PyTorch: the oracle.

Per sample, with d = delta and g = delta_G over its n entries:

    sigmoid            - sum g sigma(d)                                       (eq. 11)
    centered_sigmoid   - sum g sigma(d - mean d)                              (eq. 12)
    histogram          - sum min(a, b),  a = |d| / |d|_1,  b = |g| / |g|_1
    histogram_paper    - sum min(|d|, |g|) / (|d|_1 |g|_1)                    (eq. 13)
    cosine             - <d, g> / (|d|_2 |g|_2)                               (eq. 14)

Conventions, the same in every backend:
- g is a constant;
- a norm below the smallest normal float counts as zero, and gives zero error and zero gradient in
  the errors that divide by it;
- at a tie the minimum is the side of d; |d| has no slope at 0;
- NaN or an infinite value makes the error of its sample NaN or infinite.

Source: A Learning Paradigm for Interpretable Gradients, eqs. 11 to 14.
"""

from __future__ import annotations

import torch
from torch import Tensor

from camkernels.ops import _layout

ERRORS = ("sigmoid", "centered_sigmoid", "cosine", "histogram", "histogram_paper")
STATISTICS = 3
"""Numbers per sample that the forward hands to the backward:

    centered_sigmoid   mean d, mean g sigma'(d - mean d), 0
    cosine             -error, |d|_2, |g|_2
    histogram          sum of a where a <= b, |d|_1, |g|_1
    histogram_paper    sum min(|d|, |g|) / |d|_1, |d|_1, |g|_1
"""


def _rows(values: Tensor) -> Tensor:
    """(B, n) in the type of the sums."""
    wide = values if values.dtype == torch.float64 else values.float()
    return wide.reshape(values.shape[0], values.shape[1:].numel())


def _norm(rows: Tensor, squared: bool) -> tuple[Tensor, Tensor]:
    """2-norm or 1-norm (B,) and whether it counts as zero. Scaled, so that no square overflows."""
    largest = rows.detach().abs().amax(1) if rows.shape[1] else rows.new_zeros(rows.shape[0])
    scale = torch.where(largest == 0, 1.0, largest)
    u = rows / scale[:, None]
    total = (u.square() if squared else u.abs()).sum(1)
    total = torch.where(largest == 0, 1.0, total)  # no infinite slope of the root at 0
    norm = scale * (total.sqrt() if squared else total)
    dead = (norm < torch.finfo(rows.dtype).tiny) | (largest == 0)
    return torch.where(dead, 1.0, norm), dead


def _smaller_side(x: Tensor) -> Tensor:
    """sigma(-|x|): all derivatives of the sigmoid are products of it that do not cancel."""
    return torch.sigmoid(torch.where(x > 0, -x, x))


def _sigma(x: Tensor) -> Tensor:
    small = _smaller_side(x)
    return torch.where(x > 0, 1 - small, small)


def _slope(x: Tensor) -> Tensor:
    small = _smaller_side(x)
    return small * (1 - small)


def _sigmoid(d: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    zero = d.new_zeros(d.shape[0])
    visible = _sigma(d) + (d - d).detach()  # the sigmoid of infinity is finite
    return -(g * visible).sum(1), torch.stack((zero, zero, zero), 1)


def _centered_sigmoid(d: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    mean = d.mean(1)
    x = d - mean[:, None]
    statistics = torch.stack((mean, (g * _slope(x)).mean(1), torch.zeros_like(mean)), 1)
    return -(g * _sigma(x)).sum(1), statistics


def _cosine(d: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    (d_norm, d_dead), (g_norm, g_dead) = _norm(d, True), _norm(g, True)
    cosine = (d / d_norm[:, None] * (g / g_norm[:, None])).sum(1)
    cosine = torch.where(d_dead | g_dead, 0.0, cosine)
    return -cosine, _alive(cosine, d_norm, g_norm, d_dead | g_dead)


def _histogram(d: Tensor, g: Tensor, normalized: bool) -> tuple[Tensor, Tensor]:
    (d_norm, d_dead), (g_norm, g_dead) = _norm(d, False), _norm(g, False)
    dead = d_dead | g_dead
    a, b = d.abs(), g.abs()
    if normalized:
        a, b = a / d_norm[:, None], b / g_norm[:, None]
    ours = a <= b
    both = d_norm + g_norm
    visible = (both - both).detach()  # a minimum passes over NaN
    smaller = torch.where(ours, a, b).sum(1) + visible
    if normalized:
        error = -smaller
        chosen = torch.where(ours, a, 0.0).sum(1) + visible
    else:
        chosen = smaller / d_norm
        error = -chosen / g_norm
    return torch.where(dead, 0.0, error), _alive(chosen, d_norm, g_norm, dead)


def _alive(first: Tensor, d_norm: Tensor, g_norm: Tensor, dead: Tensor) -> Tensor:
    """Statistics with the norms; all 0 where one of them is."""
    return torch.where(dead[:, None], 0.0, torch.stack((first, d_norm, g_norm), 1))


def gradient_error_fwd(delta: Tensor, guided: Tensor, error: str) -> tuple[Tensor, Tensor]:
    """Errors (B,), and statistics (B, 3) for the backward; float32, or float64 for float64.

    Args:
        delta, guided: d and g (B, ...), of one shape.
        error: one of ``ERRORS``.
    """
    d, g = _rows(delta), _rows(guided)
    if error == "sigmoid":
        return _sigmoid(d, g)
    if error == "centered_sigmoid":
        return _centered_sigmoid(d, g)
    if error == "cosine":
        return _cosine(d, g)
    return _histogram(d, g, error == "histogram")


def _laid_out(rows: Tensor, delta: Tensor) -> Tensor:
    shaped = rows.reshape(delta.shape).to(delta.dtype)
    if delta.dim() != 4 or delta.is_contiguous():
        return shaped
    channels_last = delta.is_contiguous(memory_format=torch.channels_last)
    return shaped.contiguous(memory_format=_layout.memory_format(channels_last))


def gradient_error_bwd(
    grad_errors: Tensor, delta: Tensor, guided: Tensor, statistics: Tensor, error: str
) -> Tensor:
    """Cotangent of delta from that of the errors (B,); dtype and shape of delta.

    With e the cotangent of a sample's error:

        sigmoid            - e g sigma'(d)
        centered_sigmoid   - e (g sigma'(d - mean d) - mean(g sigma'(d - mean d)))
        cosine             - e (g / |g| - cos d / |d|) / |d|
        histogram          - e sign(d) (1[a <= b] - sum of a where a <= b) / |d|_1
        histogram_paper    - e sign(d) (1[|d| <= |g|] - sum min / |d|_1) / |g|_1 / |d|_1
    """
    d, g = _rows(delta), _rows(guided)
    first, d_norm, g_norm = (s[:, None] for s in statistics.unbind(1))
    e = -grad_errors.to(d.dtype)[:, None]
    if error in ("sigmoid", "centered_sigmoid"):
        mean, slope = (0.0, 0.0) if error == "sigmoid" else (first, d_norm)
        grad = e * (g * _slope(d - mean) - slope)
        return _laid_out(grad, delta)
    dead = (d_norm == 0) | (g_norm == 0)
    d_norm, g_norm = torch.where(dead, 1.0, d_norm), torch.where(dead, 1.0, g_norm)
    if error == "cosine":
        grad = e * (g / g_norm - first * (d / d_norm)) / d_norm
    else:
        a, b = d.abs(), g.abs()
        if error == "histogram":
            a, b = a / d_norm, b / g_norm
        difference = e * d.sign() * ((a <= b).to(d.dtype) - first)
        grad = difference / d_norm if error == "histogram" else difference / g_norm / d_norm
    return _laid_out(torch.where(dead, 0.0, grad), delta)
