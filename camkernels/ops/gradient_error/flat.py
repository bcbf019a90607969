"""Both sides as rows (B, n) of one order of memory, which the kernels read.

No error depends on the order of the entries of a sample, as long as both sides have the same.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _sample_is_dense(tensor: Tensor) -> bool:
    expected = 1
    for size, stride in sorted(
        zip(tensor.shape[1:], tensor.stride()[1:], strict=True), key=lambda pair: pair[1]
    ):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def _lies_as(tensor: Tensor, other: Tensor) -> bool:
    pairs = zip(tensor.shape[1:], tensor.stride()[1:], other.stride()[1:], strict=True)
    return all(size == 1 or one == another for size, one, another in pairs)


def like_samples_of(delta: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty tensor of the shape of delta, its samples side by side and each in the order of
    those of delta; contiguous where they are not dense."""
    if not _sample_is_dense(delta):
        return torch.empty(delta.shape, dtype=dtype, device=delta.device)
    strides = (delta.shape[1:].numel(), *delta.stride()[1:])
    return torch.empty_strided(delta.shape, strides, dtype=dtype, device=delta.device)


def in_one_order(delta: Tensor, guided: Tensor) -> tuple[Tensor, Tensor]:
    """The two, each sample dense and both in the same order; a copy only of what is not."""
    if delta.is_neg() or not _sample_is_dense(delta):
        delta = like_samples_of(delta, delta.dtype).copy_(delta)
    if guided.is_neg() or not _lies_as(guided, delta):
        guided = like_samples_of(delta, guided.dtype).copy_(guided)
    return delta, guided
