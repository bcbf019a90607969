"""The order of samples as a function of seed and epoch alone, so that a resumed run repeats it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler


class Draw(NamedTuple):
    """Which sample, and in which epoch: what a data set draws at random hangs on both."""

    epoch: int
    index: int


def generator(*key: int) -> np.random.Generator:
    """A generator that depends on nothing but ``key``."""
    return np.random.default_rng(np.random.SeedSequence(key))


class EpochSampler(Sampler[Draw]):
    """Draws of one epoch, shuffled by (seed, epoch); Lightning calls :meth:`set_epoch`.

    The draws carry the epoch, so that worker processes that outlive an epoch see it too. With
    several processes each takes every ``replicas``-th draw, padded from the start so that all have
    equally many.
    """

    def __init__(
        self, length: int, seed: int, *, shuffle: bool, replicas: int = 1, rank: int = 0
    ) -> None:
        self.length = length
        self.seed = seed
        self.shuffle = shuffle
        self.replicas = replicas
        self.rank = rank
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch of the next iteration."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Draw]:
        if self.shuffle:
            order = generator(self.seed, 1, self.epoch).permutation(self.length)
        else:
            order = np.arange(self.length)
        order = np.resize(order, len(self) * self.replicas)
        epoch = self.epoch if self.shuffle else 0
        return iter([Draw(epoch, int(i)) for i in order[self.rank :: self.replicas]])

    def __len__(self) -> int:
        return -(-self.length // self.replicas)
