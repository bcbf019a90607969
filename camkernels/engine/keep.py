"""What a stage keeps of its forward, and when each pass makes the rest again.

Convolutions are dear and everything else is one pass over memory. So what is kept are outputs of
convolutions (and sums), and only those from which all that the passes read can be made again
without a convolution. The lean plans drop some of these too, and convolve again.

A pass follows a schedule, computed once: make this value again, run that unit, let go of that
value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from camkernels.engine.conv_norm import Conv, Norm
from camkernels.engine.units import ReLU, Unit

if TYPE_CHECKING:
    from camkernels.engine.plan import Stage
    from camkernels.engine.trace import Op

Mode = Literal["fast", "lean", "lean-bf16"]
MODES: tuple[str, ...] = ("fast", "lean", "lean-bf16")


@dataclass(frozen=True)
class Memory:
    """What is traded for memory.

    Attributes:
        lean: convolutions are made again by the rule of the lean modes.
        half: g' and the second-order cotangents of z are stored in bfloat16.
        budget: bytes that a step may take above what was there before it; as many convolutions are
            made again as it takes.
    """

    lean: bool = False
    half: bool = False
    budget: int | None = None

    @classmethod
    def of(cls, memory: str | int) -> Memory:
        """A named mode, or bytes.

        Raises:
            ValueError: neither.
        """
        if isinstance(memory, int) and not isinstance(memory, bool) and memory > 0:
            return cls(budget=memory)
        if memory not in MODES:
            raise ValueError(
                f"memory: expected one of {', '.join(MODES)} or a positive number of bytes, got "
                f"{memory!r}"
            )
        return cls(memory != "fast", memory == "lean-bf16")

    def stored_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of g' and of cotangents of z that wait for the last pass."""
        return torch.bfloat16 if self.half and dtype == torch.float32 else dtype


# --- which values -----------------------------------------------------------------------------


def kept_values(
    stage: Stage, dropped: frozenset[Op], checkpoints: frozenset[Op] = frozenset()
) -> frozenset[Op]:
    """The values that the forward keeps besides the stage's inputs.

    Args:
        dropped: outputs of convolutions that are not kept although a pass reads them.
        checkpoints: values that are kept although no convolution stands between them and others.
    """
    forced = _inputs_of_dropped(stage, dropped) | checkpoints
    kept: set[Op] = set()
    pending = [v for unit in stage.units for v in (*unit.reads, *unit.reads_for_weights)]
    seen: set[Op] = set()
    while pending:
        value = pending.pop()
        if value in seen or value not in stage.producers:
            continue
        seen.add(value)
        unit = stage.producers[value]
        if value in forced or (unit.dear and value not in dropped):
            kept.add(value)
        else:
            pending += unit.inputs
    return frozenset(kept)


def sums_made_again(stage: Stage, dropped: frozenset[Op]) -> list[Op]:
    """Outputs of residual sums that are made again, each from the one before it."""
    kept = kept_values(stage, dropped)
    found = [u.output for u in stage.units if isinstance(u, Norm) and u.residual is not None]
    return [v for v in found if v not in kept]


def lean_values(stage: Stage) -> frozenset[Op]:
    """The outputs that the lean modes drop."""
    return frozenset(_lean(stage, droppable(stage)))


def droppable(stage: Stage) -> list[Op]:
    """Outputs of convolutions that a BatchNorm or a ReLU of the stage reads."""
    read = {v for unit in stage.units for v in unit.reads}
    return [u.output for u in stage.units if isinstance(u, Conv) and u.output in read]


def _lean(stage: Stage, candidates: list[Op]) -> list[Op]:
    """In residual networks the first convolution and those that end a block, which in a bottleneck
    are four times as wide as those before them (a downsampling one would cost what it saves: its
    input would have to be kept in its place); in others 1x1 convolutions; else every other one. No
    convolution is made again from another that is."""
    norms = [u for u in stage.units if isinstance(u, Norm)]
    sums = [n for n in norms if n.residual is not None]
    if sums:
        residuals = {n.residual for n in sums}
        ends = {n.z for n in sums} | {n.z for n in norms if n.output in residuals}
        # the first one reads the images, which are there, and is as wide as it is cheap
        ends |= {v for v in candidates if stage.producers[v].inputs[0] in stage.inputs}
        return [v for v in candidates if v in ends and _is_near(stage, v, frozenset(ends))]
    near = [v for v in candidates if _is_near(stage, v, frozenset())]
    chosen: list[Op] = []
    for value in [v for v in near if v.module.kernel_size == (1, 1)] or near:
        if not _sources(stage, value) & set(chosen):
            chosen.append(value)
    return chosen


def _is_near(stage: Stage, value: Op, dropped: frozenset[Op]) -> bool:
    """Whether the input of the convolution that makes ``value`` is one elementwise pass away from
    a kept convolution."""
    (source,) = stage.producers[value].inputs
    unit = stage.producers.get(source)
    if source in stage.inputs:
        return True
    if isinstance(unit, Norm) and unit.residual is None:
        return unit.z not in dropped
    return isinstance(unit, ReLU) and unit.inputs[0] not in dropped


def _sources(stage: Stage, value: Op) -> set[Op]:
    """The convolutions from whose outputs the input of ``value``'s is made."""
    found: set[Op] = set()
    pending = list(stage.producers[value].inputs)
    while pending:
        unit = stage.producers.get(pending.pop())
        if isinstance(unit, Conv):
            found.add(unit.output)
        elif unit is not None:
            pending += unit.inputs
    return found


def _inputs_of_dropped(stage: Stage, dropped: frozenset[Op]) -> set[Op]:
    """Inputs of dropped convolutions that are not one elementwise pass away from a kept one."""
    forced = set()
    for value in dropped:
        (source,) = stage.producers[value].inputs
        if source in stage.producers and not _is_near(stage, value, dropped):
            forced.add(source)
    return forced


# --- schedules --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Action:
    """One step of a pass: ``again`` makes a value, ``visit`` runs a unit's part in the pass,
    ``drop`` forgets a value made again, ``release`` one that the forward kept."""

    verb: Literal["again", "visit", "drop", "release"]
    unit: Unit | None = None
    value: Op | None = None


def schedule(
    stage: Stage,
    kept: frozenset[Op],
    active: tuple[Unit, ...],
    backward: bool,
    weights: frozenset[Unit],
) -> list[Action]:
    """The actions of one pass.

    Args:
        active: the units that take part, in the order of the forward.
        backward: from the outputs to the inputs.
        weights: convolutions whose weight gradient is made, which reads their input.
    """
    actions: list[Action] = []
    made: set[Op] = set()

    def ensure(value: Op) -> None:
        if value in made or value in kept or value not in stage.producers:
            return
        unit = stage.producers[value]
        for source in unit.inputs:
            ensure(source)
        actions.append(Action("again", unit))
        made.add(value)

    for unit in reversed(active) if backward else active:
        for value in _reads(unit, weights):
            ensure(value)
        actions.append(Action("visit", unit))
    return _with_ends(stage, kept, actions, weights)


def _reads(unit: Unit, weights: frozenset[Unit]) -> tuple[Op, ...]:
    return (*unit.reads, *(unit.reads_for_weights if unit in weights else ()))


def _with_ends(
    stage: Stage, kept: frozenset[Op], actions: list[Action], weights: frozenset[Unit]
) -> list[Action]:
    last: dict[Op, int] = dict.fromkeys(kept, -1)
    for index, action in enumerate(actions):
        assert action.unit is not None
        if action.verb == "again":
            last.setdefault(action.unit.output, index)
        uses = action.unit.inputs if action.verb == "again" else _reads(action.unit, weights)
        for value in uses:
            last[value] = index
    ends: dict[int, list[Action]] = {}
    for value, index in last.items():
        if value in stage.producers:
            verb: Literal["release", "drop"] = "release" if value in kept else "drop"
            ends.setdefault(index, []).append(Action(verb, value=value))
    result = list(ends.get(-1, []))
    for index, action in enumerate(actions):
        result += [action, *ends.get(index, [])]
    return result
