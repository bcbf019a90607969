"""``relu``: forward, backward, guided backward and double backward, each on its own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from benchmarks import loops
from benchmarks.harness import Benchmark, Case, Options, Side
from benchmarks.members import _layers
from camkernels import modes
from camkernels.nn import functional as F

KINDS = ("forward", "backward", "guided", "double backward")
Function = Callable[[Tensor], Tensor]
Mode = Callable[[], AbstractContextManager[Any]]


def _eager(guided: bool) -> Function:
    if not guided:
        return lambda u: u.relu()
    rule = loops.Rule()
    rule.guided = True
    return lambda u: loops.SwitchedReLUFunction.apply(u, False, rule)  # type: ignore[no-any-return]


def _side(kind: str, function: Function, mode: Mode, u: Tensor, g: Tensor, h: Tensor) -> Side:
    if kind == "forward":
        return _layers.forward_side(function, (u,))
    if kind == "double backward":
        return _layers.double_backward_side(function, (u,), g, (), (h,), (u,))
    return _layers.backward_side(function, (u,), g, mode)


def _case(kind: str, save: str, shape: _layers.Shape, layout: str, options: Options) -> Case:
    def build() -> dict[str, Callable[[], Side]]:
        u, g, h = (_layers.signed(shape, layout, options, seed) for seed in range(3))
        u.requires_grad_()
        guided = kind == "guided"
        return {
            "eager": lambda: _side(kind, _eager(guided), nullcontext, u, g, h),
            "ours": lambda: _side(
                kind,
                lambda u: F.relu(u, save=save),
                modes.guided if guided else nullcontext,
                u,
                g,
                h,
            ),
        }

    n, c, height, width = shape
    full = n * c * height * width * options.torch_dtype.itemsize
    mask = (n * c * height * width + 7) // 8
    # forward reads u, writes v; backwards read a gradient and what was kept, write a gradient
    kept = mask if save == "mask" else full if kind != "forward" else 0
    return Case(
        name=f"{kind} save={save} {_layers.text(shape, layout)}",
        build=build,
        ideal_bytes=2 * full + kept,
        facts={"shape": list(shape), "layout": layout, "kind": kind, "save": save},
    )


def cases(options: Options) -> list[Case]:
    shapes = _layers.shapes(options)
    out = [
        _case(kind, "mask", shape, layout, options)
        for shape in shapes
        for layout in _layers.LAYOUTS
        for kind in KINDS
    ]
    return out + [_case(kind, "output", shapes[0], "nchw", options) for kind in KINDS]


BENCHMARK = Benchmark(
    name="relu",
    about="ReLU with a guided backward: forward, backward, guided and double backward alone",
    cases=cases,
    baseline="eager",
    seconds=2.0,
    caveats=(
        "eager: torch.relu; guided: clamp and threshold_backward in an autograd.Function",
        "save=mask keeps one bit per element for the backward, save=output the output, as eager",
    ),
)
