"""What a benchmark is: cases, the sides that are compared, and their agreement.

A side is a step in two halves, ``forward`` and ``backward``, so that what autograd holds between
them can be counted. All sides of a case must agree before anything is timed or reported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

COPY = "copy"
"""Name of the side that the harness adds: a copy reading and writing the ideal bytes."""


class SidesDisagreeError(RuntimeError):
    """Two sides computed different things: their times must not be compared."""


class UnsupportedError(RuntimeError):
    """A side cannot run here; its message is reported in place of figures."""


@dataclass(frozen=True)
class Options:
    """The conditions of a run, handed to every worker process."""

    device: str = "cpu"
    dtype: str = "float32"
    quick: bool = False
    seconds: float | None = None
    threads: int | None = None
    sides: Sequence[str] | None = None
    """Only these sides (and the copy); a run adds the baseline."""

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


@dataclass
class Side:
    """One way to take the step. ``backward`` takes what ``forward`` returned."""

    forward: Callable[[], Any]
    backward: Callable[[Any], Any] | None = None
    parameters: Sequence[Tensor] = ()
    """Not counted among the bytes saved for backward."""
    close: Callable[[], None] | None = None

    def step(self) -> Any:
        outputs = self.forward()
        return outputs if self.backward is None else self.backward(outputs)

    def results(self) -> list[Tensor]:
        """Outputs and gradients, for the comparison of the sides."""
        outputs = self.forward()
        tensors = list(outputs)
        if self.backward is not None:
            tensors += self.backward(outputs)
        return [t.detach() for t in tensors]


@dataclass
class Case:
    """One input of a benchmark.

    ``build`` returns a factory per side, so that a process that measures the memory of one side
    never holds another. ``check`` replaces the default comparison of outputs and gradients.
    """

    name: str
    build: Callable[[], dict[str, Callable[[], Side]]]
    ideal_bytes: int | None = None
    operations: int | None = None
    check: Callable[[], None] | None = None
    rounds: tuple[int, int] = (5, 101)
    """Timed rounds, at least and at most."""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Benchmark:
    """A member: ``cases(options)`` builds its cases; ``baseline`` names a side of each."""

    name: str
    about: str
    cases: Callable[[Options], list[Case]]
    baseline: str
    seconds: float = 4.0
    """Time to spend on the timed rounds of one case."""
    isolate: bool = False
    """Whether peak memory takes a process per case and side, not only per side."""
    needs_torchvision: bool = False
    measures_memory: bool = True
    caveats: tuple[str, ...] = ()


TOLERANCES = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


def relative_error(values: Tensor, expected: Tensor) -> float:
    """|values - expected| / |expected| in the Euclidean norm; NaN or infinite values give inf."""
    if values.shape != expected.shape:
        return float("inf")
    a, b = values.double(), expected.double()
    error = ((a - b).norm() / b.norm().clamp_min(1e-30)).item()
    return error if error == error else float("inf")


def require_agreement(results: Mapping[str, Sequence[Tensor]], baseline: str, dtype: str) -> None:
    """Raise :class:`SidesDisagreeError` unless every side's tensors equal the baseline's."""
    tolerance, expected = TOLERANCES[dtype], results[baseline]
    for name, tensors in results.items():
        if len(tensors) != len(expected):
            raise SidesDisagreeError(
                f"{name} gave {len(tensors)} tensors, {baseline} {len(expected)}"
            )
        for i, (got, want) in enumerate(zip(tensors, expected, strict=True)):
            error = relative_error(got, want)
            if not error <= tolerance:
                raise SidesDisagreeError(
                    f"{name} disagrees with {baseline} in tensor {i} of shape "
                    f"{tuple(want.shape)}: relative error {error:.2e}, allowed {tolerance:.0e}"
                )


def build_sides(
    case: Case, options: Options, only: str | None = None
) -> tuple[dict[str, Side], dict[str, str]]:
    """The sides of a case that can run here, and the reasons of those that cannot."""
    factories = case.build()
    if case.ideal_bytes is not None:
        factories[COPY] = lambda: copy_side(case.ideal_bytes or 0, options.device)
    sides: dict[str, Side] = {}
    reasons: dict[str, str] = {}
    for name, factory in factories.items():
        if only is not None and name != only:
            continue
        if options.sides is not None and name not in (*options.sides, COPY):
            continue
        try:
            sides[name] = factory()
        except UnsupportedError as error:
            reasons[name] = str(error)
    return sides, reasons


def copy_side(ideal_bytes: int, device: str) -> Side:
    """``destination.copy_(source)`` whose reads and writes together are ``ideal_bytes``."""
    source = torch.ones(max(1, ideal_bytes // 8), dtype=torch.float32, device=device)
    destination = torch.zeros_like(source)
    return Side(forward=lambda: (destination.copy_(source),))


def verify(case: Case, sides: Mapping[str, Side], baseline: str, options: Options) -> None:
    """Run the correctness check of a case; it raises where the sides disagree."""
    if case.check is not None:
        case.check()
        return
    results = {name: side.results() for name, side in sides.items() if name != COPY}
    require_agreement(results, baseline, options.dtype)
