"""Rewriting the forward of containers: what is fused, and what hooks see."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from swapping import (
    Block,
    assert_same_step,
    counting,
    groups,
    images,
    net,
    randomize_norms,
    small_network,
    twins,
)
from torch import Tensor, nn

import camkernels as ck


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("functional", [False, True])
def test_small_network(functional: bool, training: bool) -> None:
    swapped, plain = twins(small_network(functional))
    swapped.train(training), plain.train(training)
    with counting("conv_bn_act") as counts:
        assert_same_step(swapped, plain, images())
    assert counts["conv_bn_act"] == 5


FORWARDS: dict[str, tuple[Callable[..., Any], list[str]]] = {}


def forward(*expected: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        FORWARDS[function.__name__] = (function, list(expected))
        return function

    return register


@forward("conv + bn + relu()")
def functional_relu(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.bn(self.conv(x)), inplace=True)


@forward("conv + bn + relu()")
def method_relu(self: Any, x: Tensor) -> Tensor:
    return self.bn(self.conv(x)).relu()


@forward("conv + bn")
def bn_output_used_twice(self: Any, x: Tensor) -> Tensor:
    y = self.bn(self.conv(x))
    return self.relu(y) + y


@forward("bn + relu")
def conv_output_used_twice(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    return self.relu(self.bn(y)) + y


@forward("bn + relu")
def before_the_convolution(self: Any, x: Tensor) -> Tensor:
    return self.conv(self.relu(self.bn(x)))


@forward("conv + bn + add")
def sum_without_relu(self: Any, x: Tensor) -> Tensor:
    return x + self.bn(self.conv(x))


@forward("conv + bn + add + relu")
def sum_in_place(self: Any, x: Tensor) -> Tensor:
    y = self.bn(self.conv(x))
    y += x
    return self.relu(y)


@forward("conv + bn")
def sum_into_the_residual(self: Any, x: Tensor) -> Tensor:
    s = x * 2
    s += self.bn(self.conv(x))
    return self.relu(s)


@forward("conv + bn")
def weighted_sum(self: Any, x: Tensor) -> Tensor:
    return torch.add(self.bn(self.conv(x)), x, alpha=2).relu()


@forward("conv + bn")
def sum_with_a_number(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn(self.conv(x)) + 1)


@forward("conv + bn")
def sum_with_itself(self: Any, x: Tensor) -> Tensor:
    y = self.bn(self.conv(x))
    return self.relu(y + y)


@forward("conv + bn + add + relu")
def residual_is_broadcast(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn(self.conv(x)) + x.mean((2, 3), keepdim=True))


@forward()
def input_changed_in_between(self: Any, x: Tensor) -> Tensor:
    x = x * 1
    y = self.conv(x)
    x.mul_(2)
    return self.relu(self.bn(y) + 0 * x)


@forward("conv + bn + add + relu")
def input_changed_before(self: Any, x: Tensor) -> Tensor:
    x = x * 1
    x.mul_(2)
    return self.relu(self.bn(self.conv(x)) + x)


@forward()
def residual_changed_through_a_view(self: Any, x: Tensor) -> Tensor:
    s = x * 1
    y = self.bn(self.conv(x)) + s
    s.view(-1).mul_(3)
    return self.relu(y) + s


@forward("conv + bn + relu")
def in_place_on_a_name(self: Any, x: Tensor) -> Tensor:
    y = x * 1
    z = y
    y += 1
    return self.relu(self.bn(self.conv(y))) + z


@forward("conv + bn + relu")
def counts_pixels(self: Any, x: Tensor) -> Tensor:
    n = x.size(2)
    m = n
    n += 1
    return self.relu(self.bn(self.conv(x))) * m / n


@forward()
def one_bn_twice(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn(self.relu(self.bn(self.conv(x)))))


@pytest.mark.parametrize("name", FORWARDS)
@pytest.mark.parametrize("training", [True, False])
def test_groups_of_a_forward(name: str, training: bool) -> None:
    function, expected = FORWARDS[name]
    swapped, plain = twins(net(function).train(training))
    assert groups(swapped) == expected
    x = images()
    torch.testing.assert_close(*[m(x.clone()) for m in (swapped, plain)], rtol=1e-9, atol=1e-9)
    if name != "input_changed_in_between":  # whose backward is an error with PyTorch as well
        assert_same_step(swapped, plain, x)


def test_one_relu_at_many_places() -> None:
    swapped, plain = twins(Block().double())
    assert groups(swapped) == ["conv1 + bn1 + relu", "conv2 + bn2 + add + relu"]
    assert_same_step(swapped, plain, torch.randn(2, 4, 6, 6, dtype=torch.float64))


def test_residual_of_another_shape_runs_module_by_module() -> None:
    def broadcasts(self: Any, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)) + x.mean((2, 3), keepdim=True))

    swapped, plain = twins(net(broadcasts))
    with counting("conv_bn_act", "conv2d") as counts:
        assert_same_step(swapped, plain, images())
    assert counts == {"conv_bn_act": 0, "conv2d": 1}


def test_functional_relus_outside_groups_are_guided() -> None:
    def relus(self: Any, x: Tensor) -> Tensor:
        return F.relu(torch.relu(self.conv(x)) - 0.1).relu_()

    model = ck.swap_in(net(relus).double())
    assert ck.swap_report(model).functional_relus == {"": 3}
    x = images().requires_grad_()
    out = model(x).sum()
    with ck.modes.guided():
        (guided,) = torch.autograd.grad(-out, x, retain_graph=True)
    (plain,) = torch.autograd.grad(-out, x)
    assert float(guided.abs().max()) == 0.0  # the rule drops a negative signal
    assert float(plain.abs().max()) > 0.0


# --- hooks ----------------------------------------------------------------------------------------


class Recorder:
    """Hooks of every kind on every module; what they see, in order."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[tuple[str, str, list[Tensor]]] = []
        self.handles: list[Any] = []
        for name, module in model.named_modules():
            add = self.handles.append
            add(module.register_forward_pre_hook(self._keep("pre", name)))
            add(module.register_forward_hook(self._keep("forward", name)))
            if not getattr(module, "inplace", False):
                add(module.register_full_backward_pre_hook(self._keep("backward pre", name)))
                add(module.register_full_backward_hook(self._keep("backward", name)))

    def _keep(self, kind: str, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, *values: Any) -> None:
            flat = [
                v for group in values for v in (group if isinstance(group, tuple) else (group,))
            ]
            kept = [v.detach().clone() for v in flat if isinstance(v, Tensor)]
            self.seen.append((kind, name, kept))

        return hook


def not_in_place(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model


def test_hooks_of_every_kind_see_what_they_saw() -> None:
    class OutOfPlace(Block):
        def forward(self, x: Tensor) -> Tensor:
            out = self.relu(self.bn1(self.conv1(x)))
            return self.relu(self.bn2(self.conv2(out)) + x)

    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), OutOfPlace(), OutOfPlace()
    )
    swapped, plain = twins(not_in_place(randomize_norms(model)))
    x = images()
    recorders = [Recorder(m) for m in (swapped, plain)]
    for m in (swapped, plain):
        m(x.clone().requires_grad_()).square().sum().backward()
    mine, theirs = (r.seen for r in recorders)
    assert [(k, n) for k, n, _ in mine] == [(k, n) for k, n, _ in theirs]
    for (kind, name, a), (_, _, b) in zip(mine, theirs, strict=True):
        assert len(a) == len(b), (kind, name)
        for u, v in zip(a, b, strict=True):
            torch.testing.assert_close(u, v, rtol=1e-9, atol=1e-9)


def test_modules_run_in_their_order_where_somebody_looks() -> None:
    """A group runs at the place of its last node; with a hook inside, each module at its own."""
    swapped, plain = twins(_downsampling())
    orders = []
    for model in (swapped, plain):
        order: list[str] = []
        for name, module in model.named_modules():
            module.register_forward_hook(lambda *_, n=name, order=order: order.append(n))
        model(images())
        orders.append(order)
    assert orders[0] == orders[1]


def _downsampling() -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    block = torchvision.models.resnet.BasicBlock
    downsample = nn.Sequential(nn.Conv2d(3, 8, 1, 2, bias=False), nn.BatchNorm2d(8))
    return randomize_norms(block(3, 8, 2, downsample))


def test_a_hook_that_changes_an_output_counts() -> None:
    swapped, plain = twins(small_network())
    for model in (swapped, plain):
        model[1].bn2.register_forward_hook(lambda m, i, o: o * 2)
    assert_same_step(swapped, plain, images())


def test_hooks_for_all_modules_and_their_removal() -> None:
    swapped, plain = twins(small_network())
    names: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda m, i, o: names.append(type(m).__name__)
    )
    try:
        with counting("conv_bn_act") as counts:
            assert_same_step(swapped, plain, images())
        assert counts["conv_bn_act"] == 0
        half = len(names) // 2
        assert names[:half] == names[half:]
    finally:
        handle.remove()
    with counting("conv_bn_act") as counts:
        swapped(images())
    assert counts["conv_bn_act"] == 5


def test_one_hook_stops_the_fusion_of_its_group_only() -> None:
    swapped = ck.swap_in(small_network())
    swapped[1].bn1.register_forward_hook(lambda *_: None)
    with counting("conv_bn_act") as counts:
        swapped(images().float())
    assert counts["conv_bn_act"] == 4


def test_grad_cam_at_a_layer_inside_a_group() -> None:
    swapped, plain = twins(small_network())
    maps = []
    for model in (swapped, plain):
        torch.manual_seed(0)
        with ck.GradCAM(model, "2.conv2") as cam:
            maps.append(cam(model(images()), torch.tensor([1, 2])))
    torch.testing.assert_close(*maps, rtol=1e-9, atol=1e-9)
