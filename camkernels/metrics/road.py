"""ROAD: what a model still says of a picture whose most, or least, relevant pixels are replaced by
what their neighbours tell of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from camkernels.metrics.curves import Score, ranks
from camkernels.metrics.regions import enlarged

PERCENTILES = (20.0, 40.0, 60.0, 80.0)
# Of one solve on a CPU: the seven arrays that an iteration reads stay in its caches.
_ELEMENTS_ON_CPU = 2**18


class ROADScores(NamedTuple):
    """Changes of the score (B,), averaged over percentiles; see :func:`road`."""

    most_relevant_first: Tensor
    """The less, the better."""
    least_relevant_first: Tensor
    """The more, the better."""
    combined: Tensor
    """(least_relevant_first - most_relevant_first) / 2: the more, the better."""


@torch.no_grad()
def road(
    score: Score,
    images: Tensor,
    maps: Tensor,
    *,
    percentiles: Sequence[float] = PERCENTILES,
    noise: float = 0.01,
    seed: int = 0,
    batch_size: int = 64,
) -> ROADScores:
    """Score of the picture without its most, or least, relevant pixels, less that of the picture.

    At percentile q, of P pixels the ceil(q (P - 1) / 100) that rank last stay and the others are
    :func:`imputed`. Means are taken over the percentiles.

    Args:
        score: see :data:`camkernels.metrics.curves.Score`.
        images: (B, C, H, W), as the model takes them.
        maps: (B, h, w), enlarged bilinearly to the picture.
        percentiles: each in (0, 100).
        noise, seed: see :func:`imputed`.
        batch_size: pictures per call of ``score``, whichever picture or percentile they are of.

    Returns:
        :class:`ROADScores`; NaN where the map is not finite.

    Raises:
        ValueError: percentiles, a noise or a batch size outside of what is allowed; maps of another
        shape, or not floating-point.

    pytorch-grad-cam keeps the pixels below ``numpy.percentile`` of the map, and for the least
    relevant of 1 - map: the same where no two values are equal. Where many are, as the zeros of a
    rectified map, that removes all pixels at low percentiles and leaves a system without solution;
    here equal values go in the order of rows, and each percentile removes its share, as in the
    paper. Its noise differs between pictures and runs; here all pictures get the same, so that a
    score does not depend on the batch.

    Source: Rong et al., A consistent and efficient evaluation strategy for attribution methods,
    sections 3 and 4.
    """
    check_road(percentiles, noise)
    if batch_size < 1:
        raise ValueError(f"batch_size: expected a positive number, got {batch_size}")
    if maps.dim() != 3 or len(maps) != len(images):
        raise ValueError(f"maps: expected ({len(images)}, h, w), got {tuple(maps.shape)}")
    size = (images.shape[2], images.shape[3])
    pixels = size[0] * size[1]
    large = enlarged(maps, size)
    place = torch.stack([ranks(large), ranks(-large)], 1)  # the most, the least relevant first
    counts = [pixels - math.ceil(q * (pixels - 1) / 100) for q in percentiles]
    removed = torch.tensor(counts, device=images.device)
    cells = torch.arange(len(images) * 2 * len(counts), device=images.device)
    found = [images.new_empty(0)]
    for chunk in cells.split(batch_size):
        owner, rest = chunk // (2 * len(counts)), chunk % (2 * len(counts))
        order, share = rest // len(counts), rest % len(counts)
        gone = (place[owner, order] < removed[share, None]).view(-1, *size)
        found.append(score(imputed(images[owner], gone, noise=noise, seed=seed), owner))
    after = torch.cat(found).view(len(images), 2, len(counts)).mean(2)
    before = [images.new_empty(0)]
    everyone = torch.arange(len(images), device=images.device)
    for one in everyone.split(batch_size) if len(images) else ():
        before.append(score(images[one], one))
    known = maps.flatten(1).isfinite().all(1)[:, None]
    most, least = torch.where(known, after - torch.cat(before)[:, None], math.nan).unbind(1)
    return ROADScores(most, least, (least - most) / 2)


@torch.no_grad()
def imputed(images: Tensor, removed: Tensor, *, noise: float = 0.01, seed: int = 0) -> Tensor:
    """Pictures whose removed pixels are weighted means of their neighbours, known or removed.

    With weights w of 1/6 for the four nearest neighbours and 1/12 for the four at the corners,
    those outside of the picture left out, the values of removed pixels i solve, per channel::

        sum_j w_ij x_i = sum_j w_ij x_j

    by conjugate gradients, all pictures of the batch at once. Where nothing is known, all of a
    picture being removed, it becomes 0. Gaussian noise is added to removed pixels.

    Args:
        images: (B, C, H, W), floating-point.
        removed: (B, H, W) bool.
        noise: its standard deviation, in units of the picture's values; 0 for none.
        seed: of a generator of its own; all pictures get the same noise, on any device.

    Returns:
        (B, C, H, W) in the dtype of the images; known pixels are as they were.

    Raises:
        ValueError: another shape or dtype, a negative noise. RuntimeError: the solve did not end.

    Source: Rong et al., as :func:`road`, section 4.2; weights of their code.
    """
    expected = (len(images), *images.shape[2:])
    if removed.dtype != torch.bool or tuple(removed.shape) != expected:
        raise ValueError(
            f"removed: expected bool {expected}, got {removed.dtype} {tuple(removed.shape)}"
        )
    check_road(PERCENTILES, noise)
    if not images.numel():
        return images.clone()
    wide = images if images.dtype == torch.float64 else images.float()
    many = max(1, _ELEMENTS_ON_CPU // images[0].numel()) if images.device.type == "cpu" else 64
    values = torch.cat(
        [
            _solved(part, gone[:, None].to(wide.dtype))
            for part, gone in zip(wide.split(many), removed.split(many), strict=True)
        ]
    )
    if noise > 0:
        generator = torch.Generator().manual_seed(seed)
        grain = torch.randn(images.shape[1:], generator=generator, dtype=torch.float64)
        values += noise * grain.to(values)
    return torch.where(removed[:, None], values.to(images.dtype), images)


def check_road(percentiles: Sequence[float], noise: float) -> None:
    """Raise ValueError unless these can be options of :func:`road`."""
    if not percentiles or not all(0 < q < 100 for q in percentiles):
        raise ValueError(f"percentiles: expected some, each in (0, 100), got {percentiles}")
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise: expected a standard deviation, at least 0, got {noise}")


def _weighted(values: Tensor) -> Tensor:
    """12 sum_j w_ij x_j + 4 x_i of each pixel, by [1 2 1] x [1 2 1]: what the centre adds stands on
    both sides of the system."""
    found = values
    for axis in (2, 3):
        inner = found.shape[axis] - 1
        line = 2 * found
        line.narrow(axis, 1, inner).add_(found.narrow(axis, 0, inner))
        line.narrow(axis, 0, inner).add_(found.narrow(axis, 1, inner))
        found = line
    return found


def _solved(images: Tensor, removed: Tensor) -> Tensor:
    """Values everywhere, of which those of removed pixels (B, 1, H, W), 1 or 0, are meant."""
    known = 1 - removed
    degree = _weighted(torch.ones_like(removed[:1])) * removed
    count = known.sum((2, 3), keepdim=True)
    # Solved as the difference to the mean of the known ones, which rounds less.
    mean = (images * known).sum((2, 3), keepdim=True) / count.clamp(min=1)
    residual = removed * _weighted(known * (images - mean))
    scale = residual.abs().amax((2, 3), keepdim=True)  # so that no square leaves the range
    residual = residual / torch.where(scale > 0, scale, 1.0)
    found, direction = torch.zeros_like(images), residual.clone()
    square = (residual * residual).sum((2, 3), keepdim=True)
    limit = square * (1e-6 if images.dtype == torch.float32 else 1e-12) ** 2
    for step in range(40 * (images.shape[2] + images.shape[3])):
        active = square > limit  # a channel that is done is left alone: others do not change it
        if step % 8 == 0 and not bool(active.any()):  # each look waits for the GPU
            return mean + found * scale
        image = degree * direction - removed * _weighted(direction)
        energy = (direction * image).sum((2, 3), keepdim=True)
        length = torch.where(active, square / energy, 0.0)
        found.addcmul_(length, direction)
        residual.addcmul_(length, image, value=-1)
        before, square = square, (residual * residual).sum((2, 3), keepdim=True)
        square = torch.where(active, square, before)
        direction = direction.mul_(torch.where(active, square / before, 0.0)).add_(residual)
    raise RuntimeError("removed: the values of removed pixels did not converge")
