"""Tracing is refused where a graph would not be the whole forward, and repeated on a change."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from swapping import (
    assert_same_step,
    counting,
    images,
    net,
    reason,
    small_network,
    twins,
    usual,
)
from torch import Tensor, nn

import camkernels as ck


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


COUNTER = [0]
FLAG = True


def _random(self: Any, x: Tensor) -> Tensor:
    return usual(self, x) * torch.rand(1)


def _python_random(self: Any, x: Tensor) -> Tensor:
    return usual(self, x) if random.random() < 2 else x


def _numpy_random(self: Any, x: Tensor) -> Tensor:
    return usual(self, x) * float(np.random.rand())


def _own_generator(self: Any, x: Tensor) -> Tensor:
    return usual(self, x) * self.generator.random()


def _counts(self: Any, x: Tensor) -> Tensor:
    self.calls = getattr(self, "calls", 0) + 1
    return usual(self, x)


def _appends(self: Any, x: Tensor) -> Tensor:
    self.history.append(1)
    return usual(self, x)


def _global_list(self: Any, x: Tensor) -> Tensor:
    COUNTER.append(1)
    return usual(self, x)


def _no_grad(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = self.conv(x)
    return self.relu(self.bn(x))


@torch.no_grad()
def _no_grad_decorator(self: Any, x: Tensor) -> Tensor:
    return usual(self, x)


def _asks_grad_mode(self: Any, x: Tensor) -> Tensor:
    return usual(self, x) if torch.is_grad_enabled() else x


def _checkpoint(self: Any, x: Tensor) -> Tensor:
    from torch.utils.checkpoint import checkpoint

    return checkpoint(lambda y: usual(self, y), x, use_reentrant=False)


def _data_dependent(self: Any, x: Tensor) -> Tensor:
    return usual(self, x) if x.sum() > 0 else self.conv(x)


def _constant(self: Any, x: Tensor) -> Tensor:
    return usual(self, x) + torch.ones(1, dtype=torch.float64)


def _prints(self: Any, x: Tensor) -> Tensor:
    print("shape", x.shape)
    return usual(self, x)


def _plain_tensor(self: Any, x: Tensor) -> Tensor:
    return usual(self, x) * float(self.scale[0])


def _buffer_value(self: Any, x: Tensor) -> Tensor:
    return usual(self, x) * float(self.bn.num_batches_tracked)


def _tries(self: Any, x: Tensor) -> Tensor:
    try:
        return usual(self, x) if x.sum() > 0 else self.conv(x)
    except Exception:
        return x


def _type_of_intermediate(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    return self.relu(self.bn(y)) if isinstance(y, Tensor) else y


REFUSED: list[tuple[Callable[..., Any], str]] = [
    (_random, "random"),
    (_python_random, "random"),
    (_numpy_random, "random"),
    (_own_generator, "type Generator"),
    (_counts, "self.calls"),
    (_appends, "self.history"),
    (_global_list, "COUNTER"),
    (_no_grad, "grad_mode"),
    (_no_grad_decorator, "grad_mode"),
    (_asks_grad_mode, "is_grad_enabled"),
    (_checkpoint, "checkpoint"),
    (_data_dependent, "cannot trace"),
    (_constant, "does not depend"),
    (_prints, "print"),
    (_plain_tensor, "tensor that is neither"),
    (_buffer_value, "cannot trace"),
    (_tries, "try block"),
    (_type_of_intermediate, "type of an intermediate"),
]


@pytest.mark.parametrize(("function", "why"), REFUSED, ids=lambda v: getattr(v, "__name__", ""))
def test_refused(function: Callable[..., Any], why: str) -> None:
    attributes = {
        "history": [],
        "scale": torch.ones(1),
        "generator": np.random.default_rng(0),
    }
    model = net(function, **attributes)
    before = dict(model.__dict__)
    rng = torch.get_rng_state(), random.getstate(), np.random.get_state()[2]
    swapped, plain = twins(model)
    assert torch.equal(rng[0], torch.get_rng_state())
    assert (rng[1], rng[2]) == (random.getstate(), np.random.get_state()[2])
    assert why in reason(swapped), reason(swapped)
    assert dict(swapped.__dict__) == before
    assert swapped.history == []
    assert type(swapped.conv) is ck.nn.Conv2d
    if function is _no_grad_decorator:
        assert not swapped(images()).requires_grad
        return
    if function in (_own_generator, _numpy_random, _python_random):
        return  # the two sides would draw different numbers
    assert_same_step(swapped, plain, images())


# --- what changes after the swap ------------------------------------------------------------------


def test_switch_of_mode() -> None:
    def by_mode(self: Any, x: Tensor) -> Tensor:
        y = usual(self, x)
        return y if self.training else F.relu(y * 2 - self.conv(x))

    swapped, plain = twins(net(by_mode))
    for training in (True, False, True, False):
        swapped.train(training), plain.train(training)
        assert_same_step(swapped, plain, images())


def test_changed_attribute_global_and_method() -> None:
    def by_attribute(self: Any, x: Tensor) -> Tensor:
        y = usual(self, x)
        if self.double_it:
            y = y * 2
        for factor in self.factors:
            y = y * factor
        if hasattr(self, "extra"):
            y = y + 1
        return y if FLAG else -y

    swapped, plain = twins(net(by_attribute, double_it=False, factors=[1.0, 3.0]))
    changes: list[Callable[[Any], None]] = [
        lambda m: setattr(m, "double_it", True),
        lambda m: m.factors.append(0.5),
        lambda m: setattr(m, "extra", 1),
        lambda m: globals().__setitem__("FLAG", False),
    ]
    assert_same_step(swapped, plain, images())
    try:
        for change in changes:
            for model in (swapped, plain):
                change(model)
            with counting("conv_bn_act") as counts:
                assert_same_step(swapped, plain, images())
            assert counts["conv_bn_act"] == 1
    finally:
        globals()["FLAG"] = True


def test_child_replaced_after_the_swap() -> None:
    swapped, plain = twins(small_network())
    replacement = nn.Conv2d(4, 4, 1).double()
    for model in (swapped, plain):
        model[1].conv1 = copy.deepcopy(replacement)
        model[2].relu = nn.LeakyReLU(0.1)
        model[5] = nn.Identity()
    assert_same_step(swapped, plain, images())
    ck.swap_in(swapped)
    assert type(swapped[1].conv1) is ck.nn.Conv2d
    assert_same_step(swapped, plain, images())


def test_layer_appended_after_the_swap() -> None:
    swapped, plain = twins(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    for model in (swapped, plain):
        model.append(nn.Tanh())
    assert_same_step(swapped, plain, images())


def test_forward_of_the_class_replaced_after_the_swap() -> None:
    swapped, plain = twins(net(usual))
    type(swapped).forward = lambda self, x: self.conv(x) * 2
    assert_same_step(swapped, plain, images())


def test_a_forward_that_never_settles_runs_as_it_is() -> None:
    def reads(self: Any, x: Tensor) -> Tensor:
        return usual(self, x) * self.factor

    swapped, plain = twins(net(reads, factor=1.0))
    x = images()
    for step in range(40):
        swapped.factor = plain.factor = float(step)
        torch.testing.assert_close(swapped(x), plain(x))


def test_arguments() -> None:
    def options(self: Any, x: Tensor, scale: float = 1.0, *more: Tensor, skip: bool = False) -> Any:
        y = self.relu(self.bn(self.conv(x))) * scale
        for other in more:
            y = y + other
        return (y, x) if skip else y

    swapped, plain = twins(net(options))
    x = images()
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((x,), {}),
        ((), {"x": x}),
        ((x, 2.0), {}),
        ((x, 2.0, x, x), {}),
        ((x,), {"skip": True}),
        ((x, torch.tensor(3.0, dtype=torch.float64)), {}),
    ]
    for args, kwargs in calls:
        with counting("conv_bn_act") as counts:
            mine = swapped(*args, **kwargs)
        theirs = plain(*args, **kwargs)
        torch.testing.assert_close(mine, theirs)
        assert counts["conv_bn_act"] == 1


def test_tensor_or_list_as_in_densenet() -> None:
    def tensor_or_list(self: Any, x: Any) -> Tensor:
        parts = [x] if isinstance(x, Tensor) else x
        return self.relu(self.bn(self.conv(torch.cat(parts, 1))))

    swapped, plain = twins(net(tensor_or_list))
    x = images()
    for value in (x, list(x.split(1, 1)), [x[:, :1], x[:, 1:]]):
        torch.testing.assert_close(swapped(value), plain(value))
