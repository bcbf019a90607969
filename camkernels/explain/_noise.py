"""Noisy copies of images, for explainers that average over them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def check_noise(samples: int, noise: float) -> None:
    if samples < 1:
        raise ValueError(f"samples: expected a positive number, got {samples}")
    if not noise >= 0:
        raise ValueError(f"noise: expected a share of the range, at least 0, got {noise}")


def noisy_copies(images: Tensor, samples: int, noise: float, seed: int) -> Iterator[Tensor]:
    """``samples`` copies of images (B, C, H, W) with Gaussian noise, one after another.

    Every image gets the same noise, times ``noise`` and its own range (maximum less minimum), so
    that what is made of it does not depend on the batch it comes in. From a generator of its own on
    the device of the images; added in float32 (float64 for float64).
    """
    generator = torch.Generator(images.device).manual_seed(seed)
    wide = images.dtype if images.dtype == torch.float64 else torch.float32
    values = images.detach().to(wide)
    deviation = torch.zeros(len(values), 1, 1, 1, dtype=wide, device=values.device)
    if values.numel():
        low, high = values.flatten(1).aminmax(dim=1)
        deviation = (noise * (high - low)).view(-1, 1, 1, 1)
    for _ in range(samples):
        one = torch.randn(values.shape[1:], generator=generator, dtype=wide, device=values.device)
        yield (values + deviation * one).to(images.dtype)
