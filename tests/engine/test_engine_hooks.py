"""Hooks in a network that the engine runs: what they see, what they replace, what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine.engine_cases import (
    assert_same_gradients,
    assert_same_step,
    batch,
    eager_step,
    engine_step,
    engined,
    gradients_of,
    network,
    stages,
)
from torch import Tensor, nn

import camkernels as ck
from camkernels import backends
from camkernels.engine import EngineError

pytestmark = pytest.mark.skipif(
    backends.unavailable_reason("cpu") is not None, reason="needs the C++ kernels"
)
# Convolution, BatchNorm, ReLU in place, pool, containers, head, and the network.
PLACES = (
    "0", "1", "2", "3", "4", "4.conv1", "4.bn1", "4.bn2", "4.relu", "5", "5.downsample",
    "5.downsample.1", "5.bn3", "6", "7.relu", "8", "10", "",
)  # fmt: skip


def _no_in_place(model: nn.Module) -> nn.Module:
    """Eager hooks otherwise see what an operation after them has written over."""
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model


def pair(memory: str = "fast") -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    model = _no_in_place(network())
    return engined(model, memory), model, *batch()


@pytest.mark.parametrize("place", PLACES)
def test_a_hook_sees_what_it_saw(place: str) -> None:
    model, twin, x, target = pair()
    seen: list[list[Tensor]] = []
    for m in (model, twin):
        mine: list[Tensor] = []

        def hook(module: nn.Module, inputs: Any, output: Tensor, mine: Any = mine) -> None:
            mine.extend([inputs[0].detach().clone(), output.detach().clone()])

        m.get_submodule(place).register_forward_hook(hook)
        m(x)
        seen.append(mine)
    assert len(seen[0]) == len(seen[1]) > 0
    if place.endswith("bn2"):  # eager: out += x writes into what the hook saw, after it
        assert len(seen[0]) == 2
    for mine, theirs in zip(*seen, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)
    assert_same_step(engine_step(model, x, target), eager_step(twin, x, target))


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("place", PLACES[:-1])
def test_what_a_hook_returns_is_used(place: str, memory: str) -> None:
    model, twin, x, target = pair(memory)
    for m in (model, twin):
        m.get_submodule(place).register_forward_hook(lambda module, inputs, output: output * 1.5)
    assert_same_step(engine_step(model, x, target), eager_step(twin, x, target))


def test_a_penalty_on_activations_of_hooks() -> None:
    model, twin, x, target = pair()
    found = []
    for m in (model, twin):
        kept: list[Tensor] = []
        for place in ("4", "4.conv1", "6"):
            m.get_submodule(place).register_forward_hook(lambda _, i, o, kept=kept: kept.append(o))
        logits = m(x)
        score = logits.gather(1, target[:, None]).sum()
        first = torch.autograd.grad(score, kept, create_graph=True)
        loss = sum(
            (g.mean((2, 3), keepdim=True) * a).sum().square()
            for g, a in zip(first, kept, strict=True)
        )
        found.append(gradients_of(m, F.cross_entropy(logits, target) + loss))
    assert_same_gradients(*found)


def test_a_hook_that_cuts_the_graph() -> None:
    model, twin, x, target = pair()
    for m in (model, twin):
        m.get_submodule("4.conv2").register_forward_hook(lambda module, inputs, o: o.detach())
    assert_same_step(engine_step(model, x, target), eager_step(twin, x, target))


def test_hooks_come_and_go() -> None:
    model, twin, x, target = pair()
    calls: list[int] = []
    for _ in range(2):
        assert len(stages(model, x)) == 1
        handle = model.get_submodule("5").register_forward_hook(lambda *a: calls.append(1))
        assert_same_step(engine_step(model, x, target), eager_step(twin, x, target))
        handle.remove()
        assert_same_step(engine_step(model, x, target), eager_step(twin, x, target))
    assert len(calls) == 2


def test_hooks_with_keywords_and_in_order() -> None:
    model, _, x, _ = pair()
    calls: list[str] = []
    block = model.get_submodule("4")
    block.register_forward_hook(lambda m, i, k, o: calls.append("with"), with_kwargs=True)
    block.register_forward_hook(lambda m, i, o: calls.append("without"))
    block.get_submodule("conv1").register_forward_hook(lambda m, i, o: calls.append("inside"))
    model(x)
    assert calls == ["inside", "with", "without"]


class Normalize(nn.Module):
    """A container that reads buffers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((3, 1, 1), 0.3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.mean


def test_hooks_on_a_container_that_reads_a_buffer() -> None:
    twin = nn.Sequential(Normalize(), network())
    model = engined(twin)
    x, target = batch()
    assert_same_step(engine_step(model, x, target), eager_step(twin, x, target))
    calls: list[int] = []
    for m in (model, twin):
        m[0].register_forward_hook(lambda module, inputs, output: calls.append(1) or output * 2)  # type: ignore[index]
    assert_same_step(engine_step(model, x, target), eager_step(twin, x, target))
    assert len(calls) == 2
    model[0].register_forward_pre_hook(lambda module, inputs: None)  # type: ignore[index]
    with pytest.raises(EngineError, match=r"0 \(Normalize\)"):
        model(x)


REFUSED: dict[str, Callable[[nn.Module], Any]] = {
    "forward pre-hook": lambda m: m.register_forward_pre_hook(lambda *a: None),
    "backward hook": lambda m: m.register_full_backward_hook(lambda *a: None),
    "backward pre-hook": lambda m: m.register_full_backward_pre_hook(lambda *a: None),
}


@pytest.mark.parametrize("place", ["4", "4.conv1", "5.downsample.1", "4.relu"])
@pytest.mark.parametrize("kind", REFUSED)
def test_hooks_that_are_refused(kind: str, place: str) -> None:
    model, _, x, _ = pair()
    handle = REFUSED[kind](model.get_submodule(place))
    with pytest.raises(EngineError, match=rf"{place} \(.*ck\.swap_in\(model\)"):
        model(x)
    handle.remove()
    model(x)


def test_hooks_for_all_modules_are_refused() -> None:
    model, _, x, _ = pair()
    handle = nn.modules.module.register_module_forward_hook(lambda *a: None)
    try:
        with pytest.raises(EngineError, match="hooks for all modules"):
            model(x)
    finally:
        handle.remove()
    model(x)


@pytest.mark.parametrize("place", ["", "10", "8"])
def test_any_hook_on_the_network_and_on_its_head(place: str) -> None:
    model, twin, x, target = pair()
    calls: dict[str, int] = {}
    for name, m in (("ours", model), ("theirs", twin)):
        module = m.get_submodule(place)

        def count(*a: Any, name: str = name) -> None:
            calls[name] = calls.get(name, 0) + 1

        module.register_forward_pre_hook(count)
        module.register_forward_hook(count)
        module.register_full_backward_hook(count)
        module.register_full_backward_pre_hook(count)
        F.cross_entropy(m(x.clone().requires_grad_()), target).backward()
    assert calls["ours"] == calls["theirs"] == 4
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("layer", ["2", "4", "4.conv2", "6", "7", ["4", "7"]])
@pytest.mark.parametrize("no_grad", [False, True])
def test_grad_cam_maps(layer: str | list[str], no_grad: bool) -> None:
    model, twin, x, target = pair()
    model.eval(), twin.eval()
    found = []
    for m in (model, copy.deepcopy(twin)):
        with ck.GradCAM(m, layer) as explain, torch.set_grad_enabled(not no_grad):
            logits = m(x)
            found.append((logits.detach(), explain(logits, target)))
    (logits, maps), (logits_, maps_) = found
    torch.testing.assert_close(logits, logits_, rtol=1e-11, atol=1e-11)
    for one, other in zip(*(m if isinstance(m, list) else [m] for m in (maps, maps_)), strict=True):
        assert bool(other.any())
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
