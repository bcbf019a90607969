"""``batch_norm_relu`` in training mode: forward, backward and double backward, each on its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from benchmarks import eager
from benchmarks.harness import Benchmark, Case, Options, Side
from benchmarks.members import _layers
from camkernels.nn import functional as F

KINDS = ("forward", "backward", "double backward")


def ours(z: Tensor, gamma: Tensor, beta: Tensor, residual: Tensor | None = None) -> Tensor:
    return F.batch_norm_relu(z, None, None, gamma, beta, training=True, residual=residual)


def _inputs(residual: bool, shape: _layers.Shape, layout: str, options: Options) -> list[Tensor]:
    """Leaves z, gamma, beta (, residual). |gamma zhat| is 0.2 at least, beyond |beta|, and the
    residual's sign is that of z: the sign of u is certain."""
    z = _layers.signed(shape, layout, options, 0)
    gamma = _layers.channels(shape, 0.5, 1.5, options, 1)
    beta = _layers.channels(shape, -0.1, 0.1, options, 2)
    return [t.requires_grad_() for t in (z, gamma, beta, *([z.detach() * 0.7] if residual else []))]


def _side(
    kind: str,
    function: Callable[..., Tensor],
    residual: bool,
    shape: _layers.Shape,
    layout: str,
    options: Options,
) -> Side:
    inputs = _inputs(residual, shape, layout, options)
    g, h, h_residual = (_layers.signed(shape, layout, options, s, 0.3) for s in (3, 4, 5))
    if kind == "forward":
        return _layers.forward_side(function, inputs)
    if kind == "backward":
        return _layers.backward_side(function, inputs, g)
    inner, cotangents = (inputs[0],), (h,)
    if residual:
        inner, cotangents = (inputs[0], inputs[3]), (h, h_residual)
    return _layers.double_backward_side(function, inputs, g, inputs[:2], cotangents, inner)


def ideal_bytes(
    kind: str, residual: bool, shape: _layers.Shape, layout: str, options: Options
) -> int:
    """What must move where a tensor does not stay in a cache between the sums over it and their
    use. With a residual a mask is written, and read in each pass of a backward."""
    n, c, h, w = shape
    mask = _layers.mask_bytes(shape, layout) if residual else 0
    full, masks = {
        "forward": (3 + residual, 1),  # statistics: z; then z (, residual) read, a written
        "backward": (5 + residual, 2),  # sums: g, z; then g, z read, (residual's and) z's written
        "double backward": (8 + residual, 1),  # sums: h, g', z; then the three (, h_s), two written
    }[kind]
    return full * n * c * h * w * options.torch_dtype.itemsize + masks * mask


def _case(kind: str, residual: bool, shape: _layers.Shape, layout: str, options: Options) -> Case:
    def build() -> dict[str, Callable[[], Side]]:
        def factory(function: Callable[..., Any]) -> Callable[[], Side]:
            return lambda: _side(kind, function, residual, shape, layout, options)

        return {"eager": factory(eager.batch_norm_relu), "ours": factory(ours)}

    return Case(
        name=f"{kind}{' residual' if residual else ''} {_layers.text(shape, layout)}",
        build=build,
        ideal_bytes=ideal_bytes(kind, residual, shape, layout, options),
        facts={"shape": list(shape), "layout": layout, "kind": kind, "residual": residual},
    )


def cases(options: Options) -> list[Case]:
    return [
        _case(kind, residual, shape, layout, options)
        for shape in _layers.shapes(options)
        for layout in _layers.LAYOUTS
        for residual in (False, True)
        for kind in KINDS
    ]


BENCHMARK = Benchmark(
    name="batch_norm_relu",
    about="training BatchNorm (, residual add) and ReLU: forward, backward, double backward alone",
    cases=cases,
    baseline="eager",
    seconds=2.0,
    caveats=(
        "eager: F.batch_norm, add_, relu_; its double backward is autograd's composite one",
        "backward to z, gamma, beta and the residual; double backward to g, z and gamma",
    ),
)
