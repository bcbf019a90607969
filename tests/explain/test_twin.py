"""The network that asks many pictures without a gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from nets import SmallNet, batch
from torch import Tensor, nn

import camkernels as ck
from camkernels import metrics
from camkernels.explain._twin import fused_twin
from camkernels.nn import modules


def model() -> SmallNet:
    torch.manual_seed(0)
    made = SmallNet().double()
    with torch.no_grad():
        for value in (*made.parameters(), *made.buffers()):
            if value.is_floating_point():
                value.add_(torch.rand_like(value))
    return made.eval()


def test_it_computes_the_same_over_the_same_parameters() -> None:
    net, (images, _) = model(), batch()
    classes = [type(module) for module in net.modules()]
    state = {name: value.clone() for name, value in net.state_dict().items()}
    twin = fused_twin(net)
    assert isinstance(twin, nn.Module)
    assert twin is not net
    assert any(isinstance(m, modules.BatchNorm2d) for m in twin.modules())
    with torch.no_grad():
        torch.testing.assert_close(twin(images), net(images), rtol=1e-12, atol=1e-12)
        net.body[0].weight.mul_(2.0)  # a parameter that is trained on is trained on in both
        torch.testing.assert_close(twin(images), net(images), rtol=1e-12, atol=1e-12)
        net.body[0].weight.div_(2.0)
    assert [p is q for p, q in zip(twin.parameters(), net.parameters(), strict=True)]
    assert [type(module) for module in net.modules()] == classes
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name])
    assert all("forward" not in module.__dict__ for module in net.modules())


def _trains(net: nn.Module) -> None:
    net.get_submodule("body.1").train()


def _hooked(net: nn.Module) -> None:
    net.get_submodule("body").register_forward_hook(lambda *_: None)


def _patched(net: nn.Module) -> None:
    net.forward = lambda x: x.mean((2, 3))  # type: ignore[method-assign]


def _compiled(net: nn.Module) -> None:
    net.get_submodule("body").compile(backend="eager")


def _not_copied(net: nn.Module) -> None:
    net.extra = torch.ones(2, requires_grad=True) * 2  # type: ignore[assignment]


@pytest.mark.parametrize("change", [_trains, _hooked, _patched, _compiled, _not_copied])
def test_what_could_be_seen_runs_as_it_is(change: Callable[[nn.Module], None]) -> None:
    net = model()
    assert fused_twin(net) is not net
    change(net)
    assert fused_twin(net) is net


def test_a_named_backend_and_what_is_swapped_already_are_left_alone() -> None:
    net = model()
    with ck.backend("reference"):
        assert fused_twin(net) is net
    ck.swap_in(net)
    assert fused_twin(net) is net


class Counting(nn.Module):
    """Tells how many pictures it was asked about."""

    asked = 0

    def __init__(self) -> None:
        super().__init__()
        self.inner = model()

    def forward(self, x: Tensor) -> Tensor:
        type(self).asked += len(x)
        logits: Tensor = self.inner(x)
        return logits


@pytest.mark.parametrize("metric", [metrics.InsertionAUC, metrics.DeletionAUC])
def test_metrics_ask_it_and_get_the_same(metric: type[metrics.InsertionAUC]) -> None:
    net, (images, targets) = Counting().eval(), batch()
    maps = torch.rand(4, 3, 3, dtype=torch.float64)
    found = []
    for hooked in (False, True):
        handle = net.register_forward_hook(lambda *_: None) if hooked else None
        one = metric(net, steps=5)
        Counting.asked = 0
        one.update(images, maps, targets)
        assert Counting.asked == 4 * 6 + 4
        found.append(one.compute())
        if handle is not None:
            handle.remove()
    torch.testing.assert_close(found[0], found[1])
    one = metrics.class_score(net, targets, fused=True)
    with torch.no_grad():
        expected = net(images).softmax(1).gather(1, targets[:, None])[:, 0]
        torch.testing.assert_close(one(images, torch.arange(4)), expected)
