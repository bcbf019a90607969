"""torch.compile: every row of docs/compile.md, and that the document has these rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from compile_cases import (
    PLACES,
    STEPS,
    TOOLS,
    Compiler,
    alike,
    consistency,
    data,
    entropy,
    gradient,
    network,
    outcome,
)
from nets import eager_loss
from torch import nn

import camkernels as ck
from camkernels import backends

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "compile.md"
pytestmark = pytest.mark.skipif(
    backends.unavailable_reason("cpu") is not None, reason="the engine needs the C++ kernels"
)


@dataclass(frozen=True)
class Row:
    """Places and tools that fare alike, with the backend "eager" and with those that compile the
    backward."""

    places: tuple[str, ...]
    tools: tuple[str, ...]
    eager: str
    compiled: str

    def cells(self) -> Iterator[tuple[str, str]]:
        return ((place, tool) for place in self.places for tool in self.tools)


WHOLE = ("torch.compile(model)", "model.compile()", "forward and criterion")
BACKWARD = "forward, criterion and backward"
TRAINED = (*WHOLE, BACKWARD)
CLOSED = (
    "CAMEntropyLoss",
    "CAMConsistencyLoss",
    "CAMConsistencyLoss, joint",
    "CombinedLoss",
    "GradCAM",
)
AUTOGRAD = ("CAMEntropyLoss, autograd", "CAMConsistencyLoss, autograd", "GradCAM, autograd")
PLAIN = "InterpretableGradientLoss"
SWAPPED = ("InterpretableGradientLoss, swap_in", "CombinedLoss, swap_in")
FIRST_ORDER = ("cross-entropy, swap_in", "CAMEntropyLoss, swap_in")
ENGINE = ("cross-entropy, engine", "CAMEntropyLoss, engine", "InterpretableGradientLoss, engine")
EXPLAINERS = ("GradCAM.explain", "ScoreCAM.explain", "InputGradient", "GuidedBackprop")
PARTS = ("below the layer", "around the layer", "the layer", "behind the layer")
RIGHT, ASIDE, TAP = "right", "right, uncompiled", "raises TapError"
TABLE = (
    Row(TRAINED, CLOSED, RIGHT, RIGHT),
    Row(TRAINED, AUTOGRAD, RIGHT, TAP),
    Row(TRAINED, (PLAIN,), RIGHT, TAP),
    Row(WHOLE, (*SWAPPED, ENGINE[2]), ASIDE, TAP),
    Row(WHOLE, (*FIRST_ORDER, *ENGINE[:2]), ASIDE, ASIDE),
    Row((BACKWARD,), (*SWAPPED, ENGINE[2]), RIGHT, TAP),
    Row((BACKWARD,), (*FIRST_ORDER, *ENGINE[:2]), RIGHT, RIGHT),
    Row(("below the layer", "the layer"), (*CLOSED, *AUTOGRAD), RIGHT, RIGHT),
    Row(("around the layer",), (*CLOSED, *AUTOGRAD), ASIDE, ASIDE),
    Row(PARTS[:3], (PLAIN,), RIGHT, TAP),
    Row(PARTS[:3], (*SWAPPED, *FIRST_ORDER), ASIDE, ASIDE),
    Row(("behind the layer",), (*CLOSED, *AUTOGRAD, PLAIN, *SWAPPED, FIRST_ORDER[1]), RIGHT, TAP),
    Row(("behind the layer",), FIRST_ORDER[:1], RIGHT, RIGHT),
    Row(PARTS, ENGINE, "raises EngineError", "raises EngineError"),
    Row((*WHOLE, *PARTS, "the criterion"), EXPLAINERS, ASIDE, ASIDE),
    Row((*WHOLE, *PARTS, "the criterion"), ("metrics",), RIGHT, RIGHT),
    Row(
        ("the criterion",),
        (FIRST_ORDER[0], ENGINE[0], "GradCAM", "GradCAM, autograd"),
        RIGHT,
        RIGHT,
    ),
    Row(
        ("the criterion",),
        (*CLOSED[:4], *AUTOGRAD[:2], FIRST_ORDER[1], *ENGINE[1:], PLAIN, *SWAPPED),
        ASIDE,
        ASIDE,
    ),
    Row(
        ("the optimizer's step",),
        (*CLOSED, *AUTOGRAD, *FIRST_ORDER, *ENGINE, PLAIN, *SWAPPED),
        RIGHT,
        RIGHT,
    ),
)
# What is right and which error comes was measured with this torch for every cell; what a compiler
# makes of the pieces between graph breaks is its own affair.
MEASURED = "2.13"
FAST = {
    ("behind the layer", "CAMEntropyLoss, autograd", "aot_eager"),
    ("behind the layer", "CAMConsistencyLoss", "eager"),
    ("behind the layer", "InterpretableGradientLoss, swap_in", "aot_eager"),
    ("below the layer", "CAMEntropyLoss, autograd", "aot_eager"),
    ("below the layer", "InterpretableGradientLoss", "eager"),
    ("below the layer", "InterpretableGradientLoss, engine", "aot_eager"),
    ("the layer", "CAMConsistencyLoss, joint", "aot_eager"),
    ("the criterion", "CAMConsistencyLoss", "aot_eager"),
    ("the criterion", "InterpretableGradientLoss", "aot_eager"),
    ("torch.compile(model)", "CAMEntropyLoss", "eager"),
    ("model.compile()", "InterpretableGradientLoss", "eager"),
    ("model.compile()", "GuidedBackprop", "eager"),
    ("model.compile()", "ScoreCAM.explain", "aot_eager"),
    ("forward and criterion", "InterpretableGradientLoss", "aot_eager"),
    ("the optimizer's step", "CAMEntropyLoss", "aot_eager"),
}
# Inductor compiles C++ for long: some cells of each outcome.
INDUCTOR = {
    ("torch.compile(model)", "CAMEntropyLoss"),
    ("torch.compile(model)", "CAMEntropyLoss, autograd"),
    ("torch.compile(model)", "cross-entropy, swap_in"),
    ("torch.compile(model)", "InterpretableGradientLoss"),
    ("below the layer", "CAMConsistencyLoss"),
    ("behind the layer", "GradCAM, autograd"),
    ("the criterion", "CAMConsistencyLoss"),
}


def cells() -> list[Any]:
    found = []
    for row in TABLE:
        for place, tool in row.cells():
            for backend in ("eager", "aot_eager", "inductor"):
                if backend == "inductor" and (place, tool) not in INDUCTOR:
                    continue
                fast = (place, tool, backend) in FAST
                expected = row.eager if backend == "eager" else row.compiled
                marks = [] if fast else [pytest.mark.slow]
                name = f"{place}-{tool}-{backend}"
                found.append(pytest.param(place, tool, backend, expected, id=name, marks=marks))
    return found


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --- the table -----------------------------------------------------------------------------------


def test_the_document_has_these_rows() -> None:
    lines = DOCUMENT.read_text().splitlines()
    first = lines.index(HEADER) + 2
    found = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        places, tools, eager, compiled = (cell.strip() for cell in line.strip("|").split("|"))
        found.append(Row(tuple(places.split("; ")), tuple(tools.split("; ")), eager, compiled))
    assert tuple(found) == TABLE


HEADER = '| what is compiled | used with | `backend="eager"` | `"aot_eager"`, `"inductor"` |'


def test_every_place_meets_every_tool_once() -> None:
    found = [cell for row in TABLE for cell in row.cells()]
    wanted = [
        (place, tool)
        for place, where in PLACES.items()
        for tool, what in TOOLS.items()
        if where.explains or not what.explains
    ]
    assert sorted(found) == sorted(wanted)
    assert {p.values[:3] for p in cells() if not p.marks} == FAST


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("place", "tool", "backend", "expected"), cells())
def test_a_cell(place: str, tool: str, backend: str, expected: str) -> None:
    found = outcome(place, tool, backend)
    if not torch.__version__.startswith(MEASURED):
        found, expected = found.partition(",")[0], expected.partition(",")[0]
    if expected.startswith("raises"):
        assert found.startswith(expected), found
        assert "torch.compile" in found, found
        assert "leave" in found, found
    else:
        assert found == expected


def test_the_truth_is_the_formula() -> None:
    """What cells are compared with, of plain autograd."""
    for head in ("linear", "tanh"):
        tool = TOOLS["CAMEntropyLoss" if head == "linear" else "CAMEntropyLoss, autograd"]
        net, twin, (images, targets) = network(tool), network(tool), data()
        tool.make(net)(net(images), targets).backward()
        eager_loss(twin, "body.layer", images, targets, 3.0, "dispersion").backward()
        for one, other in zip(net.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)


# --- beside the table ----------------------------------------------------------------------------


def test_a_frozen_compiled_head() -> None:
    """With no weight to save that requires a gradient, older torch's compiled code returns a
    constant in a backward with ``create_graph``: no second order, and no word."""
    net, (images, targets) = network(TOOLS["CAMEntropyLoss, autograd"]), data()
    tail = nn.Sequential(*net.head[2:]).requires_grad_(False)
    tail.compile(backend="aot_eager")
    net.head = nn.Sequential(*net.head[:2], tail)
    criterion = entropy(net)
    with pytest.raises(ck.TapError, match=r"torch\.compile cannot differentiate twice"):
        criterion(net(images), targets)


def test_a_criterion_made_after_the_first_compiled_forward() -> None:
    net, (images, targets) = network(TOOLS["CAMEntropyLoss"]), data()
    net.compile(backend="eager")
    net(images)
    criterion = entropy(net)
    with pytest.raises(ck.TapError, match=r"torch\._dynamo\.reset\(\)"):
        criterion(net(images), targets)
    torch._dynamo.reset()
    criterion(net(images), targets).backward()


@pytest.mark.parametrize("make", [entropy, consistency, gradient])
def test_a_full_graph_names_what_breaks_it(make: Any) -> None:
    net = network(TOOLS["InterpretableGradientLoss, swap_in"])
    criterion = make(net)
    compiled = torch.compile(criterion, backend="eager", fullgraph=True)
    logits = net(data()[0])
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"torch\.compiler\.disable"):
        compiled(logits, data()[1])


def test_suppressed_errors_hide_none_of_ours() -> None:
    net, (images, targets) = network(TOOLS["CAMEntropyLoss, autograd"]), data()
    with torch._dynamo.config.patch(suppress_errors=True):
        net.head.compile(backend="aot_eager")
        criterion = entropy(net)
        with pytest.raises(ck.TapError, match=r"torch\.compile cannot differentiate twice"):
            criterion(net(images), targets)


def test_batches_of_any_size() -> None:
    compiler = Compiler("aot_eager", dynamic=True)
    net, twin = (network(TOOLS["CAMEntropyLoss"]) for _ in range(2))
    images, targets = data()
    net.body.stem = compiler(net.body.stem)
    criterion, plain = entropy(net), entropy(twin)
    frames = []
    for size in (2, 3, 4, 2):
        found = []
        for model, loss in ((net, criterion), (twin, plain)):
            model.zero_grad()
            loss(model(images[:size]), targets[:size]).backward()
            found.append([p.grad for p in model.parameters() if p.grad is not None])
        assert alike(*found)
        frames.append(compiler.frames)
    assert frames == frames[:1] * 4


def test_what_is_compiled_in_an_engined_network_later() -> None:
    """The engine calls none of its modules, so what the module would run as matters not."""
    images, _ = data()
    net = network(TOOLS["cross-entropy, engine"])
    expected = net(images)
    compiler = Compiler("eager")
    net.body.layer.compile(backend=compiler.backend)
    torch.testing.assert_close(net(images), expected)
    assert compiler.frames == 0
    with pytest.raises(ck.EngineError, match=r"body\.layer is compiled \(torch\.compile\)"):
        ck.swap_in(net, engine=True)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["DDP(compiled)", "compiled(DDP)"])
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed")
def test_distributed_data_parallel(order: str, tmp_path: Path) -> None:
    images, targets = data()
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel = nn.parallel.DistributedDataParallel
    try:
        for tool in ("CAMEntropyLoss", "CAMEntropyLoss, autograd"):
            torch._dynamo.reset()
            compiled = Compiler("aot_eager")
            net, twin = network(TOOLS[tool]), network(TOOLS[tool])
            model: Any = parallel(compiled(net)) if order[0] == "D" else compiled(parallel(net))
            criterion = entropy(model)
            if tool != "CAMEntropyLoss":
                with pytest.raises(ck.TapError, match=r"torch\.compile cannot"):
                    criterion(model(images), targets)
                continue
            truth = entropy(twin)
            for _ in range(STEPS):
                for one, loss in ((model, criterion), (twin, truth)):
                    one.zero_grad()
                    loss(one(images), targets).backward()
                pairs = zip(net.parameters(), twin.parameters(), strict=True)
                assert all(torch.allclose(a.grad, b.grad) for a, b in pairs)  # type: ignore[arg-type]
    finally:
        torch.distributed.destroy_process_group()
