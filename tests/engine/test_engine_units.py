"""Random small graphs of units to two orders, and the invariants of what is kept and when."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine.engine_cases import (
    SMALL,
    assert_same_buffers,
    assert_same_gradients,
    batch,
    engined,
    everything_dropped,
    network,
    stages,
)
from hypothesis import given
from hypothesis import strategies as st
from nn.swapping import randomize_norms
from torch import Tensor, nn

from camkernels import backends
from camkernels.engine import choose, keep
from camkernels.engine.plan import Stage
from camkernels.engine.units import Unit

pytestmark = pytest.mark.skipif(
    backends.unavailable_reason("cpu") is not None, reason="needs the C++ kernels"
)
WIDTH = 4
PIECES = (
    "conv", "conv-bn", "conv-bn-relu", "conv-relu", "bn-relu", "relu", "add", "add-relu",
    "conv-bn-add-relu", "conv-bn-add", "cat-conv", "bn-add-bn", "double", "pool", "average",
    "twice",
)  # fmt: skip


class Piece(nn.Module):
    """One piece of a random graph: it reads the latest value and maybe an earlier one of its size.

    All have WIDTH channels; what is called ``twice`` runs one convolution two times.
    """

    def __init__(self, kind: str, inplace: bool) -> None:
        super().__init__()
        self.kind = kind
        wide = 2 * WIDTH if kind == "cat-conv" else WIDTH
        self.conv = nn.Conv2d(wide, WIDTH, 3, padding=1, bias=kind != "conv-bn")
        self.bn, self.other = nn.BatchNorm2d(WIDTH), nn.BatchNorm2d(WIDTH)
        self.relu = nn.ReLU(inplace=inplace)
        self.pool = nn.MaxPool2d(2) if kind == "pool" else nn.AvgPool2d(2)

    def forward(self, x: Tensor, earlier: Tensor) -> Tensor:
        kind = self.kind
        if kind in ("pool", "average"):
            return self.pool(x)
        if kind == "twice":
            return self.conv(self.relu(self.conv(x)))
        if kind == "double":
            return x + x
        if kind == "cat-conv":
            return self.conv(torch.cat([x, earlier], 1))
        if kind == "bn-add-bn":
            return self.relu(self.bn(x) + self.other(self.conv(earlier)))
        y = x
        if kind.startswith("conv"):
            y = self.conv(y)
        if "bn" in kind:
            y = self.bn(y)
        if "add" in kind:
            y = y + earlier
        # a ReLU in place writes into what it is given: never into what others read
        if kind.endswith("relu"):
            y = F.relu(y) if y is x else self.relu(y)
        return y


class Graph(nn.Module):
    def __init__(self, pieces: list[tuple[str, int, bool]]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3)
        self.pieces = nn.ModuleList(Piece(kind, inplace) for kind, _, inplace in pieces)
        self.back = [back for _, back, _ in pieces]
        self.last = nn.Conv2d(WIDTH, 6, 1)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        values = [self.stem(x)]
        for piece, back in zip(self.pieces, self.back, strict=True):
            latest, earlier = values[-1], values[max(len(values) - 1 - back, 0)]
            values.append(piece(latest, earlier))
            if piece.kind in ("pool", "average"):
                values = values[-1:]
        return self.fc(F.relu(self.last(values[-1])).mean((2, 3)))


def graphs() -> st.SearchStrategy[list[tuple[str, int, bool]]]:
    piece = st.tuples(st.sampled_from(PIECES), st.integers(0, 3), st.booleans())
    return st.lists(piece, min_size=3, max_size=7).filter(
        lambda found: sum(kind in ("pool", "average") for kind, _, _ in found) <= 2
    )


def _model(pieces: list[tuple[str, int, bool]], training: bool) -> nn.Module:
    torch.manual_seed(len(pieces))
    return randomize_norms(Graph(pieces)).double().train(training)


def _two_orders(model: nn.Module, x: Tensor, target: Tensor) -> dict[str, Tensor]:
    leaf = x.clone().requires_grad_()
    score = F.cross_entropy(model(leaf), target)
    (delta,) = torch.autograd.grad(score, leaf, create_graph=True)
    weights = torch.linspace(-1, 2, delta.numel(), dtype=delta.dtype).view_as(delta)
    loss = score + (100 * delta * weights).sum() + (100 * delta).square().sum()
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, [leaf, *named.values()], allow_unused=True)
    pairs = zip([leaf, *named.values()], found, strict=True)
    values = [torch.zeros_like(p) if g is None else g for p, g in pairs]
    return {"delta": delta.detach(), **dict(zip(["x", *named], values, strict=True))}


@pytest.mark.parametrize(
    "memory", ["fast", "lean", pytest.param("everything dropped", marks=pytest.mark.slow)]
)
@given(pieces=graphs(), training=st.booleans(), channels_last=st.booleans())
def test_random_graphs(
    memory: str, pieces: list[tuple[str, int, bool]], training: bool, channels_last: bool
) -> None:
    twin = _model(pieces, training)
    x, target = batch(3, 14, 3)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    if memory == "everything dropped":
        model = engined(twin, "lean")
        with everything_dropped():
            found = _two_orders(model, x, target)
    else:
        model = engined(twin, memory)
        found = _two_orders(model, x, target)
    assert len(stages(model, x)) == 1
    assert_same_gradients(found, _two_orders(twin, x, target))
    assert_same_buffers(model, twin)


@given(pieces=graphs(), data=st.data())
def test_any_convolutions_dropped_and_any_sums_kept(
    pieces: list[tuple[str, int, bool]], data: st.DataObject
) -> None:
    twin = _model(pieces, True)
    x, target = batch(3, 14, 3)
    model = engined(twin)
    (stage,) = stages(model, x)
    stage.dropped, stage.kept = _draw_kept(stage, data)
    stage.shapes = [x.shape]  # it has been prepared
    found = _two_orders(model, x, target)
    assert_same_gradients(found, _two_orders(twin, x, target))


def _draw_kept(stage: Stage, data: st.DataObject) -> tuple[frozenset[Any], frozenset[Any]]:
    candidates = keep.droppable(stage)
    dropped = frozenset(v for v in candidates if data.draw(st.booleans()))
    sums = keep.sums_made_again(stage, dropped)
    checkpoints = frozenset(v for v in sums if data.draw(st.booleans()))
    return dropped, keep.kept_values(stage, dropped, checkpoints)


# --- schedules ------------------------------------------------------------------------------------


@dataclass
class Walk:
    """Follows a schedule and looks at every step."""

    stage: Stage
    held: set[Any]
    made: set[Any] = field(default_factory=set)
    ended: set[Any] = field(default_factory=set)
    visited: list[Unit] = field(default_factory=list)

    def read(self, value: Any) -> None:
        assert value not in self.ended, f"{value} is read after it was let go"
        assert value in self.held | self.made, f"{value} is read before it is made"

    def follow(self, actions: list[keep.Action], weights: frozenset[Unit]) -> None:
        for action in actions:
            if action.verb == "again":
                assert action.unit is not None
                for value in action.unit.inputs:
                    self.read(value)
                assert action.unit.output not in self.held | self.made | self.ended, "made twice"
                self.made.add(action.unit.output)
            elif action.verb == "visit":
                assert action.unit is not None
                for value in (
                    *action.unit.reads,
                    *(action.unit.reads_for_weights if action.unit in weights else ()),
                ):
                    self.read(value)
                self.visited.append(action.unit)
            else:
                assert action.value not in self.ended, f"{action.value} is let go twice"
                assert (action.verb == "release") == (action.value in self.held)
                assert action.value in self.held | self.made
                self.ended.add(action.value)


def _check_schedules(stage: Stage, dropped: frozenset[Any], kept: frozenset[Any]) -> None:
    inputs = set(stage.inputs)
    for value in kept:
        assert value in stage.producers
        assert value not in dropped or value not in kept
    everything = tuple(stage.units)
    some = tuple(u for i, u in enumerate(everything) if i % 3 != 1)
    for active in (everything, some):
        for backward in (True, False):
            for weights in (frozenset(), frozenset(u for u in active if u.reads_for_weights)):
                actions = keep.schedule(stage, kept, active, backward, weights)
                walk = Walk(stage, inputs | kept)
                walk.follow(actions, weights)
                assert walk.visited == list(reversed(active) if backward else active)
                assert walk.ended == kept | walk.made, "held for ever"
                assert not walk.made & kept


@given(pieces=graphs(), data=st.data())
def test_schedules_of_random_graphs(
    pieces: list[tuple[str, int, bool]], data: st.DataObject
) -> None:
    x, _ = batch(3, 14, 3)
    (stage,) = stages(engined(_model(pieces, True)), x)
    _check_schedules(stage, *_draw_kept(stage, data))


@pytest.mark.parametrize("memory", ["fast", "lean", "lean-bf16"])
@pytest.mark.parametrize("name", SMALL)
def test_schedules_of_small_networks(name: str, memory: str) -> None:
    x, _ = batch()
    model = engined(network(name), memory)
    model(x)
    for stage in stages(model, x):
        _check_schedules(stage, stage.dropped, stage.kept)
        sizes = choose.sizes_of(stage, stage.shapes, 8, "cpu")
        assert set(sizes.of) == {*stage.inputs, *stage.producers}
        for second in (True, False):
            assert choose.peak(stage, stage.kept, sizes, second) > 0


def test_the_account_counts_less_where_less_is_kept() -> None:
    x, _ = batch(8, 40)
    peaks = []
    for memory in ("fast", "lean"):
        model = engined(network("residual"), memory)
        model(x)
        (stage,) = stages(model, x)
        sizes = choose.sizes_of(stage, stage.shapes, 8, "cpu")
        peaks.append(choose.peak(stage, stage.kept, sizes, True))
    assert peaks[1] < peaks[0]


def test_a_schedule_that_lets_go_too_early_would_be_seen() -> None:
    """The walk itself is tested: actions in a wrong order do not pass."""
    x, _ = batch()
    model = engined(copy.deepcopy(network("residual")), "lean")
    model(x)
    (stage,) = stages(model, x)
    actions = keep.schedule(stage, stage.kept, tuple(stage.units), True, frozenset())
    position = next(i for i, a in enumerate(actions) if a.verb == "drop")
    first = next(i for i, a in enumerate(actions) if a.verb == "again")
    wrong = [actions[position], *actions[:position], *actions[position + 1 :]]
    for broken in (wrong, [*actions, actions[position]], actions[:first] + actions[first + 1 :]):
        with pytest.raises(AssertionError):
            Walk(stage, {*stage.inputs, *stage.kept}).follow(broken, frozenset())
