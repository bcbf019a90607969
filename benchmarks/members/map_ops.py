"""``ssim``, ``lp_norm`` and ``min_max_normalize``, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import camkernels as ck
from benchmarks import eager
from benchmarks.harness import Benchmark, Case, Options
from benchmarks.members import _inputs

Function = Callable[..., Sequence[Tensor]]


def _ssim(x: Tensor, y: Tensor) -> Sequence[Tensor]:
    return (ck.ssim(x, y),)


def _careful_ssim(x: Tensor, y: Tensor) -> Sequence[Tensor]:
    b, c, h, w = x.shape
    planes = (t.float().reshape(b * c, 1, h, w) for t in (x, y))
    return (eager.ssim(*planes).view(b, c).mean(1),)


def _norm(maps: Tensor) -> Sequence[Tensor]:
    return (ck.lp_norm(maps, 2.0),)


def _careful_norm(maps: Tensor) -> Sequence[Tensor]:
    return (torch.linalg.vector_norm(maps.float().flatten(1), 2.0, 1),)


def _enlarged_norm(maps: Tensor) -> Sequence[Tensor]:
    return (ck.lp_norm(maps, 1.0, size=(224, 224)),)


def _careful_enlarged_norm(maps: Tensor) -> Sequence[Tensor]:
    large = torch.nn.functional.interpolate(
        maps.float()[:, None], (224, 224), mode="bilinear", align_corners=False
    )
    return (large.abs().flatten(1).sum(1),)


def _min_max(maps: Tensor) -> Sequence[Tensor]:
    return (ck.min_max_normalize(maps),)


def _careful_min_max(maps: Tensor) -> Sequence[Tensor]:
    wide = maps.float()
    low, high = wide.amin((1, 2), True), wide.amax((1, 2), True)
    return ((wide - low) / (high - low),)


# Name: ours, eager, inputs, shapes, and full-size tensors read and written.
OPS: dict[str, tuple[Function, Function, int, tuple[tuple[int, ...], ...], int]] = {
    # forward reads both; backward reads both again and writes both cotangents
    "ssim": (_ssim, _careful_ssim, 2, ((64, 1, 224, 224), (8, 3, 224, 224)), 6),
    # forward reads; backward reads again and writes
    "lp_norm": (_norm, _careful_norm, 1, ((64, 14, 14), (64, 224, 224)), 3),
    "lp_norm to 224": (_enlarged_norm, _careful_enlarged_norm, 1, ((64, 7, 7), (64, 14, 14)), 3),
    # forward reads and writes (a map stays in a cache for its second reading); backward reads the
    # map and the cotangent, and writes
    "min_max": (_min_max, _careful_min_max, 1, ((64, 14, 14), (64, 224, 224)), 5),
}


def _quick(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (2, *(min(side, 20) for side in shape[1:]))


def _values(shape: tuple[int, ...], count: int, options: Options) -> Sequence[Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    found = (torch.rand(shape, generator=generator) for _ in range(count))
    return tuple(t.to(options.device, options.torch_dtype).requires_grad_() for t in found)


def _case(op: str, shape: tuple[int, ...], options: Options) -> Case:
    ours, careful, count, _, full = OPS[op]
    elements = torch.Size(shape).numel()
    return Case(
        name=f"{op} {'x'.join(map(str, shape))}",
        build=_inputs.op_sides(ours, careful, lambda: _values(shape, count, options)),
        ideal_bytes=full * elements * options.torch_dtype.itemsize,
        facts={"op": op, "shape": list(shape)},
    )


def cases(options: Options) -> list[Case]:
    out = []
    for op, (_, _, _, shapes, _) in OPS.items():
        for shape in shapes[:1] if options.quick else shapes:
            out.append(_case(op, _quick(shape) if options.quick else shape, options))
    return out


BENCHMARK = Benchmark(
    name="map_ops",
    about="ssim, norms and scaling of maps to [0, 1], forward and backward",
    cases=cases,
    baseline="eager",
    seconds=3.0,
    caveats=("eager ssim: pytorch-msssim's formula with five means in one convolution each way",),
)
