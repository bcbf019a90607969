"""Paired timings: the sides take turns in one process, ratios are taken within a round.

A shared machine drifts by tens of per cent within seconds, so a ratio of two medians is worth
little; the median of ratios of neighbouring runs is stable. The order of the sides is reversed in
every other round, so that no side always runs behind the same other.
"""

from __future__ import annotations

import gc
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

QUANTILES = (0.2, 0.5, 0.8)
SETTLED_FAULTS = 64
"""Page faults of a run below which the allocator counts as warm."""


@dataclass
class Sample:
    seconds: float
    host_seconds: float
    faults: int


class Timer(Protocol):
    def __call__(self, step: Callable[[], Any]) -> Sample: ...


def host_timer(step: Callable[[], Any]) -> Sample:
    """Wall time on the host; the result is dropped inside, as a training loop drops it."""
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    start = time.perf_counter()
    step()
    elapsed = time.perf_counter() - start
    return Sample(elapsed, elapsed, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)


class CudaTimer:
    """Device time between two events, and the time the host needed to queue the step.

    The second-level cache is overwritten before each run: a training step never finds its
    activations there. Where the host is the slower of the two, device time contains its gaps.
    """

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties("cuda").L2_cache_size
        self.flush = torch.empty(2 * max(cache, 1 << 24), dtype=torch.uint8, device="cuda")

    def __call__(self, step: Callable[[], Any]) -> Sample:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        torch.cuda.synchronize()
        begun = time.perf_counter()
        start.record()
        step()
        end.record()
        host = time.perf_counter() - begun
        torch.cuda.synchronize()
        return Sample(start.elapsed_time(end) / 1000, host, 0)


@dataclass
class Timings:
    """Seconds per side and round; ``rounds[name][i]`` of all names belong together."""

    rounds: dict[str, list[float]] = field(default_factory=dict)
    host: dict[str, list[float]] = field(default_factory=dict)
    faults: dict[str, list[int]] = field(default_factory=dict)
    warm_up_rounds: int = 0

    def ratio(self, name: str, against: str) -> dict[str, float]:
        """Quantiles of the ratio of neighbouring runs."""
        pairs = zip(self.rounds[name], self.rounds[against], strict=True)
        return quantiles([a / b for a, b in pairs])


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Quantiles 0.2, 0.5 and 0.8, linear between neighbours, as {"q20": ...}."""
    ordered = sorted(values)
    out = {}
    for q in QUANTILES:
        position = q * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        value = ordered[low] + (position - low) * (ordered[high] - ordered[low])
        out[f"q{round(100 * q)}"] = value
    return out


def _turn(names: list[str], index: int) -> list[str]:
    return names if index % 2 == 0 else names[::-1]


def measure(
    steps: Mapping[str, Callable[[], Any]],
    timer: Timer,
    seconds: float,
    rounds: tuple[int, int] = (5, 101),
    clock: Callable[[], float] = time.perf_counter,
) -> Timings:
    """Warm up, then time all steps in turn for ``seconds``, at least and at most ``rounds``.

    Warm-up lasts until no step makes page faults any more (the heap has taken its shape), at
    least two rounds, at most half of ``seconds`` beyond them.
    """
    names, timings = list(steps), Timings()
    begun = clock()
    while True:
        faults = [timer(steps[name]).faults for name in _turn(names, timings.warm_up_rounds)]
        timings.warm_up_rounds += 1
        settled = timings.warm_up_rounds >= 3 and max(faults) < SETTLED_FAULTS
        if settled or (timings.warm_up_rounds >= 2 and clock() - begun > seconds / 2):
            break

    for table in (timings.rounds, timings.host, timings.faults):
        table.update({name: [] for name in names})
    gc.collect()
    gc.disable()  # a collection inside one side's run would be that side's loss
    try:
        begun, count = clock(), 0
        while count < rounds[0] or (count < rounds[1] and clock() - begun < seconds):
            round_begun = clock()
            for name in _turn(names, count):
                sample = timer(steps[name])
                timings.rounds[name].append(sample.seconds)
                timings.host[name].append(sample.host_seconds)
                timings.faults[name].append(sample.faults)
            count += 1
            if clock() - round_begun > 1:
                gc.collect()
    finally:
        gc.enable()
    return timings


def summary(timings: Timings) -> dict[str, dict[str, Any]]:
    """Per side: milliseconds, host milliseconds, page faults, ratio to every other side."""
    out: dict[str, dict[str, Any]] = {}
    for name, values in timings.rounds.items():
        out[name] = {
            "milliseconds": {k: 1e3 * v for k, v in quantiles(values).items()},
            "host_milliseconds": {k: 1e3 * v for k, v in quantiles(timings.host[name]).items()},
            "page_faults_per_run": statistics.median(timings.faults[name]),
            "rounds": len(values),
            "ratio_to": {o: timings.ratio(name, o) for o in timings.rounds if o != name},
        }
    return out
