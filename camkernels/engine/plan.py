"""From a traced network to what the engine runs: stages, and what each of them keeps.

A program is a list of steps. Stages are runs of operations that the engine has passes for; each is
one autograd.Function. Between them stand calls of the user's own code (preprocessing of the images,
dropout, the head behind the last convolution), which autograd differentiates as ever, and the
forward hooks of modules inside, for which a stage ends where the module has made its output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from camkernels.engine import choose, keep
from camkernels.engine.conv_norm import Conv, Norm
from camkernels.engine.trace import Exit, Network, Op, values_in
from camkernels.engine.units import Add, AvgPool, Cat, MaxPool, ReLU, Unit

_FOLLOWERS = ("relu", "add", "cat", "max_pool")
# Calls of the user's code that may stand between two convolutions.
_BETWEEN = (nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class EngineError(ValueError):
    """The network cannot be planned; the message names the module and the way out."""


WAY_OUT = "ck.swap_in(model) without engine=True runs it with the composable modules"


@dataclass(eq=False)
class Stage:
    """Operations that run as one autograd.Function.

    Attributes:
        units: what it runs, in order.
        inputs, outputs: values that enter and leave.
        memory: what is kept, see :mod:`camkernels.engine.keep`.
    """

    units: list[Unit]
    inputs: list[Op]
    outputs: list[Op]
    memory: keep.Memory

    def __post_init__(self) -> None:
        self.producers = {unit.output: unit for unit in self.units}
        self.dropped: frozenset[Op] = frozenset()
        self.kept: frozenset[Op] = frozenset()
        self.shapes: list[torch.Size] = []
        self.last_uses = self._last_uses()
        self.schedules: dict[Any, list[keep.Action]] = {}
        self.relu = any(getattr(unit, "relu", False) for unit in self.units)

    def prepare(self, shapes: list[torch.Size], itemsize: int, device: str) -> None:
        """Choose what is kept, at the first forward, when the sizes are known."""
        if not self.shapes:
            self.dropped, self.kept = choose.choose(self, shapes, itemsize, device)
            self.schedules.clear()
            self.shapes = shapes

    def _last_uses(self) -> list[list[Op]]:
        """Per unit: values that the forward needs no longer once it has run."""
        last: dict[Op, int] = {}
        for index, unit in enumerate(self.units):
            for value in unit.inputs:
                last[value] = index
            last.setdefault(unit.output, index)
        found: list[list[Op]] = [[] for _ in self.units]
        for value, index in last.items():
            if value not in self.outputs:
                found[index].append(value)
        return found

    def modules(self) -> list[nn.Module]:
        """Modules whose parameters it differentiates, each once."""
        found: dict[nn.Module, None] = {}
        for unit in self.units:
            for module in unit.modules():
                found.setdefault(module)
        return list(found)


@dataclass(eq=False)
class Call:
    """A call of the user's own code."""

    op: Op


@dataclass(eq=False)
class Hooked:
    """The forward hooks of a module that is not called itself."""

    exit: Exit
    inputs: Any
    """The module's inputs, where a hook wants them: they would be made for its sake."""


Step = Stage | Call | Hooked


@dataclass
class Program:
    """What one forward of the network runs."""

    network: Network
    steps: list[Step]
    output: Any
    last_reads: list[list[Op]]
    """Per step: values that nobody reads once it has run."""

    @property
    def stages(self) -> list[Stage]:
        return [step for step in self.steps if isinstance(step, Stage)]

    @property
    def only_stages_read_inputs(self) -> bool:
        """Whether no call of the user's code and no hook is given what the network is given."""
        others = (step for step in self.steps if not isinstance(step, Stage))
        return not any(_reads(step) & set(self.network.inputs) for step in others)


def check(network: Network) -> None:
    """Raise EngineError where an operation that the engine lacks stands in its way."""
    inside = network.inside = _inside(network)
    before = _before(network)
    needed = _leads_to_convolution(network)
    if not inside:
        raise EngineError(
            "engine: the network has no 2d convolution, or hides them in functions of its own, in "
            f"checkpoints or in wrappers (FSDP of parts); {WAY_OUT}"
        )
    for op in network.ops:
        if op.kind != "eager" or op in before or op not in needed:
            continue
        if isinstance(op.module, _BETWEEN) or not any(i in inside for i in op.inputs):
            continue
        raise EngineError(
            f"engine: {op.name or 'the network'} ({_kind(op)}) cannot be planned: {op.reason}; "
            f"{WAY_OUT}"
        )


def _kind(op: Op) -> str:
    if op.module is not None:
        return type(op.module).__name__
    return str(getattr(op.options["call"](None), "__name__", "function"))


def _leads_to_convolution(network: Network) -> set[Op]:
    """Operations behind which a convolution or BatchNorm still comes."""
    found: set[Op] = set()
    for op in reversed(network.ops):
        if op.kind in ("conv", "bn") or op in found:
            found.update(op.inputs)
    return found


def _before(network: Network) -> set[Op]:
    """Operations that depend on no convolution: preprocessing."""
    dependent: set[Op] = set()
    for op in network.ops:
        if op.kind in ("conv", "bn") or any(i in dependent for i in op.inputs):
            dependent.add(op)
    return set(network.ops) - dependent


def _inside(network: Network) -> set[Op]:
    """The operations that stages run."""
    needed = _leads_to_convolution(network)
    inside: set[Op] = set()
    for op in network.ops:
        reads = [i in inside for i in op.inputs]
        known = op.kind not in ("eager", "input")
        leads = known and any(reads) and op in needed
        follows = op.kind in _FOLLOWERS and all(reads)
        if op.kind in ("conv", "bn") or leads or follows:
            inside.add(op)
    return inside


def make_program(
    network: Network, hooked: frozenset[tuple[nn.Module, bool]], memory: keep.Memory
) -> Program:
    """Divide a network that :func:`check` has passed.

    Args:
        hooked: modules with forward hooks that are to be called, and whether a hook wants the
            module's inputs.
    """
    inside, called = network.inside, network.called()
    wants_inputs = dict(hooked)
    exits: dict[int, list[Exit]] = {}
    for exit_ in network.exits:
        if exit_.module in wants_inputs and exit_.module not in called:
            exits.setdefault(exit_.position, []).append(exit_)
    pieces: list[Any] = []
    running: list[Op] = []

    def close() -> None:
        if running:
            pieces.append(list(running))
            running.clear()

    for position, op in enumerate([*network.ops, None]):
        for exit_ in exits.get(position, ()):
            close()
            inputs = exit_.inputs if wants_inputs[exit_.module] else ()
            pieces.append(Hooked(exit_, inputs))
        if op is None:
            close()
        elif op in inside:
            running.append(op)
        else:
            # A call that reads nothing of the running stage comes before it: nothing is cut.
            if any(i in running for i in op.inputs):
                close()
            pieces.append(Call(op))
    steps = _steps(network, pieces, memory)
    return Program(network, steps, network.output, _last_reads(network, steps))


def _reads(piece: Any) -> set[Op]:
    """Values that a piece reads from outside itself."""
    if isinstance(piece, Call):
        return set(piece.op.inputs)
    if isinstance(piece, Hooked):
        return {*values_in(piece.inputs), *values_in(piece.exit.output)}
    if isinstance(piece, Stage):
        return set(piece.inputs)
    return {i for op in piece for i in op.inputs} - set(piece)


def _steps(network: Network, pieces: list[Any], memory: keep.Memory) -> list[Step]:
    steps: list[Step] = []
    for index, piece in enumerate(pieces):
        if not isinstance(piece, list):
            steps.append(piece)
            continue
        later: set[Op] = set(values_in(network.output))
        for other in pieces[index + 1 :]:
            later |= _reads(other)
        outputs = [op for op in piece if op in later]
        steps.append(_stage(piece, outputs, memory))
    return steps


def _last_reads(network: Network, steps: list[Step]) -> list[list[Op]]:
    last: dict[Op, int] = {}
    for index, step in enumerate(steps):
        for op in _reads(step):
            last[op] = index
    for op in values_in(network.output):
        last.pop(op, None)
    found: list[list[Op]] = [[] for _ in steps]
    for op, index in last.items():
        found[index].append(op)
    return found


# --- stages -----------------------------------------------------------------------------------


def _stage(ops: list[Op], outputs: list[Op], memory: keep.Memory) -> Stage:
    users: dict[Op, list[Op]] = {}
    for op in ops:
        for value in op.inputs:
            users.setdefault(value, []).append(op)

    def only_user(op: Op) -> Op | None:
        found = users.get(op, [])
        return found[0] if len(found) == 1 and op not in outputs else None

    mine = set(ops)
    norms = {op: _norm(op, only_user, mine) for op in ops if op.kind == "bn"}
    absorbed: dict[Op, Norm] = {}
    for op in ops:  # of two BatchNorms that are added the later one takes the sum
        if op.kind == "bn":
            for part in norms[op].parts:
                absorbed[part] = norms[op]
    units: list[Unit] = []
    for op in ops:
        if op in absorbed:
            norm = absorbed[op]
            parts = _parts_won(norm, absorbed)
            if op is parts[-1]:
                units.append(norm.shortened(parts))
        else:
            units.append(_UNITS[op.kind](op))
    inputs = list(dict.fromkeys(v for u in units for v in u.inputs if v not in mine))
    stage = Stage(units, inputs, outputs, memory)
    for unit in stage.units:
        if isinstance(unit, Norm) and only_user(unit.z) is unit.parts[0]:
            conv = stage.producers.get(unit.z)
            if isinstance(conv, Conv):
                conv.norm, unit.conv = unit, conv
    return stage


def _norm(bn: Op, only_user: Any, mine: set[Op]) -> Norm:
    """A BatchNorm with the sum and the ReLU that follow it alone."""
    parts, residual, relu = [bn], None, bn.options["relu"]
    while not relu and (user := only_user(parts[-1])) is not None and user in mine:
        if user.kind == "add" and residual is None and user.inputs[0] is not user.inputs[1]:
            (residual,) = (v for v in user.inputs if v is not parts[-1])
        elif user.kind == "relu":
            relu = True
        else:
            break
        parts.append(user)
    return Norm(parts, residual, relu)


def _parts_won(norm: Norm, absorbed: dict[Op, Norm]) -> list[Op]:
    return [part for part in norm.parts if absorbed[part] is norm]


_UNITS: dict[str, Any] = {
    "conv": Conv, "relu": ReLU, "add": Add, "cat": Cat, "max_pool": MaxPool, "avg_pool": AvgPool,
}  # fmt: skip
