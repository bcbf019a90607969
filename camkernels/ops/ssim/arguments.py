"""What the GPU kernels are given of a window."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


@functools.cache
def _on_device(weights: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(weights, dtype=torch.float32, device=device)


def weights_on(rows: Sequence[float], columns: Sequence[float], device: torch.device) -> Tensor:
    """Weights of both axes. Kept, since a copy to the GPU waits for it: some hundred bytes."""
    return _on_device((*rows, *columns), device)


def window_arguments(
    size: Sequence[int], rows: Sequence[float], columns: Sequence[float], same: bool
) -> tuple[tuple[int, int], tuple[int, ...]]:
    """How many windows down and across; lengths and paddings of the window."""
    lengths = len(rows), len(columns)
    pads = (lengths[0] // 2, lengths[1] // 2) if same else (0, 0)
    down, across = (s + 2 * p - k + 1 for s, p, k in zip(size, pads, lengths, strict=True))
    return (down, across), (*lengths, *pads)
