"""Rewriting the forward of containers: what is fused, what is refused, and what is never lost."""

from __future__ import annotations

import copy
import io
import pickle
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from swapping import (
    Block,
    assert_same_step,
    counting,
    images,
    randomize_norms,
    small_network,
    twins,
)
from torch import Tensor, nn

import camkernels as ck
from camkernels.nn._rewritten import RewrittenForward


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


class Net(nn.Module):
    """conv, bn and relu, and a forward that the test gives."""

    def __init__(self, forward: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()
        randomize_norms(self)


def net(forward: Callable[..., Any], **attributes: Any) -> Net:
    """A Net whose class has ``forward``."""
    result = type("Net", (Net,), {"forward": forward})()
    for name, value in attributes.items():
        setattr(result, name, value)
    return result


def usual(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn(self.conv(x)))


def groups(model: nn.Module) -> list[str]:
    return [g for found in ck.swap_report(model).fused.values() for g in found]


def reason(model: nn.Module, name: str = "") -> str:
    return ck.swap_report(model).left_alone.get(name, "")


# --- what is fused --------------------------------------------------------------------------------


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


# --- tracing is refused where a graph would not be the whole forward -----------------------------------

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


# --- what changes after the swap ----------------------------------------------------------------------


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


# --- copies, files, and back --------------------------------------------------------------------------


def test_swap_out_restores_classes_and_forwards() -> None:
    model = small_network()
    classes = [type(m) for m in model.modules()]
    attributes = [set(m.__dict__) for m in model.modules()]
    forwards = [m.forward for m in model.modules()]
    parameters = [id(p) for p in model.parameters()]
    keys = list(model.state_dict())
    ck.swap_in(ck.swap_in(model))
    assert classes != [type(m) for m in model.modules()]
    assert parameters == [id(p) for p in model.parameters()]
    assert keys == list(model.state_dict())
    ck.swap_out(ck.swap_out(model))
    assert classes == [type(m) for m in model.modules()]
    assert attributes == [set(m.__dict__) for m in model.modules()]
    assert forwards == [m.forward for m in model.modules()]


def test_swap_out_leaves_modules_that_people_wrote() -> None:
    model = ck.swap_out(ck.swap_in(nn.Sequential(ck.nn.ReLU(save="output"), nn.ReLU())))
    assert [type(m) for m in model] == [ck.nn.ReLU, nn.ReLU]
    assert model[0].save == "output"


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, _saved, lambda m: pickle.loads(pickle.dumps(m))], ids="dsp"
)
def test_copies(copied: Callable[[nn.Module], nn.Module]) -> None:
    swapped, plain = twins(small_network())
    x = images()
    swapped(x), plain(x)
    other = copied(swapped)
    for module in other.modules():
        installed = module.__dict__.get("forward")
        assert installed is None or installed.container is module
    assert (
        sum(isinstance(m.__dict__.get("forward"), RewrittenForward) for m in other.modules()) == 3
    )
    with torch.no_grad():  # nothing is shared
        for p in swapped.parameters():
            p.zero_()
    with counting("conv_bn_act") as counts:
        assert_same_step(other, plain, *[torch.ones(2, 3, 12, 12, dtype=torch.float64)])
    assert counts["conv_bn_act"] == 5
    torch.testing.assert_close(ck.swap_out(other).state_dict(), plain.state_dict())


def test_to_another_dtype() -> None:
    swapped, plain = twins(small_network())
    swapped.float(), plain.float()
    x = images().float()
    torch.testing.assert_close(swapped(x), plain(x), rtol=1e-4, atol=1e-5)


def test_optimizer_made_before_the_swap() -> None:
    model = small_network().double()
    plain = copy.deepcopy(model)
    steps = []
    for m in (model, plain):
        optimizer = torch.optim.SGD(m.parameters(), 0.1)
        if m is model:
            ck.swap_in(m)
        torch.manual_seed(0)
        for _ in range(3):
            optimizer.zero_grad()
            m(images()).square().sum().backward()
            optimizer.step()
        steps.append(list(m.parameters()))
    for a, b in zip(*steps, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_shared_modules() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block(3)
            self.again = self.block
            self.relu = self.block.relu

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.again(self.block(x)) - 1)

    swapped, plain = twins(randomize_norms(Shared()))
    assert_same_step(swapped, plain, images())


def test_torch_fx_before_and_not_after() -> None:
    swapped, plain = twins(torch.fx.symbolic_trace(small_network()))
    assert len(groups(swapped)) == 5
    assert_same_step(swapped, plain, images())
    with pytest.raises(TypeError, match=r"torch.fx cannot trace a network after ck.swap_in"):
        torch.fx.symbolic_trace(swapped[0] if isinstance(swapped, nn.Sequential) else swapped)
    with pytest.raises(TypeError, match=r"torch.fx cannot trace a network after ck.swap_in"):
        torch.fx.symbolic_trace(ck.swap_in(small_network()))


def test_torch_jit_trace_gives_plain_operations() -> None:
    swapped, plain = twins(small_network().eval())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(swapped, images())
    x = images(3)
    torch.testing.assert_close(traced(x), plain(x))


def test_data_parallel_replicas_are_refused() -> None:
    swapped = ck.swap_in(small_network())
    with pytest.raises(TypeError, match="DistributedDataParallel"):
        swapped[1]._replicate_for_data_parallel()
