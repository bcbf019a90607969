"""What a model thinks of a picture of which the map leaves a part only."""

from __future__ import annotations

import torch
from torch import Tensor

from camkernels.consistency import min_max_normalize
from camkernels.metrics.curves import Score, filled
from camkernels.metrics.regions import enlarged

GAINS = ("headroom", "relative")


def masked(images: Tensor, maps: Tensor, background: Tensor | float = 0.0) -> Tensor:
    """x M + background (1 - M), M the map scaled to [0, 1] and enlarged to the picture.

    Args:
        images: (B, C, H, W), as the model takes them.
        maps: (B, h, w).
        background: a number, or (C,) per channel. 0 multiplies the normalised picture; minus mean
            by standard deviation, what black is there, multiplies the picture before that.

    Returns:
        (B, C, H, W) in the dtype of the images.

    Raises:
        ValueError: maps of another number or shape, a background of another number of channels.
    """
    if len(maps) != len(images):
        raise ValueError(f"maps: expected one per image, {len(images)}, got {tuple(maps.shape)}")
    shares = enlarged(min_max_normalize(maps), (images.shape[2], images.shape[3]))
    shares = shares[:, None].to(images.dtype)
    return images * shares + filled(images, background) * (1 - shares)


@torch.no_grad()
def confidence_change(
    score: Score, images: Tensor, maps: Tensor, *, background: Tensor | float = 0.0
) -> tuple[Tensor, Tensor]:
    """Scores (B,) of the pictures, and of the same :func:`masked` by their maps."""
    owner = torch.arange(len(images), device=images.device)
    return score(images, owner), score(masked(images, maps, background), owner)


def drop(before: Tensor, after: Tensor) -> Tensor:
    """relu(p - o) / p in percent, (B,); its mean is the average drop. 0 where p is 0.

    Source: Chattopadhay et al., Grad-CAM++, section 4.1.1.
    """
    return 100 * _ratio((before - after).clamp(min=0), before)


def increase(before: Tensor, after: Tensor) -> Tensor:
    """100 where p < o, else 0, (B,); its mean is the average increase.

    Source: Chattopadhay et al., Grad-CAM++, section 4.1.2.
    """
    return 100 * (before < after).to(before.dtype)


def gain(before: Tensor, after: Tensor, convention: str = "headroom") -> Tensor:
    """relu(o - p) in percent of what was left to gain, 1 - p (``"headroom"``: Zhang et al.,
    Opti-CAM, section 4.2), or of p (``"relative"``: the interpretable-gradients paper), (B,)."""
    if convention not in GAINS:
        raise ValueError(f"gain: expected one of {', '.join(GAINS)}, got {convention!r}")
    below = 1 - before if convention == "headroom" else before
    return 100 * _ratio((after - before).clamp(min=0), below)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    some = below > 0
    return torch.where(some, above / torch.where(some, below, 1.0), 0.0)


@torch.no_grad()
def removal_change(
    score: Score,
    images: Tensor,
    maps: Tensor,
    *,
    share: float = 0.25,
    background: Tensor | float = 0.0,
) -> Tensor:
    """Score without the ``share`` of pixels that the map ranks highest, less that with them, (B,).

    Pixels below the percentile stay, the others become ``background``: the less, the better.

    Args:
        score: pictures (N, C, H, W) and whose they are (N,) -> scores (N,), as
            :func:`camkernels.metrics.class_score` makes it.
        images: (B, C, H, W), as the model takes them.
        maps: (B, h, w).
        share: in (0, 1), of the pixels.
        background: a number, or (C,) per channel.

    Raises:
        ValueError: a share outside (0, 1), maps or a background of another shape.

    Source: Evaluating CAM, Grad-CAM and Grad-CAM++, Method 1 (top 25 %).
    """
    if not 0 < share < 1:
        raise ValueError(f"share: expected between 0 and 1, got {share}")
    large = enlarged(maps, (images.shape[2], images.shape[3]))
    owner = torch.arange(len(images), device=images.device)
    if not large.numel():
        return score(images, owner)
    flat = large.flatten(1)
    few = max(1, 2**23 // flat.shape[1])  # torch.quantile takes 2^24 elements at most
    limit = torch.cat([rows.quantile(1 - share, dim=1) for rows in flat.split(few)])[:, None, None]
    kept = torch.where((large < limit)[:, None], images, filled(images, background))
    return score(kept, owner) - score(images, owner)
