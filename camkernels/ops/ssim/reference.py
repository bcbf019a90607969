"""Structural similarity in plain PyTorch: the oracle of the kernels beside it.

Shapes: x, y (B, C, H, W). With a window of weights g_y (ky,), g_x (kx,) that sum to 1, E the
weighted mean in it, mu = E x, nu = E y, C1 = (k1 L)^2, C2 = (k2 L)^2:

    S = (2 mu nu + C1) (2 sigma_xy + C2) / ((mu^2 + nu^2 + C1) (sigma_x^2 + sigma_y^2 + C2))

and the value of a sample is the mean of S over its windows and channels. Padding "valid": windows
that lie in the picture; "same": one window around each pixel, zeros outside.

Source: Wang et al., Image quality assessment: from error visibility to structural similarity,
eqs. 13 to 17; the window of its section III.C (11 x 11, sigma 1.5).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def window(kind: str, size: int, sigma: float, length: int) -> list[float]:
    """Weights of the window along an axis of ``length`` pixels.

    Where the axis is shorter than the window, the window is the largest of odd size that fits,
    with the same sigma, and its weights again sum to 1.
    """
    size = min(size, length if length % 2 else length - 1)
    size = max(size, 1)
    middle = size // 2
    if kind == "uniform":
        return [1.0 / size] * size
    weights = [math.exp(-((i - middle) ** 2) / (2 * sigma * sigma)) for i in range(size)]
    total = math.fsum(weights)
    return [w / total for w in weights]


def _mean(values: Tensor, rows: Sequence[float], columns: Sequence[float], same: bool) -> Tensor:
    """E, for planes (N, 1, H, W)."""
    down = values.new_tensor(rows).view(1, 1, -1, 1)
    across = values.new_tensor(columns).view(1, 1, 1, -1)
    pad = (len(rows) // 2, len(columns) // 2) if same else (0, 0)
    return F.conv2d(F.conv2d(values, down, padding=(pad[0], 0)), across, padding=(0, pad[1]))


def ssim(
    x: Tensor,
    y: Tensor,
    rows: Sequence[float],
    columns: Sequence[float],
    c1: float,
    c2: float,
    same: bool,
) -> Tensor:
    """(B,) float32 (float64 for float64), differentiable in both."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, y = (t.to(dtype).flatten(0, 1)[:, None] for t in (x, y))
    batch = x.shape[0]
    stacked = torch.cat([x, y, x * x, y * y, x * y])
    means = _mean(stacked, rows, columns, same)
    mu, nu, xx, yy, xy = means.unflatten(0, (5, batch)).unbind(0)
    x_variance, y_variance, covariance = xx - mu * mu, yy - nu * nu, xy - mu * nu
    luminance = (2 * mu * nu + c1) / (mu * mu + nu * nu + c1)
    structure = (2 * covariance + c2) / (x_variance + y_variance + c2)
    return (luminance * structure).flatten(1).mean(1)


def per_sample(values: Tensor, channels: int) -> Tensor:
    """Means over channels."""
    return values.unflatten(0, (-1, channels)).mean(1) if values.numel() else values.view(-1)


def ssim_fwd(
    x: Tensor,
    y: Tensor,
    rows: Sequence[float],
    columns: Sequence[float],
    c1: float,
    c2: float,
    same: bool,
) -> Tensor:
    return per_sample(ssim(x, y, rows, columns, c1, c2, same), x.shape[1])


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
    """Cotangents of x and y (empty where not wanted), in their dtypes."""
    _, pull, *_ = torch.func.vjp(lambda x, y: ssim_fwd(x, y, rows, columns, c1, c2, same), x, y)
    to_x, to_y = pull(grad)
    return to_x if want_x else x.new_empty(0), to_y if want_y else y.new_empty(0)
