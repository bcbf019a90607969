"""Maps that say nothing: the trivial solutions of consistency."""

from __future__ import annotations

import torch
from torch import Tensor

# A map whose range is below this share of its largest value is uniform, and so is one that covers
# more than that share of the picture once it is scaled to [0, 1].
_UNIFORM, _COVERED = 1e-2, 0.8


def trivial(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Which maps are all zero, and which are not but say the same nearly everywhere; (B,) bool."""
    values = maps.detach().flatten(1)
    if not values.numel():
        none = torch.zeros(len(values), dtype=torch.bool, device=values.device)
        return none, none
    low, high = values.amin(1), values.amax(1)
    span, largest = high - low, torch.maximum(low.abs(), high.abs())
    dead = largest == 0
    covers = values.mean(1) - low > _COVERED * span
    return dead, ~dead & ((span <= _UNIFORM * largest) | covers)
