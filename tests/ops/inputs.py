"""How the ops' inputs are made: activations with gradients or weights, and maps."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from ops.base import Request
from ops.oracle import rounded
from torch import Tensor

from camkernels.ops.cam import reference as cam_reference
from camkernels.ops.map_statistics import reference as statistics_reference

ATTEMPTS = 30


def _values(shape: tuple[int, ...], kind: str, generator: torch.Generator) -> Tensor:
    normal = torch.randn(shape, generator=generator)
    if kind == "sparse":  # as after a ReLU: exact zeros
        return normal.relu()
    if kind == "integers":  # ties
        return torch.randint(-2, 4, shape, generator=generator).float()
    if kind == "constant":
        return torch.ones(shape)
    if kind == "smooth":  # positive, away from every kink
        return torch.rand(shape, generator=generator) + 0.5
    return normal


def _power(exponent: int, dtypes: tuple[torch.dtype, ...]) -> float:
    """10^exponent, within what the narrowest of the dtypes holds with room for a gradient."""
    return 10.0 ** (max(-1, min(1, exponent)) if torch.float16 in dtypes else exponent)


def activations_and_seeds(request: Request) -> tuple[Tensor, Tensor]:
    """A (B, K, h, w), and G of its shape or weights (B, K); no pixel within rounding of 0 by
    cancellation, where the ReLU's mask is anyone's guess (exact zeros stay)."""
    shape = (request.batch, request.channels, request.height, request.width)
    for attempt in range(ATTEMPTS + 1):
        generator = torch.Generator().manual_seed(request.seed + 7919 * attempt)
        kind = "smooth" if attempt == ATTEMPTS else request.kind
        activations = _values(shape, kind, generator)
        second = shape if request.variant == "gradients" else shape[:2]
        gradients = _values(second, "normal" if kind == "sparse" else kind, generator)
        power = _power(request.exponent, request.dtypes)
        a = rounded(activations * power, request.dtypes[0], request.layouts[0])
        g = rounded(gradients, request.dtypes[1], request.layouts[1])
        if not request.option or not _ambiguous(a, g):
            break
    return a, g


def _ambiguous(activations: Tensor, gradients: Tensor) -> bool:
    a, g = activations.double(), gradients.double()
    alpha = cam_reference.channel_weights(g)
    absolute = cam_reference.channel_weights(g.abs())
    maps = cam_reference.weighted_sum(a, alpha).abs()
    terms = cam_reference.weighted_sum(a.abs(), absolute)
    return bool(((maps < 1e-4 * terms) & (terms > 0)).any())


def maps_of(request: Request) -> Tensor:
    """M (B, h, w); signed where the op clamps, else not negative."""
    generator = torch.Generator().manual_seed(request.seed)
    values = _values((request.batch, request.height, request.width), request.kind, generator)
    if not request.option:
        values = values.abs()
    values = values * _power(request.exponent, request.dtypes[:1])
    return rounded(values, request.dtypes[0], request.layouts[0])


def near_degenerate(maps: Tensor) -> bool:
    """Whether some ellipse is so thin, without being a line, that float32 cancels its area away."""
    statistics = statistics_reference.map_statistics(maps.double())
    yy, xx = statistics.covariance[:, 0, 0], statistics.covariance[:, 1, 1]
    relative = statistics.area.square() / (yy * xx).clamp_min(1e-300)
    extent = torch.minimum(yy / maps.shape[1] ** 2, xx / maps.shape[2] ** 2)
    return bool(((statistics.area > 0) & ((relative < 1e-3) | (extent < 1e-6))).any())


def extreme_maps(dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Named maps (B, h, w), none negative."""
    generator = torch.Generator().manual_seed(11)
    ordinary = torch.rand(3, 6, 7, generator=generator) + 0.1
    yield "1x1 map", ordinary[:, :1, :1]
    yield "1x1 map of zero", torch.zeros(2, 1, 1)
    yield "all zero", torch.zeros(2, 5, 4)
    dead = ordinary.clone()
    dead[1] = 0
    yield "one of three all zero", dead
    pixel = torch.zeros(2, 5, 6)
    pixel[0, 2, 3], pixel[1, 4, 5] = 0.37, 7.0
    yield "one pixel on", pixel
    yield from _lines(generator)
    yield "constant", torch.full((2, 5, 4), 0.3)
    yield "one row", ordinary[:, :1]
    yield "one column", ordinary[:, :, :1]
    ties = ordinary.clone()
    ties[:, ::2] = 0
    yield "ties at zero", ties
    yield "empty batch", torch.zeros(0, 4, 4)
    yield "huge", ordinary * 1e30
    yield "tiny", ordinary * 1e-30
    yield "huge beside tiny", torch.stack((ordinary[0] * 1e30, ordinary[1] * 1e-30))
    peak = ordinary * 1e-6
    peak[:, 3, 3] = 1.0
    yield "a peak over a floor of 1e-6", peak
    yield "wide", torch.rand(1, 2, 300, generator=generator)


def _lines(generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    row = torch.zeros(3, 14, 14)
    column, diagonal = row.clone(), row.clone()
    values = torch.rand(3, 14, generator=generator) + 0.01
    row[:, 11], column[:, :, 5] = values, values
    diagonal.diagonal(dim1=1, dim2=2)[:] = values
    yield "a line along a row", row
    yield "a line along a column", column
    yield "a diagonal line", diagonal


def extreme_activations(dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Named pairs of A (B, K, h, w) and G or weights, of which no pixel is ambiguous."""
    generator = torch.Generator().manual_seed(13)
    a = torch.rand(2, 3, 4, 5, generator=generator) + 0.1
    g = torch.rand(2, 3, 4, 5, generator=generator) + 0.1
    w = torch.rand(2, 3, generator=generator) + 0.1
    for name, second in (("G", g), ("weights", w)):
        cut = second[..., :1, :1] if second.dim() == 4 else second
        yield f"1x1 map, {name}", a[..., :1, :1], cut
        yield f"one channel, {name}", a[:, :1], second[:, :1]
        yield f"A all zero, {name}", torch.zeros_like(a), second
        yield f"{name} all zero", a, torch.zeros_like(second)
        yield f"all negative (dead under ReLU), {name}", a, -second
        one_dead = second.clone()
        one_dead[1] *= -1
        yield f"one of two dead, {name}", a, one_dead
        yield f"empty batch, {name}", a[:0], second[:0]
        yield f"huge A, tiny {name}", a * 1e30, second * 1e-30
        yield f"tiny A, huge {name}", a * 1e-30, second * 1e30
        yield f"huge maps, {name}", a * 1e30, second
        yield f"tiny maps, {name}", a * 1e-30, second
        pixel = torch.zeros_like(a)
        pixel[:, :, 1, 2] = a[:, :, 1, 2]
        yield f"one pixel on, {name}", pixel, second
        row = torch.zeros_like(a)
        row[:, :, 2] = a[:, :, 2]
        yield f"one line on, {name}", row, second
        yield f"constant, {name}", torch.full_like(a, 0.3), torch.full_like(second, 0.7)
    # L = 1 a - 1 a = 0 exactly, in whatever order: a tie, which the ReLU masks.
    tie = a[:, :1].expand(-1, 2, -1, -1).contiguous()
    tie[:, 1, 0] = 0
    yield "ties at zero by cancellation", tie, torch.tensor([[1.0, -1.0], [1.0, -1.0]])
