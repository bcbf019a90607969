"""How long the engine holds what a forward left, with the collector of cycles off."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine.engine_cases import batch, engined, network
from torch import Tensor, nn

import camkernels as ck
from camkernels import backends
from camkernels.engine import function
from camkernels.engine.passes import Run

pytestmark = pytest.mark.skipif(
    backends.unavailable_reason("cpu") is not None, reason="needs the C++ kernels"
)


def penalty(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    score = F.cross_entropy(model(leaf), target)
    (delta,) = torch.autograd.grad(score, leaf, create_graph=True)
    return score + delta.square().sum().sqrt()


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[weakref.ref[Run]]]:
    """Weak references to the runs of the test; cycles are not collected in it."""
    found: list[weakref.ref[Run]] = []

    def made(*args: Any) -> Run:
        run = Run(*args)
        found.append(weakref.ref(run))
        return run

    monkeypatch.setattr(function, "Run", made)
    gc.collect()
    gc.disable()
    yield found
    gc.enable()


def test_a_loss_that_is_dropped_frees_its_run(runs: list[weakref.ref[Run]]) -> None:
    model, (x, target) = engined(network()), batch()
    loss: Tensor | None = F.cross_entropy(model(x), target)
    loss = penalty(model, x, target)
    assert runs[-1]() is not None
    assert loss is not None
    criterion = ck.InterpretableGradientLoss(model)
    for go_backward in (False, True):
        loss = criterion(model(x), target)
        if go_backward:
            loss.backward()
    del loss
    assert len(runs) == 4
    assert [run() for run in runs] == [None] * 4


def test_a_finished_backward_frees_what_was_held(runs: list[weakref.ref[Run]]) -> None:
    model, (x, target) = engined(network()), batch()
    logits = model(x)
    run = runs[0]()
    assert run is not None
    assert run.held
    F.cross_entropy(logits, target).backward()
    assert not run.held
    assert not run.state


def test_hooks_between_stages_leave_no_cycle(runs: list[weakref.ref[Run]]) -> None:
    model, (x, target) = engined(network()), batch()
    model[4].register_forward_hook(lambda module, inputs, output: None)  # type: ignore[index]
    loss: Tensor | None = penalty(model, x, target)
    assert len(runs) == 2
    assert loss is not None
    loss.backward()
    loss = None
    assert [run() for run in runs] == [None] * 2


def test_nothing_is_kept_without_gradients(runs: list[weakref.ref[Run]]) -> None:
    twin, (x, _) = network(training=False), batch()
    model = engined(twin)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(model(x), twin(x), rtol=1e-12, atol=1e-12)
        assert runs[-1]() is None
        assert not model(x[:2]).is_inference()
    torch.testing.assert_close(model(x), twin(x), rtol=1e-12, atol=1e-12)
