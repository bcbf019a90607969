"""Shapes and memory layouts that the ops share. Decides; computes nothing."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums are kept in float32; float64 stays float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_channels_last(activations: Tensor) -> bool:
    """Whether neighbouring channels of one pixel lie side by side in memory."""
    return bool(
        activations.stride(1) == 1 and activations.shape[1] > 1 and _pixels(activations) > 1
    )


def _pixels(activations: Tensor) -> int:
    return activations.shape[2] * activations.shape[3]


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def placeholder(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Stands for an output that was not asked for (library ops cannot return None)."""
    return like.new_empty(0, dtype=dtype or accumulate_dtype(like.dtype))
