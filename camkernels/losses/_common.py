"""What the criteria share."""

from __future__ import annotations

import torch
from torch import Tensor


def reduce(values: Tensor, counted: Tensor, reduction: str) -> Tensor:
    """Per-sample values by a reduction, those not counted as 0 and out of the mean."""
    kept = torch.where(counted, values, 0.0)
    if reduction == "none":
        return kept
    total = kept.sum()
    return total if reduction == "sum" else total / counted.sum().clamp(min=1)


def loss_of(cross_entropy: Tensor, regularizer: Tensor | None) -> Tensor:
    """A loss of its parts; the cross-entropy to the bit where there is no other."""
    return cross_entropy if regularizer is None else cross_entropy + regularizer


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
