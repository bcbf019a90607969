"""Time of ours against B, K and h w, each doubled three times: linear means an exponent of 1."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.harness import Benchmark, Case, Options, Side
from benchmarks.members import _inputs, cam, cam_statistics

# 26 MB of float32 at the least, beyond the caches, or leaving them would look like an exponent
# above 1. The copy of the same bytes runs beside, as the machine's own curve.
BASE = (32, 256, 28, 28)
QUICK_BASE = (2, 8, 4, 4)
FACTORS = (1, 2, 4, 8)
OPS = {"cam": cam.ours, "cam_statistics": cam_statistics.ours}


def scaled(base: tuple[int, int, int, int], axis: str, factor: int) -> tuple[int, int, int, int]:
    """``base`` with B, K or the number of pixels multiplied by a power of two."""
    b, k, h, w = base
    if axis == "B":
        return b * factor, k, h, w
    if axis == "K":
        return b, k * factor, h, w
    while factor > 1:
        h, w = (2 * h, w) if h <= w else (h, 2 * w)
        factor //= 2
    return b, k, h, w


def _case(op: str, axis: str, factor: int, options: Options) -> Case:
    shape = scaled(QUICK_BASE if options.quick else BASE, axis, factor)

    def build() -> dict[str, Callable[[], Side]]:
        inputs = _inputs.activations_and_second(shape, "nchw", "weights", options)
        return {"ours": lambda: _inputs.autograd_side(OPS[op], inputs)}

    return Case(
        name=f"{op} {axis} x{factor}",
        build=build,
        facts={"op": op, "axis": axis, "factor": factor, "shape": list(shape)},
        **_inputs.cam_traffic(shape, "weights", options),
    )


def cases(options: Options) -> list[Case]:
    factors = FACTORS[:2] if options.quick else FACTORS
    return [_case(op, axis, f, options) for op in OPS for axis in ("B", "K", "hw") for f in factors]


BENCHMARK = Benchmark(
    name="linearity",
    about="time of forward and backward, weights form, NCHW, against B, K and h w",
    cases=cases,
    baseline="ours",
    seconds=1.5,
    measures_memory=False,
)
