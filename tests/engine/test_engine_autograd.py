"""What autograd may ask of the engine's Functions, and in which order."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

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
    relative,
    switchable_relus,
)
from torch import Tensor, nn

import camkernels as ck
from camkernels import backends

pytestmark = pytest.mark.skipif(
    backends.unavailable_reason("cpu") is not None, reason="needs the C++ kernels"
)
MEMORY = pytest.mark.parametrize("memory", ["fast", "lean"])
NAMES = ("residual", "preactivation", "dense", "plain", "linear_bottlenecks")


def pair(
    name: str = "residual", memory: str = "fast", training: bool = True
) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    model = network(name, training)
    return engined(model, memory), model, *batch()


def delta_of(score: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(score, x, create_graph=True)[0]


def penalty(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """A loss of an input gradient and of the logits."""
    leaf = x.clone().requires_grad_()
    score = F.cross_entropy(model(leaf), target)
    return score + 50 * delta_of(score, leaf).square().sum().sqrt()


LOSSES: dict[str, Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]] = {
    "delta alone": lambda m, x, y, v: (delta_of(F.cross_entropy(m(x), y), x) * v).sum(),
    "score linear in the logits": lambda m, x, y, v: (
        delta_of(m(x).gather(1, y[:, None]).sum(), x) - v
    ).square().sum(),
    "score linear, delta linear": lambda m, x, y, v: (delta_of(m(x)[:, 1].sum(), x) * v).sum(),
    "with the logits": lambda m, x, y, v: penalty(m, x.detach(), y),
}  # fmt: skip


@MEMORY
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", NAMES)
def test_losses_by_hand(name: str, loss: str, memory: str) -> None:
    for training in (True, False):
        model, twin, x, target = pair(name, memory, training)
        v = torch.randn_like(x)
        found = []
        for m in (model, twin):
            found.append(gradients_of(m, LOSSES[loss](m, x.clone().requires_grad_(), target, v)))
        assert max(float(g.abs().max()) for g in found[1].values()) > 1e-4
        assert_same_gradients(*found)


@MEMORY
def test_the_users_own_image_gradient(memory: str) -> None:
    """x requires a gradient: that of the whole loss, through delta too, arrives."""
    for by_criterion in (False, True):
        model, twin, x, target = pair(memory=memory)
        found = []
        for m in (model, twin):
            leaf = x.clone().requires_grad_()
            if by_criterion and m is model:
                criterion = ck.InterpretableGradientLoss(m, weight=1e3)
                loss = criterion(m(leaf), target)
            elif by_criterion:
                with switchable_relus():
                    score = F.cross_entropy(m(leaf), target)
                    delta = delta_of(score, leaf)
                guided = engine_step(engined(network()), x, target).guided
                cosine = F.cosine_similarity(delta.flatten(1), guided.flatten(1), eps=0.0)
                loss = score - 1e3 * cosine.mean()
            else:
                score = F.cross_entropy(m(leaf), target)
                loss = score + 50 * delta_of(score, leaf).square().sum().sqrt()
            loss.backward()
            assert leaf.grad is not None
            found.append(leaf.grad)
        assert relative(*found) < 1e-9


def test_accumulation_over_micro_batches() -> None:
    model, twin, _, _ = pair()
    for m in (model, twin):
        for size in (3, 2):
            penalty(m, *batch(size)).backward()
    ours, theirs = ({n: p.grad for n, p in m.named_parameters()} for m in (model, twin))
    assert_same_gradients(ours, theirs)  # type: ignore[arg-type]


@MEMORY
def test_two_forwards_before_one_backward(memory: str) -> None:
    model, twin, _, _ = pair(memory=memory)
    found = [gradients_of(m, penalty(m, *batch(3)) + penalty(m, *batch(2))) for m in (model, twin)]
    assert_same_gradients(*found)


@MEMORY
def test_two_input_gradients_of_one_forward(memory: str) -> None:
    found = []
    for m, x, target in ((m, *batch()) for m in pair(memory=memory)[:2]):
        leaf = x.requires_grad_()
        logits = m(leaf)
        one = delta_of(F.cross_entropy(logits, target), leaf)
        two = delta_of(logits[:, 0].sum(), leaf)
        loss = one.square().sum().sqrt() + (one * two).sum() + two.square().sum()
        found.append(gradients_of(m, loss))
    assert_same_gradients(*found)


@MEMORY
def test_backward_twice(memory: str) -> None:
    model, twin, x, target = pair(memory=memory)
    loss = penalty(model, x, target)
    first = gradients_of(model, loss, retain_graph=True)
    second = gradients_of(model, loss, retain_graph=True)
    third = gradients_of(model, loss)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(third[name], value, rtol=1e-12, atol=1e-12)
    assert_same_gradients(first, gradients_of(twin, penalty(twin, x, target)))
    with pytest.raises(RuntimeError, match=r"retain_graph|second time"):
        gradients_of(model, loss)


def test_backward_twice_of_cross_entropy() -> None:
    model, _, x, target = pair()
    loss = F.cross_entropy(model(x), target)
    gradients_of(model, loss)
    with pytest.raises(RuntimeError, match=r"retain_graph|second time"):
        gradients_of(model, loss)


def test_parameters_changed_between_forward_and_backward() -> None:
    model, _, x, target = pair()
    for name in ("4.conv1.weight", "4.bn1.weight", "0.weight"):
        for loss in (F.cross_entropy(model(x), target), penalty(model, x, target)):
            with torch.no_grad():
                model.get_parameter(name).add_(0.1)
            with pytest.raises(RuntimeError, match=r"parameter weight of .* changed in place"):
                loss.backward()


def test_images_changed_between_forward_and_backward() -> None:
    model, _, x, target = pair()
    loss = F.cross_entropy(model(x), target)
    x += 1
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


def test_third_derivatives_raise() -> None:
    model, _, x, target = pair()
    leaf = x.requires_grad_()
    delta = delta_of(F.cross_entropy(model(leaf), target), leaf)
    with pytest.raises(RuntimeError, match="third derivative"):
        delta_of(delta.square().sum(), leaf)


def test_guided_gradients() -> None:
    model, twin, x, target = pair()
    composed = ck.swap_in(copy.deepcopy(twin))
    found = []
    for m in (model, composed):
        leaf = x.clone().requires_grad_()
        score = F.cross_entropy(m(leaf), target)
        with ck.guided():
            (guided,) = torch.autograd.grad(score, leaf, retain_graph=True)
        (plain,) = torch.autograd.grad(score, leaf, retain_graph=True)
        assert relative(plain, guided) > 1e-3
        with ck.guided(), pytest.raises(RuntimeError, match="create_graph"):
            delta_of(score, leaf)
        found.append(guided)
    assert relative(*found) < 1e-11


def test_the_double_backward_may_not_be_guided() -> None:
    model, _, x, target = pair()
    loss = penalty(model, x, target)
    with ck.guided(), pytest.raises(RuntimeError, match="guided mode while a double backward"):
        loss.backward()


def test_penalties_on_weight_gradients_raise() -> None:
    model, _, x, target = pair()
    weight = model.get_parameter("4.conv1.weight")
    (first,) = torch.autograd.grad(F.cross_entropy(model(x), target), weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="penalty on weight gradients"):
        first.square().sum().backward()


def test_weight_gradients_beside_an_input_gradient_may_be_ignored() -> None:
    found = []
    for m, x, target in ((m, *batch()) for m in pair()[:2]):
        leaf = x.requires_grad_()
        score = F.cross_entropy(m(leaf), target)
        parameters = list(m.parameters())
        delta, *first = torch.autograd.grad(score, [leaf, *parameters], create_graph=True)
        found.append(
            {
                **gradients_of(m, delta.square().sum()),
                **{str(i): g.detach() for i, g in enumerate(first)},
            }
        )
    assert_same_gradients(*found)


FREEZE: dict[str, Callable[[str], bool]] = {
    "first layers frozen": lambda n: n.startswith(("0.", "1.", "4.")),
    "only the head is trained": lambda n: not n.startswith("10."),
    "only BatchNorm is trained": lambda n: "bn" not in n and not n.startswith("1."),
    "BatchNorm is frozen": lambda n: "bn" in n or n.startswith("1."),
    "one bias is trained": lambda n: n != "4.bn1.bias",
}


@MEMORY
@pytest.mark.parametrize("how", FREEZE)
def test_frozen_parameters(how: str, memory: str) -> None:
    model = network()
    for name, p in model.named_parameters():
        p.requires_grad_(not FREEZE[how](name))
    assert any(p.requires_grad for p in model.parameters())
    x, target = batch()
    ours = engined(model, memory)
    assert_same_step(engine_step(ours, x, target), eager_step(model, x, target))
    found = [gradients_of(m, F.cross_entropy(m(x), target)) for m in (ours, model)]
    assert_same_gradients(*found)


def test_outputs_that_the_loss_does_not_depend_on() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = network("plain")[:6]  # type: ignore[index]
            self.one, self.two = nn.Conv2d(8, 4, 3), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            v = self.stem(x)
            return self.one(v).relu(), self.two(v)

    twin = TwoHeads().double()
    model = engined(twin)
    x, _ = batch()
    for which in (0, 1):
        found = []
        for m in (model, twin):
            leaf = x.clone().requires_grad_()
            delta = delta_of(m(leaf)[which].square().sum(), leaf)
            found.append(gradients_of(m, delta.square().sum()))
        assert_same_gradients(*found)
        assert not bool(found[0][f"{('two', 'one')[which]}.weight"].any())


def test_a_score_that_does_not_depend_on_the_images() -> None:
    model, _, x, target = pair()
    leaf = x.requires_grad_()
    logits = model(leaf)
    delta, guided = ck.input_gradients((logits * 0).sum() + 1, logits, leaf)
    assert not bool(delta.any())
    assert not bool(guided.any())
    (F.cross_entropy(logits, target) + delta.square().sum()).backward()


@MEMORY
def test_a_module_that_runs_twice(memory: str) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            body = network()
            self.stem, self.block, self.fc = body[:3], body[4], nn.Linear(8, 5)  # type: ignore[index]
            self.pool = nn.MaxPool2d(2)

        def forward(self, x: Tensor) -> Tensor:
            v = self.pool(self.block(self.stem(x)))
            return self.fc(self.block(self.block(v)).mean((2, 3)))

    twin = Twice().double()
    model = engined(twin, memory)
    x, target = batch()
    assert_same_step(engine_step(model, x, target), eager_step(twin, x, target))
    for mine, theirs in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


def test_an_error_between_forward_and_backward_spoils_nothing() -> None:
    model, twin, x, target = pair(training=False)
    criterion = ck.InterpretableGradientLoss(model, weight=1e3)
    logits = model(x)
    with pytest.raises(IndexError):
        criterion(logits, target + 10)
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 4, 20, 20).double())
    criterion.close()
    assert_same_step(engine_step(model, x, target), eager_step(twin, x, target))


def test_a_shortcut_past_the_stage_counts() -> None:
    """The images reach the logits on two ways, of which one is no part of the stage."""

    class Bypassed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.skip = network("plain"), nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) + self.skip(torch.tanh(x).mean((2, 3)))

    twin = Bypassed().double()
    x, target = batch()
    assert_same_step(engine_step(engined(twin), x, target), eager_step(twin, x, target))


def test_unwritten_memory_is_not_read(poisoned_allocations: None) -> None:
    for name in NAMES:
        for memory in ("fast", "lean"):
            model, _, x, target = pair(name, memory)
            found = engine_step(model, x, target)
            assert math.isfinite(float(found.loss)), name
            assert all(bool(g.isfinite().all()) for g in found.gradients.values()), name
