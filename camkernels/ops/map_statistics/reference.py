"""Statistics of maps in plain PyTorch: the oracle of the kernels beside it.

Shapes: maps M (B, h, w), Z = h w; S = sum M, p = M / S. Coordinates are (row, column) in pixels of
the map. With C the covariance of the coordinates under p, mu the mean and sigma^2 the population
variance of the Z values:

    entropy    ce = - sum p ln p               (nats)
    area       ca = sqrt(det C) = sqrt(lambda_1 lambda_2)   (pixels^2)
    dispersion cd = sigma^2 / mu^2

Conventions, the same in every backend:
- a map whose largest magnitude is below the smallest normal float is dead: all statistics are 0;
- p, and so entropy, area, centroid and covariance, are NaN where a value is negative (``clamp``
  applies relu first), and every statistic is NaN where a value is NaN or infinite;
- det C / (C_yy C_xx) up to ``area_tolerance`` t counts as degenerate (a line, a point): ca = 0 and
  no gradient; so does C_yy up to (t h)^2 or C_xx up to (t w)^2, which is what rounding of the
  centroid leaves of a line along an axis.

Source: Schoettl, A light-weight method to foster the (Grad)CAM interpretability, eqs. 1 to 3.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from camkernels.ops.cam.reference import accumulate


class Statistics(NamedTuple):
    """One value per map; in this order everywhere: Python, C++, Triton."""

    entropy: Tensor  # (B,)
    area: Tensor  # (B,)
    dispersion: Tensor  # (B,)
    mean: Tensor  # (B,)
    variance: Tensor  # (B,)
    centroid: Tensor  # (B, 2): row, column
    covariance: Tensor  # (B, 2, 2): ((yy, yx), (xy, xx))


def area_tolerance(dtype: torch.dtype) -> float:
    """Relative determinant below which the ellipse counts as degenerate."""
    return 64 * torch.finfo(dtype).eps


def dead_threshold(dtype: torch.dtype) -> float:
    """Largest magnitude of a dead map: nothing that a GPU may flush to zero counts as alive."""
    return torch.finfo(dtype).tiny


def coordinates(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Row (h, 1) and column (1, w) index of each pixel."""
    _, height, width = maps.shape
    rows = torch.arange(height, dtype=maps.dtype, device=maps.device)
    columns = torch.arange(width, dtype=maps.dtype, device=maps.device)
    return rows[:, None], columns[None, :]


def _prepared(maps: Tensor, clamp: bool) -> Tensor:
    maps = accumulate(maps)
    return maps.relu() if clamp else maps


def _scale(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Largest magnitude (B, 1, 1), 1 where the map is dead, and which maps are dead (B, 1, 1)."""
    largest = maps.detach().abs().amax((1, 2), keepdim=True)
    dead = largest < dead_threshold(maps.dtype)  # NaN is not dead
    return torch.where(dead, 1.0, largest), dead


def map_statistics(maps: Tensor, clamp: bool = False) -> Statistics:
    """All statistics of maps (B, h, w), by plain differentiable operations."""
    values = _prepared(maps, clamp)
    scale, dead = _scale(values)
    # Everything but mean and variance is invariant to scale: a constant to autograd.
    u = torch.where(dead, 0.0, values / scale)
    mean_u = u.mean((1, 2))
    variance_u = (u - mean_u[:, None, None]).square().mean((1, 2))
    factor, dead_map = scale[:, 0, 0], dead[:, 0, 0]
    plain = values.mean((1, 2))  # the mean of a dead map is 0, its gradient 1/Z all the same
    mean = torch.where(dead_map, plain - plain.detach(), mean_u * factor)
    variance = torch.where(dead_map, 0.0, variance_u * factor.square())
    dispersion = variance_u / torch.where(dead_map, 1.0, mean_u).square()

    valid = torch.where((values < 0).any(2).any(1), math.nan, 1.0)[:, None, None].to(values.dtype)
    y, x = coordinates(values)
    p = _normalised(u, dead) * valid
    row, column = (p * y).sum((1, 2)), (p * x).sum((1, 2))
    dy, dx = y - row[:, None, None], x - column[:, None, None]
    yy, yx, xx = ((p * d).sum((1, 2)) for d in (dy * dy, dy * dx, dx * dx))
    return Statistics(
        entropy=_entropy(u, dead, valid),
        area=_area(yy, yx, xx, *values.shape[1:]),
        dispersion=dispersion,
        mean=mean,
        variance=variance,
        centroid=torch.stack((row, column), 1),
        covariance=torch.stack((yy, yx, yx, xx), 1).view(-1, 2, 2),
    )


def _normalised(u: Tensor, dead: Tensor) -> Tensor:
    return u / torch.where(dead, 1.0, u.sum((1, 2), keepdim=True))


def _entropy(u: Tensor, dead: Tensor, valid: Tensor) -> Tensor:
    # The slope of -p ln p at 0 is infinite; by convention a pixel at 0 gets no gradient.
    p = _normalised(torch.where(u == 0, 0.0, u), dead) * valid
    return -(p * torch.where(p == 0, 1.0, p).log()).sum((1, 2))


def _area(yy: Tensor, yx: Tensor, xx: Tensor, height: int, width: int) -> Tensor:
    tolerance = area_tolerance(yy.dtype)
    determinant = yy * xx - yx * yx
    degenerate = (
        (determinant <= tolerance * yy * xx)
        | (yy <= (tolerance * height) ** 2)
        | (xx <= (tolerance * width) ** 2)
    )
    return torch.where(degenerate, 0.0, torch.where(degenerate, 1.0, determinant).sqrt())


def _entries(statistic: Tensor) -> Tensor:
    """(B, entries, 1, 1), to stand beside maps; also of an empty batch."""
    return statistic.reshape(statistic.shape[0], statistic.shape[1:].numel(), 1, 1)


def _entropy_slope(values: Tensor, mean: Tensor, entropy: Tensor) -> Tensor:
    """ln p + ce, which is -S d ce / d M, and 0 where M = 0.

    By convention a pixel at 0 is no part of the entropy, at any order: further derivatives must not
    reach it through the mean either. ``own`` has the value of the mean, the slope of its live part.
    """
    positive = values > 0
    part = torch.where(positive, values / mean.detach(), 0.0).mean((1, 2), keepdim=True)
    own = mean.detach() * (1 + part - part.detach())
    pixels = values.shape[1] * values.shape[2]
    log_p = torch.where(positive, values / own / pixels, 1.0).log()
    slope = torch.where(positive | entropy.isnan(), log_p + entropy, 0.0)
    return slope * (mean / own)  # the caller divides by the mean


def map_statistics_fwd(maps: Tensor, clamp: bool) -> tuple[Tensor, ...]:
    """The statistics, as every backend returns them."""
    return tuple(map_statistics(maps, clamp))


def map_statistics_bwd(maps: Tensor, *arguments: Any) -> Tensor:
    """Cotangent of the maps from those of the statistics; dtype of ``maps``.

    Arguments, flat as the kernels take them: maps, the seven statistics, the cotangent of each
    (None where it was not used), clamp.

        d ce / d M = -(ln p + ce) / S           where M > 0
        d ca / d M = (q - ca) / S,  q = (C_yy dx^2 + C_xx dy^2 - 2 C_xy dx dy) / (2 ca)
        d cd / d M = 2 (M / mu - 1 - cd) / (Z mu)
    """
    count = len(Statistics._fields)
    statistics, grad_statistics, clamp = arguments[:count], arguments[count:-1], arguments[-1]
    values = _prepared(maps, clamp)
    entropy, area, dispersion, mean, variance, centroid, covariance = (
        _entries(s) for s in statistics
    )
    entropy, area, dispersion, mean, variance = (
        s[:, 0] for s in (entropy, area, dispersion, mean, variance)
    )
    to = [None if g is None else _entries(g) for g in grad_statistics]
    pixels = values.shape[1] * values.shape[2]
    dead = (mean == 0) & (variance == 0)
    live_mean = torch.where(dead, 1.0, mean)
    v = values / live_mean  # M / mu = Z p
    y, x = coordinates(values)
    dy, dx = y - centroid[:, 0], x - centroid[:, 1]
    yy, yx, xx = covariance[:, 0], covariance[:, 1], covariance[:, 3]

    live = torch.zeros_like(values)  # times 1 / S
    if to[0] is not None:
        live = live - to[0][:, 0] * _entropy_slope(values, live_mean, entropy)
    if to[1] is not None:
        degenerate = area == 0
        half = to[1][:, 0] / (2 * torch.where(degenerate, 1.0, area))
        q = xx * dy * dy + yy * dx * dx - 2 * yx * dy * dx - 2 * area * area
        live = live + torch.where(degenerate, 0.0, half * q)
    if to[2] is not None:
        live = live + 2 * to[2][:, 0] * (v - 1 - dispersion)
    if to[5] is not None:
        live = live + to[5][:, 0] * dy + to[5][:, 1] * dx
    if to[6] is not None:
        cross = to[6][:, 1] + to[6][:, 2]
        live = live + to[6][:, 0] * (dy * dy - yy) + cross * (dy * dx - yx)
        live = live + to[6][:, 3] * (dx * dx - xx)
    gradient = torch.zeros_like(values)
    if any(to[i] is not None for i in (0, 1, 2, 5, 6)):  # a signed map may have a mean of 0
        gradient = torch.where(dead, 0.0, live / live_mean / pixels)
    if to[3] is not None:
        gradient = gradient + to[3][:, 0] / pixels
    if to[4] is not None:
        deviation = torch.where(dead, 0.0, values - mean)
        gradient = gradient + 2 * to[4][:, 0] * deviation / pixels
    if clamp:
        gradient = torch.where(values <= 0, 0.0, gradient)
    return gradient.to(maps.dtype)
