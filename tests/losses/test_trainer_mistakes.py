"""What trainers do to any criterion that they may not know of: it is right, or it is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import SmallNet, batch, parameter_gradients
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import camkernels as ck
from camkernels import backends

BOXES = torch.tensor([[0, 0, 8, 10], [1, 2, 9, 9], [2, 1, 10, 8], [0, 3, 7, 9]])
FLIPS = torch.tensor([True, False, True, False])


def _views(batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    return BOXES[:batch], FLIPS[:batch]


def _entropy(model: nn.Module) -> ck.CAMEntropyLoss:
    return ck.CAMEntropyLoss(model, "body", 2.0, "dispersion")


def _consistency(model: nn.Module, views: str = "separate") -> ck.CAMConsistencyLoss:
    return ck.CAMConsistencyLoss(
        model, "body", 5.0, 0.1, transform=_views, target="true", window_size=3, views=views
    )


def _gradient(model: nn.Module) -> ck.InterpretableGradientLoss:
    return ck.InterpretableGradientLoss(model, weight=50.0)


def _combined(model: nn.Module) -> ck.CombinedLoss:
    parts = {"e": _entropy(model), "c": _consistency(model), "g": _gradient(model)}
    return ck.CombinedLoss(parts)


# head of the network, whether and how it is swapped, and the criterion
CASES: dict[str, tuple[str, str, Callable[[nn.Module], Any]]] = {
    "entropy": ("linear", "plain", _entropy),
    "entropy-autograd": ("tanh", "plain", _entropy),
    "entropy-swapped": ("linear", "swapped", _entropy),
    "consistency": ("linear", "plain", _consistency),
    "consistency-autograd": ("tanh", "plain", _consistency),
    "joint": ("linear", "plain", lambda m: _consistency(m, "joint")),
    "gradient": ("linear", "swapped", _gradient),
    "gradient-engine": ("linear", "engine", _gradient),
    "combined": ("linear", "swapped", _combined),
    "entropy-engine": ("tanh", "engine", _entropy),
}
# They make a second forward for each call, and let go of the images after it.
ONCE = ("consistency", "consistency-autograd", "joint", "combined")


def made(case: str, network: type[SmallNet] = SmallNet) -> tuple[nn.Module, Any]:
    """The network and its criterion; the same numbers for the same case."""
    head, kind, make = CASES[case]
    if kind == "engine" and backends.unavailable_reason("cpu") is not None:
        pytest.skip("the engine needs the C++ kernels")
    torch.manual_seed(5)
    model: nn.Module = network(head).double()
    if kind != "plain":
        ck.swap_in(model, engine=kind == "engine")
    return model, make(model)


def expected(case: str, images: Tensor, targets: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of a trainer without fault."""
    model, criterion = made(case)
    loss = criterion(model(images), targets)
    return loss.detach(), parameter_gradients(model, loss)


def assert_same(model: nn.Module, loss: Tensor, truth: tuple[Tensor, list[Tensor]]) -> None:
    torch.testing.assert_close(loss.detach(), truth[0])
    found = parameter_gradients(model, loss)
    for one, other in zip(found, truth[1], strict=False):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


# -- the criterion twice ---------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_the_criterion_twice_after_one_forward(case: str) -> None:
    images, targets = batch()
    model, criterion = made(case)
    logits = model(images)
    first = criterion(logits, targets)
    if case in ONCE:
        with pytest.raises(ck.TapError, match=r"no forward has run since|stale forward"):
            criterion(logits, targets)
        return
    truth = expected(case, images, targets)
    second = criterion(logits, targets)
    torch.testing.assert_close(first, second)
    assert_same(model, (first + second) / 2, truth)
    criterion(model(images), targets)  # and the next step is none the worse


# -- DistributedDataParallel -----------------------------------------------------------------


class Unused(SmallNet):
    """Parameters that no forward reads."""

    def __init__(self, head: str = "linear") -> None:
        super().__init__(head)
        self.idle = nn.Linear(3, 3)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    if not torch.distributed.is_available():
        pytest.skip("this torch has no distributed")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("one_process")
def test_unused_parameters(case: str) -> None:
    images, targets = batch()
    truth = expected(case, images, targets)
    model, criterion = made(case, Unused)
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    for _ in range(2):
        model.zero_grad()
        loss = criterion(wrapped(images), targets)
        loss.backward()
        assert model.idle.weight.grad is None  # type: ignore[union-attr]
        for one, other in zip(model.parameters(), truth[1], strict=False):
            torch.testing.assert_close(one.grad, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_data_parallel_is_refused(case: str) -> None:
    model, _ = made(case)
    with pytest.raises(TypeError, match=r"nn\.DataParallel is not supported"):
        CASES[case][2](nn.DataParallel(model))
    replicate: Any = model._replicate_for_data_parallel  # wrapped after the criterion was made
    with pytest.raises(TypeError, match=r"nn\.DataParallel is not supported"):
        replicate()(batch()[0])


# -- checkpointing of activations ------------------------------------------------------------


class Body(nn.Sequential):
    """The first three layers, which lie below the tapped output, under a checkpoint."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        stem = nn.Sequential(*self[:3])
        found: Tensor = self[4](self[3](checkpoint(stem, x, use_reentrant=self.reentrant)))
        return found


class Checkpointed(SmallNet):
    """A part of the forward under torch.utils.checkpoint."""

    where, reentrant = "around", False

    def __init__(self, head: str = "linear") -> None:
        super().__init__(head)
        if self.where == "below":
            self.body = Body(*self.body)
            self.body.reentrant = self.reentrant

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor
        if self.where == "below":
            return super().forward(x)
        if self.where == "around":
            return self.fc(self.pool(checkpoint(self.body, x, use_reentrant=self.reentrant)))
        found = checkpoint(self._head, self.body(x), use_reentrant=self.reentrant)
        return found

    def _head(self, x: Tensor) -> Tensor:
        found: Tensor = self.fc(self.pool(x))
        return found


def checkpointed(where: str, reentrant: bool) -> type[SmallNet]:
    return type("Kind", (Checkpointed,), {"where": where, "reentrant": reentrant})


# Of reentrant checkpoints: where they stand and the case to what is refused.
ADVICE = "use_reentrant=False"
REENTRANT = {
    "below": {"gradient": ADVICE, "combined": ADVICE},
    "around": dict.fromkeys(CASES, ADVICE),
    "behind": {
        "entropy-autograd": ADVICE,
        "consistency-autograd": ADVICE,
        "gradient": ADVICE,
        "combined": ADVICE,
    },
}
COMPOSABLE = [case for case in CASES if "engine" not in case]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("where", REENTRANT)
@pytest.mark.parametrize("case", COMPOSABLE)
def test_checkpoints(case: str, where: str, reentrant: bool) -> None:
    images, targets = batch()
    truth = expected(case, images, targets)
    if reentrant:  # or nothing below has a gradient, with any criterion
        images = images.clone().requires_grad_()
    model, criterion = made(case, checkpointed(where, reentrant))
    refused = REENTRANT[where].get(case) if reentrant else None
    if refused is not None:
        with pytest.raises(ck.TapError, match=refused):
            criterion(model(images), targets)
        return
    for _ in range(2):
        loss = criterion(model(images), targets)
        torch.testing.assert_close(loss.detach(), truth[0])
        model.zero_grad()
        loss.backward()  # a reentrant checkpoint knows no torch.autograd.grad
        for one, other in zip(model.parameters(), truth[1], strict=True):
            torch.testing.assert_close(one.grad, other, rtol=1e-9, atol=1e-9)


def test_the_engine_refuses_checkpoints() -> None:
    for where in REENTRANT:
        with pytest.raises(ck.EngineError, match=r"in checkpoints|cannot be"):
            ck.swap_in(checkpointed(where, False)(), engine=True)


# -- logits that are not the model's own -----------------------------------------------------

# What a trainer makes of the logits, to how far its numbers may be off.
HARMLESS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "clone": (torch.clone, 1e-9),
    "view": (lambda t: t.view(4, -1), 1e-9),
    "float32": (Tensor.float, 1e-4),
}


@pytest.mark.parametrize("change", HARMLESS)
@pytest.mark.parametrize("case", CASES)
def test_copies_of_the_logits(case: str, change: str) -> None:
    images, targets = batch()
    truth = expected(case, images, targets)
    make, tolerance = HARMLESS[change]
    model, criterion = made(case)
    loss = criterion(make(model(images)), targets)
    torch.testing.assert_close(loss.double().detach(), truth[0], rtol=tolerance, atol=tolerance)
    for one, other in zip(parameter_gradients(model, loss), truth[1], strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_detached_logits(case: str) -> None:
    """As pipelines cut the backward in two: the loss's first, then the model's."""
    images, targets = batch()
    truth = expected(case, images, targets)
    model, criterion = made(case)
    logits = model(images)
    cut = logits.detach().requires_grad_()
    if case not in ("entropy", "entropy-swapped", "consistency"):
        refused = "with what the model returned" if case == "joint" else "not connected"
        with pytest.raises(ck.TapError, match=refused):
            criterion(cut, targets)
        return
    loss = criterion(cut, targets)
    loss.backward(retain_graph=True)
    assert cut.grad is not None
    logits.backward(cut.grad)
    torch.testing.assert_close(loss.detach(), truth[0])
    for parameter, other in zip(model.parameters(), truth[1], strict=True):
        torch.testing.assert_close(parameter.grad, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_logits_on_another_device(case: str) -> None:
    images, targets = batch()
    model, criterion = made(case)
    logits = model(images)
    with pytest.raises(ValueError, match=r"expected on cpu, where the model ran, got meta"):
        criterion(logits.to("meta"), targets.to("meta"))  # as logits.cpu() of a GPU's
    with ck.GradCAM(made("entropy")[0], "body") as cam, pytest.raises(ValueError, match="on cpu"):
        cam(cam.model(images).to("meta"), targets.to("meta"))


# -- precision -------------------------------------------------------------------------------


class Cast(SmallNet):
    """The layer's output, in a dtype of its own."""

    dtype = torch.float8_e4m3fn

    def __init__(self, head: str = "linear") -> None:
        super().__init__(head)
        self.body = nn.Sequential(self.body, _To(self.dtype))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.fc(self.pool(self.body(x).double()))
        return found


class _To(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


@pytest.mark.parametrize("case", [c for c in COMPOSABLE if "gradient" not in c])
def test_activations_of_a_dtype_without_kernels(case: str) -> None:
    images, targets = batch()
    model, criterion = made(case, Cast)
    with pytest.raises(TypeError, match="float8_e4m3fn"):
        criterion(model(images), targets)


@pytest.mark.parametrize("case", CASES)
def test_logits_of_a_wrong_dtype(case: str) -> None:
    images, targets = batch()
    model, criterion = made(case)
    logits = model(images)
    for wrong in (logits.long(), torch.complex(logits, logits)):
        with pytest.raises(ValueError, match=r"logits: expected floating-point \(B, C\), got"):
            criterion(wrong, targets)


def test_copies_of_the_model_are_no_mistake() -> None:
    """A trainer that swaps the weights by a copy (EMA) and goes on with the original."""
    images, targets = batch()
    truth = expected("entropy", images, targets)
    model, criterion = made("entropy")
    copy.deepcopy(model)(images)
    assert_same(model, criterion(model(images), targets), truth)
