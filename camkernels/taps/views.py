"""Random views of a batch: which crop and flip each sample gets, drawn on the CPU by a generator of
its own, so that the user's random state is not touched."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class View(NamedTuple):
    """Parameters of a crop, resize and flip of each sample."""

    boxes: Tensor
    """(B, 4) int64: top, left, height, width in pixels of the images."""
    flips: Tensor
    """(B,) bool: mirrored left to right."""

    def to(self, device: torch.device) -> View:
        """On a device."""
        return View(*(t.to(device, non_blocking=True) for t in self))


Draw = Callable[[int, int, int], tuple[Tensor, Tensor]]
"""(batch, height, width) -> boxes, flips."""
_ATTEMPTS = 10


@dataclasses.dataclass
class RandomResizedCropFlip:
    """RandomResizedCrop and RandomHorizontalFlip as torchvision draws them, for a whole batch.

    Args:
        scale: smallest and largest share of the picture's area.
        ratio: smallest and largest width / height of the crop.
        flip: probability of a mirrored sample.
        seed: of its generator; None: ``torch.initial_seed()``, and the rank of the process added.

    Raises:
        ValueError: bounds that are not positive or in the wrong order, a probability outside
        [0, 1].
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if not (0 < low <= high and math.isfinite(high)):
                raise ValueError(f"{name}: expected 0 < lowest <= highest, got {(low, high)}")
        if self.scale[1] > 1:
            raise ValueError(f"scale: a crop has at most the whole area, got {self.scale}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip: expected a probability, got {self.flip}")
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        seed = torch.initial_seed() + rank if self.seed is None else self.seed
        self.generator = torch.Generator().manual_seed(seed % (1 << 63))

    def __call__(self, batch: int, height: int, width: int) -> View:
        """Draw one view for each of ``batch`` pictures of height x width."""

        def uniform(low: float, high: float) -> Tensor:
            drawn = torch.rand(_ATTEMPTS, batch, dtype=torch.float64, generator=self.generator)
            return low + (high - low) * drawn

        area = height * width * uniform(*self.scale)
        ratio = uniform(math.log(self.ratio[0]), math.log(self.ratio[1])).exp()
        places = uniform(0, 1), uniform(0, 1)
        flips = torch.rand(batch, generator=self.generator) < self.flip
        w, h = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        first = fits.to(torch.int8).argmax(0, keepdim=True)  # the first attempt that fits
        h, w = (t.gather(0, first)[0] for t in (h, w))
        top = (places[0].gather(0, first)[0] * (height - h + 1)).floor().long()
        left = (places[1].gather(0, first)[0] * (width - w + 1)).floor().long()
        boxes = torch.stack([top, left, h, w], 1)
        whole = torch.tensor(self._central(height, width))
        return View(torch.where(fits.any(0)[:, None], boxes, whole), flips)

    def _central(self, height: int, width: int) -> list[int]:
        """What torchvision falls back to."""
        h, w = height, width
        if width / height < self.ratio[0]:
            h = min(height, max(1, round(width / self.ratio[0])))
        elif width / height > self.ratio[1]:
            w = min(width, max(1, round(height * self.ratio[1])))
        return [(height - h) // 2, (width - w) // 2, h, w]
