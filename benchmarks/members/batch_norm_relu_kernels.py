"""The six kernels of ``batch_norm_relu``, each called alone, against a copy of the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Benchmark, Case, Options, Side
from benchmarks.members import _layers
from camkernels import backends
from camkernels.ops._chain import implementation
from camkernels.ops.batch_norm_relu import reference


@dataclass(frozen=True)
class Kernel:
    """``full``: full-size tensors read and written; one more each, and a mask, with a residual."""

    name: str
    full: int
    residual: bool

    @property
    def label(self) -> str:
        return self.name + (" residual" if self.residual else "")


KERNELS = (
    Kernel("bn_stats", 1, False),  # z
    Kernel("bn_fwd", 2, False),  # z, a
    Kernel("bn_fwd", 3, True),
    Kernel("bn_bwd_reduce", 2, False),  # g, z
    Kernel("bn_bwd_reduce", 2, True),
    Kernel("bn_bwd", 3, False),  # g, z, g_z
    Kernel("bn_bwd", 4, True),
    Kernel("bn_bwd_bwd_reduce", 3, False),  # h, g', z
    Kernel("bn_bwd_bwd", 5, False),  # h, g', z, and both cotangents
    Kernel("bn_bwd_bwd", 6, True),
)


def _arguments(
    kernel: Kernel, shape: _layers.Shape, layout: str, options: Options
) -> Sequence[Any]:
    z = _layers.signed(shape, layout, options, 0)
    gamma = _layers.channels(shape, 0.5, 1.5, options, 1)
    beta = _layers.channels(shape, -0.1, 0.1, options, 2)
    residual = z * 0.7 if kernel.residual else None  # the sign of u is certain
    mean, squares = reference.bn_stats(z)
    count = z.numel() // z.shape[1]
    rstd = (squares / count + 1e-5).rsqrt()
    if kernel.name == "bn_stats":
        return (z,)
    if kernel.name == "bn_fwd":
        return z, mean, rstd, gamma, beta, residual, True, kernel.residual
    other, third, fourth = (_layers.signed(shape, layout, options, s, 0.3) for s in (3, 4, 5))
    if kernel.name == "bn_bwd_bwd_reduce":
        return other, third, z, mean, rstd
    mask = reference.pack_mask(z > 0) if kernel.residual else None
    saved = (z, mean, rstd, gamma, beta, mask)
    if kernel.name == "bn_bwd_reduce":
        return other, *saved, True, False
    sums = torch.stack([_layers.channels(shape, -1, 1, options, s) for s in (6, 7)]) * count
    if kernel.name == "bn_bwd":
        return other, *saved, sums, 1 / count, True, False, True, None, kernel.residual
    h_sums = torch.stack([_layers.channels(shape, -1, 1, options, s) for s in (8, 9, 10)]) * count
    h_residual = fourth if kernel.residual else None
    return (
        other, h_residual, third, *saved, sums, h_sums, 1 / count, None, None, True, False
    )  # fmt: skip


def _case(kernel: Kernel, shape: _layers.Shape, layout: str, options: Options) -> Case:
    def build() -> dict[str, Callable[[], Side]]:
        arguments = _arguments(kernel, shape, layout, options)

        def factory(backend: str) -> Side:
            function = implementation("batch_norm_relu", kernel.name, backend)

            def run() -> Sequence[Tensor]:
                outputs = function(*arguments)
                return outputs if isinstance(outputs, tuple) else (outputs,)

            return Side(run)

        ours = backends.resolve(torch.device(options.device), options.torch_dtype)
        return {"reference": lambda: factory("reference"), "ours": lambda: factory(ours)}

    n, c, h, w = shape
    mask = _layers.mask_bytes(shape, layout) if kernel.residual else 0
    return Case(
        name=f"{kernel.label} {_layers.text(shape, layout)}",
        build=build,
        ideal_bytes=kernel.full * n * c * h * w * options.torch_dtype.itemsize + mask,
        facts={
            "shape": list(shape),
            "layout": layout,
            "kernel": kernel.name,
            "residual": kernel.residual,
        },
    )


def cases(options: Options) -> list[Case]:
    return [
        _case(kernel, shape, layout, options)
        for shape in _layers.shapes(options)
        for layout in _layers.LAYOUTS
        for kernel in KERNELS
    ]


BENCHMARK = Benchmark(
    name="batch_norm_relu_kernels",
    about="the kernels of batch_norm_relu, called directly",
    cases=cases,
    baseline="reference",
    seconds=1.5,
    measures_memory=False,
    caveats=(
        "reference: the formula in plain PyTorch, not written for speed",
        "kernels of sums only read; the copy of the same bytes reads one half and writes the other",
    ),
)
