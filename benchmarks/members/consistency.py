"""``warped_ssim``: CAM consistency from two low-resolution maps, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import camkernels as ck
from benchmarks import eager
from benchmarks.harness import Benchmark, Case, Options
from benchmarks.members import _inputs

SHAPES = ((64, 7, 224), (64, 14, 224), (16, 28, 224))
Function = Callable[..., Sequence[Tensor]]


def _maps(shape: tuple[int, int, int], options: Options) -> Sequence[Tensor]:
    batch, side, _ = shape
    generator = torch.Generator().manual_seed(sum(shape))
    found = (torch.rand(batch, side, side, generator=generator) for _ in range(2))
    return tuple(m.to(options.device, options.torch_dtype).requires_grad_() for m in found)


def _functions(shape: tuple[int, int, int], options: Options) -> tuple[Function, Function]:
    batch, _, size = shape
    draw = ck.RandomResizedCropFlip(seed=1)
    boxes, flips = draw(batch, size, size).to(torch.device(options.device))

    def ours(maps: Tensor, others: Tensor) -> Sequence[Tensor]:
        return (ck.warped_ssim(maps, others, boxes, flips, (size, size)),)

    def careful(maps: Tensor, others: Tensor) -> Sequence[Tensor]:
        return (eager.consistency(maps, others, boxes, flips, (size, size)),)

    return ours, careful


def cases(options: Options) -> list[Case]:
    return [
        Case(
            name=f"{shape[0]}x{shape[1]}x{shape[1]} to {shape[2]}",
            build=_inputs.op_sides(
                *_functions(shape, options),
                lambda s=shape: _maps(s, options),  # type: ignore[misc]
            ),
            # forward reads both maps, backward reads them again and writes both cotangents
            ideal_bytes=6 * shape[0] * shape[1] ** 2 * options.torch_dtype.itemsize,
            facts={"shape": list(shape)},
        )
        for shape in (((2, 7, 32),) if options.quick else SHAPES)
    ]


BENCHMARK = Benchmark(
    name="consistency",
    about="1 - SSIM(t(Phi(x)), Phi(t(x))) from maps, crops and flips, forward and backward",
    cases=cases,
    baseline="eager",
    seconds=10.0,
    caveats=(
        "eager: F.interpolate, one grid_sample for all crops, pytorch-msssim's formula with five "
        "means in one convolution each way",
    ),
)
