"""Chooses what a stage keeps, by counting bytes through its passes.

An account of every pass: what is held, what is made again, cotangents and their temporaries. It
takes milliseconds, so that choices are tried one by one. What a step takes in the end is told by
the ledger, which runs the real code (``ledger.py``); this account agrees with it closely enough to
choose.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch.utils._python_dispatch import _disable_current_modes

from camkernels.engine import keep
from camkernels.engine.conv_norm import Conv, Norm
from camkernels.engine.units import Unit

if TYPE_CHECKING:
    from camkernels.engine.plan import Stage
    from camkernels.engine.trace import Op


# Of which residual sums to keep is searched among so many.
_MOST_CANDIDATES = 40


class BudgetError(ValueError):
    """No plan of the engine fits into the bytes that were given."""


@dataclass
class Sizes:
    """Bytes of everything in a stage.

    Attributes:
        of: of each value. prime: of a g' by the value z. parameters: gradients of a unit.
        scratch: what a convolution needs beside its operands.
    """

    of: dict[Op, int]
    prime_share: float
    parameters: dict[Unit, int]
    scratch: dict[Unit, int]
    operations: dict[Op, float]

    def prime(self, value: Op) -> int:
        return int(self.of[value] * self.prime_share)


def sizes_of(stage: Stage, shapes: list[torch.Size], itemsize: int, device: str) -> Sizes:
    """``shapes`` of the stage's inputs."""
    operations: dict[Op, float] = {}
    with _disable_current_modes():  # a ledger would enter these
        known: dict[Op, torch.Tensor] = {
            v: torch.empty(s, device="meta") for v, s in zip(stage.inputs, shapes, strict=True)
        }
        for unit in stage.units:
            known[unit.output] = y = unit.outline(*(known[v] for v in unit.inputs))
            if isinstance(unit, Conv):
                weight = unit.conv.weight
                operations[unit.output] = 2.0 * y.numel() * weight[0].numel()
    of = {v: t.numel() * itemsize for v, t in known.items()}
    parameters = {
        u: sum(p.numel() * p.itemsize for m in u.modules() for p in m.parameters(recurse=False))
        for u in stage.units
    }
    scratch = {
        u: of[u.output] + of[u.inputs[0]] + parameters[u]
        if isinstance(u, Conv) and device == "cpu"
        else 0
        for u in stage.units
    }
    share = 0.5 if stage.memory.half and itemsize == 4 else 1.0
    return Sizes(of, share, parameters, scratch, operations)


@dataclass
class _Account:
    now: int = 0
    peak: int = 0
    held: dict[object, int] = field(default_factory=dict)

    def take(self, key: object, size: int) -> None:
        self.held[key] = self.held.get(key, 0) + size
        self.now += size
        self.peak = max(self.peak, self.now)

    def give(self, key: object) -> None:
        self.now -= self.held.pop(key, 0)

    def passing(self, size: int) -> None:
        self.peak = max(self.peak, self.now + size)


def peak(stage: Stage, kept: frozenset[Op], sizes: Sizes, second: bool) -> int:
    """Bytes at the highest moment of a step: plain, or with an input gradient and its own."""
    account = _Account()
    _forward(stage, kept, sizes, account)
    if second:
        _reverse(stage, kept, sizes, account, first=True)
        _tangent(stage, kept, sizes, account)
    _reverse(stage, kept, sizes, account, first=False)
    return account.peak


def _forward(stage: Stage, kept: frozenset[Op], sizes: Sizes, account: _Account) -> None:
    for unit, ends in zip(stage.units, stage.last_uses, strict=True):
        account.take(unit.output, sizes.of[unit.output])
        account.passing(sizes.scratch[unit])
        if isinstance(unit, Norm) and unit.residual is not None:
            account.take((unit, "mask"), sizes.of[unit.output] // 32)
        for value in ends:
            if value not in kept:
                account.give(value)


def _walk(
    stage: Stage, kept: frozenset[Op], sizes: Sizes, account: _Account, backward: bool, last: bool
) -> Iterator[Unit]:
    """Units in the order of a pass, with what is made again and let go accounted for."""
    units = tuple(stage.units)
    weights = frozenset(u for u in units if last and u.reads_for_weights)
    for action in keep.schedule(stage, kept, units, backward, weights):
        if action.verb == "visit":
            assert action.unit is not None
            yield action.unit
        elif action.verb == "again":
            assert action.unit is not None
            value = action.unit.output
            account.take(("again", value), sizes.of[value])
            account.passing(sizes.scratch[action.unit])
        elif action.verb == "drop":
            account.give(("again", action.value))
        elif last:
            account.give(action.value)


def _reverse(
    stage: Stage, kept: frozenset[Op], sizes: Sizes, account: _Account, first: bool
) -> None:
    """Both input gradients at once (``first``), or the last backward."""
    streams = 2 if first else 1
    for value in stage.outputs:
        account.take(("cotangent", value), streams * sizes.of[value])
    for unit in _walk(stage, kept, sizes, account, True, not first):
        for value in unit.inputs:
            if value in stage.producers and ("cotangent", value) not in account.held:
                account.take(("cotangent", value), streams * sizes.of[value])
            else:
                account.passing(sizes.of[value])
        account.passing(sizes.scratch[unit] + sizes.parameters[unit])
        account.give(("cotangent", unit.output))
        if isinstance(unit, Norm):
            if first:
                account.take(("prime", unit), sizes.prime(unit.z))
            else:
                account.give(("prime", unit))
        if not first and ("gradient", unit) not in account.held:
            account.take(("gradient", unit), sizes.parameters[unit])


def _tangent(stage: Stage, kept: frozenset[Op], sizes: Sizes, account: _Account) -> None:
    left = {v: sum(v in u.inputs for u in stage.units) for v in sizes.of}
    for unit in _walk(stage, kept, sizes, account, False, False):
        if not isinstance(unit, Norm):  # a BatchNorm's is in the memory of its convolution's
            account.take(("tangent", unit.output), sizes.of[unit.output])
        account.passing(sizes.scratch[unit])
        account.take(("gradient", unit), sizes.parameters[unit])
        for value in unit.inputs:
            left[value] -= 1
            if left[value] == 0 and not (isinstance(unit, Norm) and value == unit.z):
                account.give(("tangent", value))
        if isinstance(unit, Norm) and ("tangent", unit.z) in account.held:
            size = account.held[("tangent", unit.z)]
            account.give(("tangent", unit.z))
            account.take(("tangent", unit.output), size)


# --- choosing -----------------------------------------------------------------------------------


def choose(
    stage: Stage, shapes: list[torch.Size], itemsize: int, device: str
) -> tuple[frozenset[Op], frozenset[Op]]:
    """What is dropped, and what is kept.

    Raises:
        BudgetError: not even dropping all that can be dropped fits.
    """
    sizes = sizes_of(stage, shapes, itemsize, device)
    memory = stage.memory
    if memory.budget is None:
        dropped = keep.lean_values(stage) if memory.lean else frozenset()
        return dropped, _with_checkpoints(stage, dropped, sizes)
    order = sorted(keep.droppable(stage), key=lambda v: sizes.operations[v] / max(sizes.of[v], 1))
    dropped = frozenset()
    smallest = None
    for value in (None, *order):
        if value is not None:
            dropped = dropped | {value}
        kept = _with_checkpoints(stage, dropped, sizes)
        needed = peak(stage, kept, sizes, second=True)
        smallest = needed if smallest is None else min(smallest, needed)
        if needed <= memory.budget:
            return dropped, kept
    raise BudgetError(
        f"memory={memory.budget}: a step on inputs {[tuple(s) for s in shapes]} needs at least "
        f"{smallest} bytes; take a smaller batch"
    )


def _with_checkpoints(stage: Stage, dropped: frozenset[Op], sizes: Sizes) -> frozenset[Op]:
    """What is kept where some of the residual sums that would be made again from one another are
    kept too: those that lower the peaks most, of a step with the double backward and of a plain
    one. By steepest descent: one more, one less, or one in the place of another."""
    candidates = keep.sums_made_again(stage, dropped)[:_MOST_CANDIDATES]
    known: dict[frozenset[Op], int] = {}

    def cost(checkpoints: frozenset[Op]) -> int:
        if checkpoints not in known:
            kept = keep.kept_values(stage, dropped, checkpoints)
            known[checkpoints] = sum(peak(stage, kept, sizes, b) for b in (True, False))
        return known[checkpoints]

    chosen: frozenset[Op] = frozenset()
    while True:
        toggled = [chosen ^ {v} for v in candidates]
        found = min(toggled, key=cost, default=chosen)
        if cost(found) >= cost(chosen):
            found = min(_moved(chosen, candidates), key=cost, default=chosen)
        if cost(found) >= cost(chosen):
            return keep.kept_values(stage, dropped, chosen)
        chosen = found


def _moved(chosen: frozenset[Op], candidates: list[Op]) -> list[frozenset[Op]]:
    """The sets in which one of ``chosen`` is exchanged for one of its neighbours."""
    found = []
    for index, value in enumerate(candidates):
        if value in chosen:
            near = candidates[max(index - 2, 0) : index + 3]
            found += [chosen - {value} | {other} for other in near if other not in chosen]
    return found
