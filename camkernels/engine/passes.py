"""The passes over one stage: forward, reverse (plain, guided, last) and tangent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from camkernels import backends, modes
from camkernels.engine import keep
from camkernels.engine.conv_norm import Norm
from camkernels.engine.plan import Stage
from camkernels.engine.trace import Op
from camkernels.engine.units import Record, Second, Spread, Stream, Unit
from camkernels.ops._chain import implementation
from camkernels.ops.batch_norm_relu import norm

CONSUMED = (
    "the engine's buffers of this forward were freed by an earlier backward; pass "
    "retain_graph=True to that one to go backward a second time"
)
CHANGED = (
    "{what} changed in place after the forward that the backward belongs to (an optimizer step, or "
    "an in-place operation in between): its gradient would be wrong"
)


class Run:
    """One forward of a stage, and what it holds for its backwards.

    Args:
        stage: what runs.
        inputs: its inputs, in order.
        recording: a backward may follow.
    """

    def __init__(self, stage: Stage, inputs: Sequence[Tensor], recording: bool) -> None:
        self.stage, self.recording = stage, recording
        first = inputs[0]
        device = first.device.type
        self.device = first.device
        cast = modes.autocast_dtype(device)
        self.dtype = first.dtype if cast is None or first.dtype == torch.float64 else cast
        self.backend = "meta" if device == "meta" else backends.resolve(first.device, self.dtype)
        self.stored_dtype = stage.memory.stored_dtype(self.dtype)
        self.state: dict[Unit, Any] = {}
        self.held: dict[Op, Tensor] = {}
        self.versions: list[tuple[str, Tensor, int]] = []
        self.second: dict[int, Second] = {}
        self.consumed = False
        self.weights_wanted = True
        self.keeps_graph = False
        self._input_dtypes = [x.dtype for x in inputs]
        self.unread = frozenset(
            v for v, x in zip(stage.inputs, inputs, strict=True) if modes.is_unread(x)
        )
        self.skipped: frozenset[Op] = frozenset()
        self._cache: dict[Op, Tensor] = {}
        self._casts: dict[Tensor, Tensor] = {}
        self._caches_casts = recording and torch.is_autocast_cache_enabled()
        wanted = [x.requires_grad for x in inputs]
        self.of_inputs = self._dependents({v for v, w in zip(stage.inputs, wanted, strict=True)
                                           if w}, parameters=False)  # fmt: skip
        self.of_all = self._dependents(
            {v for v, w in zip(stage.inputs, wanted, strict=True) if w}, parameters=True
        )

    def _dependents(self, values: set[Op], parameters: bool) -> set[Op]:
        """Values that depend on ``values``, or on parameters that require a gradient."""
        found = set(values)
        for unit in self.stage.units:
            trains = parameters and any(
                p.requires_grad for m in unit.modules() for p in m.parameters(recurse=False)
            )
            if trains or any(v in found for v in unit.inputs):
                found.add(unit.output)
        return found

    # -- what units ask for --------------------------------------------------------------------

    def value(self, op: Op) -> Tensor:
        """A value of the forward, kept or made again."""
        found = self._cache.get(op)
        return self.held[op] if found is None else found

    def cast(self, parameter: Tensor) -> Tensor:
        """A parameter in the dtype that the stage computes in: itself; or a copy, made once where
        autocast's own cache would keep it for the backward too."""
        found = self._casts.get(parameter)
        if found is None:
            found = parameter.detach().to(self.dtype)
            if parameter.dtype == self.dtype or self._caches_casts:
                self._casts[parameter] = found
        return found

    def kernel(self, op: str, name: str) -> Callable[..., Any]:
        return implementation(op, name, self.backend)

    def scale(self, unit: Norm) -> Tensor:
        """gamma rstd of a BatchNorm, (C,)."""
        scale: Tensor = self.state[unit].scale
        return scale

    def leads(self, value: Op, stream: Stream) -> bool:
        """Whether a reverse pass must go on to ``value``."""
        if stream.gradients is None:
            return value in self.of_inputs
        return value in self.of_all and value not in self.skipped

    def prime(self, record: Record, unit: Norm | None) -> Tensor | None:
        """g' of a BatchNorm in the dtype of the stage."""
        assert unit is not None
        stored = record.primes.get(unit)
        if stored is None or stored.dtype == self.dtype:
            return stored
        wide = stored.to(self.dtype)
        if not self.keeps_graph:
            record.primes[unit] = wide  # the BatchNorm asks next
        return wide

    def take(self, held: dict[Any, Tensor], key: Any) -> Tensor | None:
        """An entry, which is forgotten where no other backward will ask for it."""
        return held.get(key) if self.keeps_graph else held.pop(key, None)

    # -- forward -------------------------------------------------------------------------------

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs of the stage."""
        stage = self.stage
        live: dict[Op, Tensor] = {}
        for value, x in zip(stage.inputs, inputs, strict=True):
            if x.dim() != 4 or not x.is_floating_point():
                raise TypeError(
                    f"engine: expected (B, C, H, W) of a floating dtype at {value.name!r}, got "
                    f"{x.dtype} {tuple(x.shape)}"
                )
            live[value] = norm.dense(x.detach().to(self.dtype))
        if self.recording:
            kind = "cpu" if self.device.type == "meta" else self.device.type
            stage.prepare([x.shape for x in inputs], self.dtype.itemsize, kind)
            self._watch(inputs)
            self.held.update(live)
        for unit, ends in zip(stage.units, stage.last_uses, strict=True):
            y = unit.forward(self, *(live[v] for v in unit.inputs))
            live[unit.output] = y
            if self.recording and unit.output in stage.kept:
                # an output becomes a node's own: held itself, the two would hold each other
                self.held[unit.output] = y.detach()
            del y
            for value in ends:
                del live[value]
        outputs = [live[v] for v in stage.outputs]
        if self.recording:
            for value, y in zip(stage.outputs, outputs, strict=True):
                if value in self.held:
                    self.versions.append(
                        (f"the output of {value.name}", self.held[value], y._version)
                    )
        else:
            self.state.clear()
        return outputs

    def _watch(self, inputs: Sequence[Tensor]) -> None:
        for value, x in zip(self.stage.inputs, inputs, strict=True):
            if not x.is_inference():
                self.versions.append((value.name, x.detach(), x._version))
        for module in self.stage.modules():
            for name, p in module.named_parameters(recurse=False):
                self.versions.append(
                    (f"parameter {name} of {type(module).__name__}", p, p._version)
                )

    def check(self) -> None:
        """Raise where the forward's values are gone, or no longer those of the forward."""
        if self.consumed:
            raise RuntimeError(CONSUMED)
        for what, tensor, version in self.versions:
            if tensor._version != version:
                raise RuntimeError(CHANGED.format(what=what))

    def free(self) -> None:
        """Let go of all that was held."""
        self.consumed = True
        self.held.clear()
        self.state.clear()
        self.second.clear()
        self._cache.clear()
        self._casts.clear()
        self.versions.clear()

    # -- reverse -------------------------------------------------------------------------------

    def reverse(
        self,
        grads: Sequence[Sequence[Tensor | None]],
        streams: Sequence[Stream],
        last: bool,
        unread: bool = False,
    ) -> list[list[Tensor | None]]:
        """Cotangents of the inputs per stream, from those of the outputs; all streams share what
        is made again.

        Args:
            last: nothing will be asked of this run afterwards, so that it frees as it goes.
            unread: the gradients of leaves that say so are not made.
        """
        self.check()
        self.skipped = self.unread if unread else frozenset()
        tables = [_Table(self.dtype) for _ in streams]
        for table, given in zip(tables, grads, strict=True):
            for value, grad in zip(self.stage.outputs, given, strict=True):
                if grad is not None:
                    table.add(value, grad, private=False)
        weights = any(s.gradients is not None for s in streams)
        goal = self.of_all if weights else self.of_inputs
        active = tuple(u for u in self.stage.units if u.output in goal)
        for action in self._schedule(active, True, weights):
            if action.verb == "visit":
                unit = action.unit
                assert unit is not None
                for table, stream in zip(tables, streams, strict=True):
                    grad, private = table.take(unit.output)
                    found = unit.reverse(self, grad, stream, private)
                    del grad
                    for value, made in zip(unit.inputs, found, strict=True):
                        if made is not None and self.leads(value, stream):
                            table.add(value, made, private=not unit.shares)
                    made = None
                    del found
                if last:
                    self.state.pop(unit, None)
            else:
                self._act(action, last)
        self._cache.clear()
        return [self._of_inputs(table) for table in tables]

    def _of_inputs(self, table: _Table) -> list[Tensor | None]:
        found = []
        for value, dtype in zip(self.stage.inputs, self._input_dtypes, strict=True):
            grad = table.take(value)[0] if value in self.of_inputs else None
            found.append(None if grad is None else grad.to(dtype))
        return found

    def _schedule(
        self, active: tuple[Unit, ...], backward: bool, weights: bool
    ) -> list[keep.Action]:
        reading = frozenset(u for u in active if weights and u.learns_from_input())
        key = (active, backward, reading)
        schedules = self.stage.schedules
        if key not in schedules:
            schedules[key] = keep.schedule(self.stage, self.stage.kept, active, backward, reading)
        return schedules[key]

    def _act(self, action: keep.Action, last: bool) -> None:
        if action.verb == "again":
            unit = action.unit
            assert unit is not None
            self._cache[unit.output] = unit.again(self, *(self.value(v) for v in unit.inputs))
        elif action.verb == "drop":
            assert action.value is not None
            self._cache.pop(action.value, None)
        elif last:
            assert action.value is not None
            self.held.pop(action.value, None)

    # -- tangent -------------------------------------------------------------------------------

    def tangent(
        self, record: Record, hs: Sequence[Tensor | None], second: Second
    ) -> list[Tensor | None]:
        """The double backward: cotangents of the outputs' cotangents, from those of the inputs'."""
        self.check()
        active = tuple(u for u in self.stage.units if u.output in self.of_inputs)
        readers: dict[Op, int] = {}
        for reader in active:
            for value in reader.inputs:
                readers[value] = readers.get(value, 0) + 1
        for value in self.stage.outputs:
            readers[value] = readers.get(value, 0) + 1
        live: dict[Op, Tensor | None] = {}
        given = set(self.stage.inputs)
        for value, h in zip(self.stage.inputs, hs, strict=True):
            live[value] = None if h is None else h.to(self.dtype)
        left = dict(readers)
        for action in self._schedule(active, False, False):
            if action.verb != "visit":
                self._act(action, False)
                continue
            unit = action.unit
            assert unit is not None
            private = readers[unit.inputs[0]] == 1 and unit.inputs[0] not in given
            tangents = []
            for value in unit.inputs:
                tangents.append(live.get(value))
                left[value] -= 1
                if left[value] == 0:
                    live.pop(value, None)
            live[unit.output] = unit.tangent(self, record, second, tuple(tangents), private)
            del tangents
        self._cache.clear()
        return [live.get(value) for value in self.stage.outputs]


class _Table:
    """Cotangents of values, summed as they come."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.held: dict[Op, tuple[Tensor | Spread, bool]] = {}

    def add(self, value: Op, grad: Tensor | Spread, private: bool) -> None:
        """``private``: the tensor is nobody else's, and may be written into."""
        if isinstance(grad, Tensor) and grad.dtype != self.dtype:
            grad, private = grad.to(self.dtype), True
        if value not in self.held:
            self.held[value] = grad, private
        else:
            self.held[value] = _sum(*self.held[value], grad, private), True

    def take(self, value: Op) -> tuple[Tensor | None, bool]:
        """The sum, and whether it is private."""
        found, private = self.held.pop(value, (None, False))
        return (found.dense(), True) if isinstance(found, Spread) else (found, private)


def _sum(a: Tensor | Spread, a_private: bool, b: Tensor | Spread, b_private: bool) -> Tensor:
    """In the memory of one of them where it may be."""
    if isinstance(b, Spread) or (b_private and not a_private and isinstance(a, Tensor)):
        (a, a_private), (b, b_private) = (b, b_private), (a, a_private)
    if isinstance(b, Spread):
        b, b_private = b.dense(), True
    if isinstance(a, Spread):
        return a.add_to(b) if b_private else a.dense().add_(b)
    return a.add_(b) if a_private else a + b


def parameters_of(stage: Stage) -> list[nn.Parameter]:
    """Each once, in order."""
    found = {p: None for m in stage.modules() for p in m.parameters(recurse=False)}
    return list(found)
