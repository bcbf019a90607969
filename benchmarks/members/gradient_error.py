"""``gradient_error``: from both input gradients to the error per sample, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import camkernels as ck
from benchmarks import eager
from benchmarks.harness import Benchmark, Case, Options, Side
from benchmarks.members import _inputs, _layers

ERRORS = ("sigmoid", "centered_sigmoid", "cosine", "histogram", "histogram_paper")
IMAGES = (
    ((64, 3, 224, 224), "nchw"),
    ((64, 3, 224, 224), "channels_last"),
    ((8, 3, 192, 192), "nchw"),
    ((8, 3, 32, 32), "nchw"),
)


def _pair(shape: _layers.Shape, layout: str, options: Options) -> tuple[Tensor, Tensor]:
    """delta, a leaf, and delta_G. |delta| is twice or half of |delta_G|: a minimum of the two may
    not fall to the other by rounding."""
    guided = _layers.signed(shape, layout, options, 0)
    factors = _layers.signed(shape, layout, options, 1)
    gradients = torch.where(factors > 0, 2 * guided, -guided / 2)
    return _layers.place(gradients, layout, options).requires_grad_(), guided


def _case(error: str, shape: _layers.Shape, layout: str, options: Options) -> Case:
    def build() -> dict[str, Callable[[], Side]]:
        gradients, guided = _pair(shape, layout, options)

        def ours(values: Tensor) -> Sequence[Tensor]:
            return (ck.gradient_error(values, guided, error),)

        def careful(values: Tensor) -> Sequence[Tensor]:
            wide = values.float() if values.itemsize < 4 else values
            return (eager.gradient_error(wide, guided.to(wide.dtype), error),)

        return _inputs.op_sides(ours, careful, lambda: (gradients,))()

    b, c, h, w = shape
    return Case(
        name=f"{error} {_layers.text(shape, layout)}",
        build=build,
        # forward reads both, backward reads both again and writes the cotangent of delta
        ideal_bytes=5 * b * c * h * w * options.torch_dtype.itemsize,
        facts={"shape": list(shape), "layout": layout, "error": error},
    )


def cases(options: Options) -> list[Case]:
    images = (((2, 3, 6, 5), "nchw"), ((2, 3, 6, 5), "channels_last")) if options.quick else IMAGES
    return [_case(error, shape, layout, options) for shape, layout in images for error in ERRORS]


BENCHMARK = Benchmark(
    name="gradient_error",
    about="error between input gradients and guided ones, forward and backward to the former",
    cases=cases,
    baseline="eager",
    seconds=2.0,
)
