"""``cam_statistics``: activations straight to the entropy of the map, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

import camkernels as ck
from benchmarks import eager
from benchmarks.harness import Benchmark, Case, Options
from benchmarks.members import _inputs


def ours(activations: Tensor, second: Tensor) -> Sequence[Tensor]:
    if second.dim() == 4:
        return (ck.cam_statistics(activations, second).entropy,)
    return (ck.cam_statistics(activations, weights=second).entropy,)


def careful(activations: Tensor, second: Tensor) -> Sequence[Tensor]:
    return (eager.entropy(eager.cam(activations, second)),)


def cases(options: Options) -> list[Case]:
    shapes = _inputs.QUICK_SHAPES if options.quick else _inputs.SHAPES
    return [
        Case(
            name=f"{form} {'x'.join(map(str, shape))} {layout}",
            build=_inputs.op_sides(
                ours,
                careful,
                lambda s=shape, lay=layout, f=form: _inputs.activations_and_second(  # type: ignore[misc]
                    s, lay, f, options
                ),
            ),
            facts={"shape": list(shape), "layout": layout, "form": form},
            **_inputs.cam_traffic(shape, form, options),
        )
        for shape in shapes
        for layout in _inputs.LAYOUTS
        for form in _inputs.FORMS
    ]


BENCHMARK = Benchmark(
    name="cam_statistics",
    about="entropy of relu(sum_k alpha_k A_k), forward and backward to both inputs",
    cases=cases,
    baseline="eager",
    caveats=(
        "ours computes all seven statistics, eager and compile only the entropy they are asked for",
    ),
)
