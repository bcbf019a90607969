"""``map_statistics``: entropy alone, and entropy, area and dispersion, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import camkernels as ck
from benchmarks import eager
from benchmarks.harness import Benchmark, Case, Options
from benchmarks.members import _inputs

SHAPES = ((20, 6, 6), (64, 28, 28), (64, 224, 224))


def _ours(names: tuple[str, ...]) -> Callable[[Tensor], Sequence[Tensor]]:
    def function(maps: Tensor) -> Sequence[Tensor]:
        statistics = ck.map_statistics(maps)
        return [getattr(statistics, name) for name in names]

    return function


def _careful(names: tuple[str, ...]) -> Callable[[Tensor], Sequence[Tensor]]:
    def function(maps: Tensor) -> Sequence[Tensor]:
        return [getattr(eager, name)(maps.float()) for name in names]

    return function


def _maps(shape: tuple[int, int, int], options: Options) -> Sequence[Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    maps = torch.rand(shape, generator=generator) + 0.05
    return (maps.to(options.device, options.torch_dtype).requires_grad_(),)


def cases(options: Options) -> list[Case]:
    out = []
    for shape in ((2, 6, 6),) if options.quick else SHAPES:
        pixels = shape[0] * shape[1] * shape[2]
        for names in (("entropy",), ("entropy", "area", "dispersion")):
            out.append(
                Case(
                    name=f"{'+'.join(names)} {'x'.join(map(str, shape))}",
                    build=_inputs.op_sides(
                        _ours(names),
                        _careful(names),
                        lambda s=shape: _maps(s, options),  # type: ignore[misc]
                    ),
                    # forward reads the maps, backward reads them again and writes a cotangent
                    ideal_bytes=3 * pixels * options.torch_dtype.itemsize,
                    facts={"shape": list(shape), "statistics": list(names)},
                )
            )
    return out


BENCHMARK = Benchmark(
    name="map_statistics",
    about="statistics of maps (B, h, w), forward and backward",
    cases=cases,
    baseline="eager",
    caveats=("ours computes all seven statistics, the others those named in the case",),
)
