"""swap_in(engine=True): what stays, what copies, what is noticed afterwards, what is refused."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine.engine_cases import (
    assert_same_buffers,
    assert_same_step,
    batch,
    eager_step,
    engine_step,
    engined,
    everything_dropped,
    gradients_of,
    network,
    stages,
)
from torch import Tensor, nn

import camkernels as ck
from camkernels import backends
from camkernels.engine import BudgetError, EngineError

pytestmark = pytest.mark.skipif(
    backends.unavailable_reason("cpu") is not None, reason="needs the C++ kernels"
)
WAY_OUT = r"ck\.swap_in\(model\) without engine=True"


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    found: nn.Module = torch.load(file, weights_only=False)
    return found


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "save": _saved,
}


def _state(model: nn.Module) -> list[Any]:
    """All that swapping or tracing could change, the values of tensors aside."""
    return [
        (
            type(m),
            m.training,
            {k for k in m.__dict__ if k != "forward"},
            type(m.__dict__.get("forward")),
        )
        for m in model.modules()
    ]


# --- what stays ----------------------------------------------------------------------------------


def test_state_dict() -> None:
    model = network()
    keys, parameters = list(model.state_dict()), [id(p) for p in model.parameters()]
    before = copy.deepcopy(model.state_dict())
    assert ck.swap_in(model, engine=True) is model
    assert keys == list(model.state_dict())
    assert parameters == [id(p) for p in model.parameters()]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    x, target = batch()
    engine_step(model, x, target)
    other = network("residual")
    other.load_state_dict(model.state_dict())
    model.load_state_dict(other.state_dict())
    assert_same_step(engine_step(model, x, target), eager_step(other, x, target))


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("how", COPIES)
def test_copies(how: str, used: bool) -> None:
    twin, (x, target) = network(), batch()
    model = engined(twin, "lean")
    if used:
        model(x), twin(x)
    other = COPIES[how](model)
    forward = other.__dict__["forward"]
    assert forward.model is other
    with torch.no_grad():  # nothing is shared
        for p in model.parameters():
            p.zero_()
    assert_same_step(engine_step(other, x, target), eager_step(twin, x, target))
    assert_same_buffers(other, twin)
    assert any(stage.dropped for stage in stages(other, x)), "the copy has lost its memory mode"
    assert not any("forward" in m.__dict__ for m in ck.swap_out(other).modules())


def test_swap_out_and_in_again() -> None:
    model, (x, target) = network(), batch()
    twin = copy.deepcopy(model)
    before = _state(model)
    ck.swap_in(model, engine=True)
    assert ck.swap_report(model).engine
    ck.swap_out(model)
    assert _state(model) == before
    assert not ck.swap_report(model).engine
    for memory in ("lean", "fast", "lean"):
        ck.swap_in(model, engine=True, memory=memory)
        assert_same_step(engine_step(model, x, target), eager_step(twin, x, target))
        assert any(stage.dropped for stage in stages(model, x)) == (memory == "lean")
    ck.swap_in(model)  # without the engine
    assert not ck.swap_report(model).engine
    assert_same_step(engine_step(model, x, target), eager_step(twin, x, target))


# --- what is noticed -----------------------------------------------------------------------------


def test_modes_that_change() -> None:
    model, (x, target) = network(), batch()
    ours = engined(model)
    for training in (True, False, True, False):
        for m in (ours, model):
            m.train(training)
        assert_same_step(engine_step(ours, x, target), eager_step(model, x, target))
        assert_same_buffers(ours, model)
    for m in (ours, model):  # one module alone
        m.train()
        m.get_submodule("4.bn1").eval()
    assert_same_step(engine_step(ours, x, target), eager_step(model, x, target))
    assert_same_buffers(ours, model)


REPLACED: dict[str, Callable[[], nn.Module]] = {
    "10": lambda: nn.Linear(8, 7).double(),
    "4.conv1": lambda: nn.Conv2d(8, 8, 5, padding=2, bias=True).double(),
    "4.bn1": nn.Identity,
    "3": lambda: nn.AvgPool2d(2),
    "5.downsample.1": lambda: nn.BatchNorm2d(6, affine=False).double(),
}


@pytest.mark.parametrize("place", REPLACED)
def test_replaced_modules_are_noticed(place: str) -> None:
    model, (x, target) = network(), batch()
    ours = engined(model)
    engine_step(ours, x, target), model(x)
    fresh = REPLACED[place]()
    parent, _, name = place.rpartition(".")
    for m in (ours, model):
        setattr(m.get_submodule(parent), name, copy.deepcopy(fresh))
    assert_same_step(engine_step(ours, x, target), eager_step(model, x, target))


def test_a_module_that_cannot_be_planned_put_in_later() -> None:
    model, (x, _) = engined(network()), batch()
    model(x)
    model.get_submodule("4").relu = nn.GELU()
    with pytest.raises(EngineError, match=rf"4\.relu.*GELU.*{WAY_OUT}"):
        model(x)


def test_parameters_cast_and_replaced() -> None:
    model, (x, target) = network(), batch()
    ours = engined(model).float()
    ours(x.float())
    ours.double()
    with torch.no_grad():
        for mine, theirs in zip(
            ours.state_dict().values(), model.state_dict().values(), strict=True
        ):
            mine.copy_(theirs)
    for m in (ours, model):
        m.get_submodule("4.conv1").weight = nn.Parameter(model.get_parameter("4.conv1.weight") * 2)
    assert_same_step(engine_step(ours, x, target), eager_step(model, x, target))


def test_dropout_draws_what_it_drew() -> None:
    torchvision = pytest.importorskip("torchvision")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torchvision.models.squeezenet1_1(num_classes=5, dropout=0.5).double().train()
    ours = engined(model)
    x, target = batch(2, 40)
    found = []
    for m in (ours, model):
        torch.manual_seed(7)
        logits = m(x)
        found.append((gradients_of(m, F.cross_entropy(logits, target)), torch.get_rng_state()))
    assert torch.equal(found[0][1], found[1][1])
    for name, value in found[1][0].items():
        torch.testing.assert_close(found[0][0][name], value, rtol=1e-9, atol=1e-12)
    assert not torch.equal(ours(x), ours(x))
    assert_same_step(engine_step(ours, x, target), eager_step(model, x, target))


# --- memory --------------------------------------------------------------------------------------


def test_memory_is_checked() -> None:
    for memory in ("small", 0, -5, True, 1.5, ""):
        with pytest.raises(ValueError, match=r"memory: expected one of fast, lean, lean-bf16"):
            ck.swap_in(network(), engine=True, memory=memory)  # type: ignore[arg-type]
    for memory in ("fast", 10**9):
        with pytest.raises(ValueError, match="memory: belongs to the engine"):
            ck.swap_in(network(), memory=memory)


def test_a_number_of_bytes() -> None:
    model, (x, target) = network(), batch()
    expected = eager_step(copy.deepcopy(model), x, target)
    small = engined(model, 1)
    with pytest.raises(BudgetError, match=r"memory=1: .* needs at least \d+ bytes") as caught:
        small(x)
    least = int(str(caught.value).split("at least ")[1].split()[0])
    counts = []
    for memory in (least, 2 * least, 10**9):
        ours = engined(model, memory)
        assert_same_step(engine_step(ours, x, target), expected)
        counts.append(sum(len(stage.dropped) for stage in stages(ours, x)))
    assert counts[0] > 0 == counts[2]
    with pytest.raises(BudgetError):
        engined(model, least - 1)(x)
    with torch.no_grad():
        small(x)  # nothing is kept


def test_everything_droppable_is_more_than_lean() -> None:
    model, (x, target) = network(), batch()
    ours, lean = engined(model, "lean"), engined(model, "lean")
    engine_step(lean, x, target)
    with everything_dropped():
        engine_step(ours, x, target)
    (more,), (less,) = stages(ours, x), stages(lean, x)
    assert len(more.dropped) > len(less.dropped) > 0


# --- what is refused -----------------------------------------------------------------------------


class Squeeze(nn.Module):
    """x sigmoid(...), as in squeeze-and-excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc(self.pool(x)))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if float(x.sum()) > 0 else x


class BranchingNetwork(Branching):
    """Itself what cannot be traced."""


def _with(middle: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), middle, nn.Conv2d(8, 8, 3), nn.ReLU()
    ).double()  # fmt: skip


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "squeeze and excitation": (lambda: _with(Squeeze()), r"3\.pool \(AdaptiveAvgPool2d\)"),
    "gelu": (lambda: _with(nn.GELU()), r"3 \(GELU\)"),
    "sigmoid gate": (
        lambda: _with(type("Gate", (nn.Module,), {"forward": lambda s, x: x * torch.sigmoid(x)})()),
        r"3\.sigmoid \(sigmoid\)",
    ),
    "circular padding": (
        lambda: _with(nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")), r"3 \(Conv2d\)",
    ),
    "data-dependent block": (lambda: _with(Branching()), r"3 \(Branching\)"),
    "data-dependent network": (BranchingNetwork, "forward of BranchingNetwork cannot be traced"),
    "transposed convolution": (lambda: _with(nn.ConvTranspose2d(8, 8, 3)), r"3 \(ConvTranspose2d"),
    "GroupNorm": (lambda: _with(nn.GroupNorm(2, 8)), r"3 \(GroupNorm\)"),
    "no convolution": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(3, 3), nn.ReLU()), "no 2d convolution",
    ),
}  # fmt: skip


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_refusals_leave_the_network_as_it_was(case: str, swapped: bool) -> None:
    make, where = REFUSED[case]
    model = make()
    list(model.modules())[-1].eval()  # a mode of its own
    if swapped:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ck.swap_in(model)
    before = _state(model)
    with pytest.raises(EngineError, match=rf"engine: .*{where}.*{WAY_OUT}") as caught:
        ck.swap_in(model, engine=True)
    assert isinstance(caught.value, ValueError)
    assert _state(model) == before


def test_refusals_leave_an_engine_as_it_was() -> None:
    model, (x, target) = network(), batch()
    ours = engined(model, "lean")
    before = _state(ours)
    with pytest.raises(ValueError, match="memory"):
        ck.swap_in(ours, engine=True, memory="tiny")
    with pytest.raises(ValueError, match="memory"):
        ck.swap_in(ours, memory="fast")
    assert _state(ours) == before
    assert_same_step(engine_step(ours, x, target), eager_step(model, x, target))


def test_wrapped_networks_are_refused() -> None:
    model = network()
    before = _state(model)
    for wrapped in (nn.DataParallel(model), nn.Sequential(nn.DataParallel(model))):
        with pytest.raises(TypeError, match="already wrapped in DataParallel"):
            ck.swap_in(wrapped, engine=True)
    assert _state(model) == before
    with pytest.raises(TypeError, match="DistributedDataParallel"):
        engined(model)._replicate_for_data_parallel()  # type: ignore[operator]


class Allocating(nn.Module):
    """Its forward makes more lists than Python has at hand, so that garbage is collected in it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        held = [[[[x], [x]], [[x], [x]]] for _ in range(200)]
        return self.conv(held[0][0][0][0])


def test_what_the_garbage_collector_runs_is_no_part_of_a_forward() -> None:
    seen = SimpleNamespace(calls=0)

    def callback(phase: str, info: dict[str, int]) -> None:
        seen.calls += 1  # a write, which a forward may not do

    threshold = gc.get_threshold()
    gc.callbacks.append(callback)
    gc.set_threshold(1)
    try:
        model = engined(_with(Allocating()))
        model(batch()[0])
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(callback)
    assert seen.calls
    assert gc.isenabled()


def test_patched_forwards_are_refused() -> None:
    model = network()
    block = model.get_submodule("4")
    block.forward = block.forward  # type: ignore[method-assign]
    with pytest.raises(EngineError, match=r"4 \(Block\).*patched"):
        ck.swap_in(model, engine=True)


def test_inputs_of_another_kind_are_refused() -> None:
    model, (x, _) = engined(network("plain")), batch()
    with pytest.raises(TypeError, match=r"\(B, C, H, W\)"):
        model(x[0])
    with pytest.raises(TypeError, match="floating"):
        model((x * 100).to(torch.uint8))
