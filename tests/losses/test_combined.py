"""Several criteria in one: values, gradients, what each sees, what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import camkernels as ck


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv3 = nn.Conv2d(6, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)
        self.relu1, self.relu3 = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        logits: Tensor = self.fc(self.relu3(self.conv3(x)).mean((2, 3)))
        return logits


BOXES = torch.tensor([[2, 1, 9, 8], [0, 0, 12, 12], [3, 4, 8, 8]])
FLIPS = torch.tensor([True, False, False])


def views(batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    return BOXES, FLIPS


def entropy(model: nn.Module, **options: Any) -> ck.CAMEntropyLoss:
    return ck.CAMEntropyLoss(model, "relu3", beta=0.7, **options)


def area(model: nn.Module, **options: Any) -> ck.CAMEntropyLoss:
    return ck.CAMEntropyLoss(model, "relu3", beta=0.2, regularizer="area", **options)


def consistency(model: nn.Module, **options: Any) -> ck.CAMConsistencyLoss:
    return ck.CAMConsistencyLoss(
        model, "relu3", alpha=0.9, beta=0.01, transform=views, window_size=3, **options
    )


def gradient(model: nn.Module, **options: Any) -> ck.InterpretableGradientLoss:
    return ck.InterpretableGradientLoss(model, weight=0.8, **options)


MAKERS = {"consistency": consistency, "entropy": entropy, "gradient": gradient, "area": area}


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return ck.swap_in(Chain().double())


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(3, 3, 12, 12, dtype=torch.float64), torch.tensor([0, 3, 4])


def gradients(
    net: nn.Module, batch: tuple[Tensor, Tensor], make: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    model = copy.deepcopy(net)
    criterion = make(model)
    loss = criterion(model(batch[0]), batch[1])
    loss.backward()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad
             for n, p in model.named_parameters()}  # fmt: skip
    return loss.detach(), found


@pytest.mark.parametrize(
    "names",
    [
        ("entropy", "gradient"),
        ("consistency", "gradient"),
        ("consistency", "entropy", "gradient", "area"),
        ("area", "entropy"),
    ],
    ids="+".join,
)
def test_the_sum_of_the_regularisers(
    net: nn.Module, batch: tuple[Tensor, Tensor], names: tuple[str, ...]
) -> None:
    """Each on its own copy, less the cross-entropy that all but one count again."""
    plain_loss, plain = gradients(net, batch, lambda m: nn.CrossEntropyLoss())
    alone = [gradients(net, batch, MAKERS[name]) for name in names]
    loss, found = gradients(
        net, batch, lambda m: ck.CombinedLoss({name: MAKERS[name](m) for name in names})
    )
    again = len(names) - 1
    torch.testing.assert_close(loss, sum(one for one, _ in alone) - again * plain_loss)
    for name, value in found.items():
        expected = sum(grads[name] for _, grads in alone) - again * plain[name]
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11, msg=name)
        if name in ("conv1.weight", "conv3.weight"):  # each one teaches the convolutions
            assert all((grads[name] - plain[name]).abs().max() > 1e-7 for _, grads in alone)


def test_terms_and_weights(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    criterion = ck.CombinedLoss({"c": consistency(net), "e": entropy(net), "g": gradient(net)})
    assert list(criterion) == ["e", "g", "c"]  # the one that makes a forward is asked last
    images, targets = batch
    criterion(net(images), targets)
    terms = criterion.terms
    assert {"cross_entropy", "e/entropy", "c/consistency", "g/gradient_error"} <= set(terms)
    assert "e/cross_entropy" not in terms
    cross_entropy, rest = criterion.parts(net(images), targets)
    torch.testing.assert_close(cross_entropy.detach(), criterion.terms["cross_entropy"])
    assert rest is not None
    criterion["e"].beta = criterion["g"].weight = criterion["c"].alpha = criterion["c"].beta = 0.0
    assert criterion.parts(net(images), targets)[1] is None
    logits = net(images)
    assert torch.equal(criterion(logits, targets), nn.functional.cross_entropy(logits, targets))
    criterion.close()
    assert not net._forward_pre_hooks
    assert not net._forward_hooks


def test_the_view_asks_no_gradient_of_its_images(
    net: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    """The input tap leaves the forward of the views alone: no leaf, nothing counted."""
    seen = []
    net.conv1.register_forward_pre_hook(lambda m, args: seen.append(args[0].requires_grad))  # type: ignore[operator]
    criterion = ck.CombinedLoss({"g": gradient(net), "c": consistency(net)})
    criterion(net(batch[0]), batch[1]).backward()
    assert seen == [True, False]
    assert criterion["g"].calls == 1
    assert batch[0].grad is None


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_through_the_engine(net: nn.Module, batch: tuple[Tensor, Tensor], memory: str) -> None:
    torch.manual_seed(2)
    plain = Chain().double()

    def make(model: nn.Module, **options: Any) -> Any:
        model = ck.swap_in(model, **options)
        names = ("entropy", "consistency", "gradient")
        return ck.CombinedLoss({name: MAKERS[name](model) for name in names})

    loss, found = gradients(plain, batch, make)
    other_loss, other = gradients(plain, batch, lambda m: make(m, engine=True, memory=memory))
    torch.testing.assert_close(loss, other_loss)
    for name, value in found.items():
        torch.testing.assert_close(other[name], value, rtol=1e-8, atol=1e-10, msg=name)


def test_what_is_refused(net: nn.Module) -> None:
    other = copy.deepcopy(net)
    combined: Any = ck.CombinedLoss
    for criteria, error, message in (
        ({}, ValueError, "criteria: expected at least one"),
        ({"a": nn.CrossEntropyLoss()}, TypeError, "got CrossEntropyLoss as 'a'"),
        ({"a": entropy(net), "b": gradient(other)}, ValueError, "'a' and 'b' are criteria of diff"),
        (
            {"a": entropy(net), "b": gradient(net, label_smoothing=0.1)},
            ValueError,
            "label_smoothing: .*'a' has 0.0, 'b' has 0.1",
        ),
        (
            {"a": entropy(net, weight=torch.ones(5)), "b": gradient(net)},
            ValueError,
            "weight: 'a' and 'b' have different class weights",
        ),
        ({"a": consistency(net), "b": consistency(net)}, ValueError, "'a', 'b' would each make"),
        (
            {"a": consistency(net, views="joint"), "b": entropy(net)},
            ValueError,
            "views: 'a' joins pictures",
        ),
    ):
        with pytest.raises(error, match=message):
            combined(criteria)
    alike = torch.ones(5)
    combined({"a": entropy(net, weight=alike), "b": gradient(net, class_weight=alike.clone())})


def test_copies(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    criterion = ck.CombinedLoss({"e": entropy(net), "g": gradient(net)})
    model, again = copy.deepcopy((net, criterion))
    loss = criterion(net(batch[0]), batch[1])
    assert torch.equal(again(model(batch[0]), batch[1]), loss)
