"""Insertion and deletion: how fast the class comes back as the pixels that a map ranks highest are
revealed, and how fast it goes as they are taken away.

Source: Petsiuk et al., RISE: randomized input sampling for explanation of black-box models,
section 4.2; the blur is that of their code.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from camkernels.explain._run import Logits, logits_of
from camkernels.metrics.regions import enlarged

Score = Callable[[Tensor, Tensor], Tensor]
"""Scores (N,) of pictures (N, 3, H, W), with (N,): which picture of the batch each is made from."""


def blurred(images: Tensor, size: int = 11, sigma: float = 5.0) -> Tensor:
    """Pictures (B, C, H, W) under a Gaussian of ``size`` x ``size``; zeros outside, as in RISE.

    In a normalised picture zero is the mean colour.
    """
    line = torch.arange(size, dtype=images.dtype, device=images.device) - size // 2
    weights = torch.exp(-(line**2) / (2 * sigma**2))
    weights = (weights / weights.sum()).expand(images.shape[1], 1, size)
    channels = images.shape[1]
    down = F.conv2d(images, weights[..., None], padding=(size // 2, 0), groups=channels)
    return F.conv2d(down, weights[:, :, None], padding=(0, size // 2), groups=channels)


def ranks(maps: Tensor) -> Tensor:
    """Place (B, P) of each pixel in descending order; equal values keep their order."""
    order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


@torch.no_grad()
def _curve(
    score: Score, before: Tensor, after: Tensor, maps: Tensor, steps: int, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Scores while the pixels of ``before`` that rank highest become those of ``after``."""
    pixels = before.shape[2] * before.shape[3]
    if not 1 <= steps <= pixels:
        raise ValueError(f"steps: expected 1 to {pixels} for {tuple(before.shape)}, got {steps}")
    if maps.dim() != 3 or len(maps) != len(before):
        raise ValueError(f"maps: expected ({len(before)}, h, w), got {tuple(maps.shape)}")
    size = (before.shape[2], before.shape[3])
    place = ranks(enlarged(maps, size))
    counts = torch.arange(steps + 1, device=before.device) * pixels // steps
    cells = torch.arange(len(before) * (steps + 1), device=before.device)
    scores = [before.new_empty(0)]
    # as the user laid them out: on a CPU networks run faster on channels_last
    nhwc = before.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if nhwc else torch.contiguous_format
    for chunk in cells.split(batch_size):
        owner, step = chunk // (steps + 1), chunk % (steps + 1)
        changed = (place[owner] < counts[step, None]).view(-1, 1, *size)
        pictures = torch.where(changed, after[owner], before[owner])
        scores.append(score(pictures.contiguous(memory_format=layout), owner))
    return counts.double() / pixels, torch.cat(scores).view(len(before), steps + 1)


def insertion_curve(
    score: Score, images: Tensor, maps: Tensor, *, steps: int = 224, batch_size: int = 64
) -> tuple[Tensor, Tensor]:
    """Scores while the pixels of each picture are put into its blurred version.

    At step i of ``steps`` the floor(i P / steps) pixels that rank highest in the map, enlarged
    bilinearly to the picture, are those of the picture and all others are blurred; both ends count,
    so there are ``steps`` + 1 scores.

    Args:
        score: see :data:`Score`; called with at most ``batch_size`` pictures at a time.
        images: (B, 3, H, W), normalised. ``score`` gets channels_last pictures of such.
        maps: (B, h, w).
        steps: at most H W.
        batch_size: pictures per call of ``score``, whichever picture or step they belong to.

    Returns:
        shares (steps + 1,) of pixels revealed, from 0 to 1, and scores (B, steps + 1).

    Raises:
        ValueError: steps below 1 or above H W; maps of another shape, or not floating-point.
    """
    return _curve(score, blurred(images), images, maps, steps, batch_size)


def deletion_curve(
    score: Score,
    images: Tensor,
    maps: Tensor,
    *,
    steps: int = 224,
    batch_size: int = 64,
    background: Tensor | float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Scores while the pixels that rank highest become ``background``, a number or (3,) per
    channel: 0, in a normalised picture the mean colour, as in RISE. All else as
    :func:`insertion_curve`.
    """
    return _curve(score, images, filled(images, background), maps, steps, batch_size)


def filled(images: Tensor, background: Tensor | float) -> Tensor:
    """Pictures like ``images`` of one colour."""
    colour = torch.as_tensor(background, dtype=images.dtype, device=images.device)
    if colour.dim() > 1 or (colour.dim() == 1 and len(colour) != images.shape[1]):
        raise ValueError(
            f"background: expected a number or ({images.shape[1]},), got {tuple(colour.shape)}"
        )
    return (
        colour.view(-1, 1, 1).expand(images.shape) if colour.dim() else colour.expand(images.shape)
    )


def area_under(shares: Tensor, scores: Tensor, maps: Tensor) -> Tensor:
    """Areas (B,) under curves by the trapezoid rule; NaN where the map is not finite."""
    area = torch.trapezoid(scores.double(), shares, dim=1).to(scores.dtype)
    return torch.where(maps.flatten(1).isfinite().all(1), area, math.nan)


def insertion_auc(
    score: Score, images: Tensor, maps: Tensor, *, steps: int = 224, batch_size: int = 64
) -> Tensor:
    """Area (B,) under :func:`insertion_curve` by the trapezoid rule; arguments and errors as there.

    NaN where the map is not finite.
    """
    curve = insertion_curve(score, images, maps, steps=steps, batch_size=batch_size)
    return area_under(*curve, maps)


def deletion_auc(
    score: Score,
    images: Tensor,
    maps: Tensor,
    *,
    steps: int = 224,
    batch_size: int = 64,
    background: Tensor | float = 0.0,
) -> Tensor:
    """Area (B,) under :func:`deletion_curve`; arguments and errors as there. The less, the better.

    NaN where the map is not finite.
    """
    curve = deletion_curve(
        score, images, maps, steps=steps, batch_size=batch_size, background=background
    )
    return area_under(*curve, maps)


def class_score(model: torch.nn.Module, classes: Tensor, logits: Logits | None = None) -> Score:
    """The softmax score of ``classes`` (B,) by ``model``, in the mode that it is in.

    ``logits`` takes the logits (B, C) out of what the model returns, where that is no tensor.
    """

    def score(images: Tensor, owner: Tensor) -> Tensor:
        share = logits_of(model(images), logits).softmax(1)
        return share.gather(1, classes[owner, None])[:, 0]

    return score
