"""Steps through whole networks by the engine, against eager float64 double backpropagation."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from engine.engine_cases import (
    CLASSES,
    SMALL,
    Step,
    assert_same_buffers,
    assert_same_gradients,
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

torchvision = pytest.importorskip("torchvision", reason="the networks are torchvision's")
pytestmark = pytest.mark.skipif(
    backends.unavailable_reason("cpu") is not None, reason="needs the C++ kernels"
)
MEMORY = pytest.mark.parametrize("memory", ["fast", "lean"])


def _tv(name: str) -> Callable[[], nn.Module]:
    return lambda: getattr(torchvision.models, name)(num_classes=CLASSES)


def _vgg() -> nn.Module:
    model: nn.Module = _tv("vgg11_bn")()
    model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, CLASSES)
    return model


# How to make it, and the side of its images.
LARGE: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (_tv("resnet18"), 40),
    "squeezenet1_1": (_tv("squeezenet1_1"), 40),
    "resnet50": (_tv("resnet50"), 64),
    "vgg11_bn": (_vgg, 48),
    "densenet121": (_tv("densenet121"), 64),
}
SLOW = {"resnet50", "vgg11_bn", "densenet121"}


def _disturbed(model: nn.Module, x: Tensor, gammas: bool = True) -> nn.Module:
    """Some gammas zero, some negative; running statistics as of ``x``."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        for module in norms:
            draw = torch.rand(module.num_features)
            if gammas:
                module.weight[draw < 0.1] = 0.0
                module.weight[draw > 0.8] *= -1
            module.bias += 0.3 * torch.randn(module.num_features)
            module.momentum = 1.0
        model.train()(x)
        for module in norms:
            module.momentum = 0.1
            module.running_mean += 0.1 * module.running_var.sqrt() * torch.randn_like(module.bias)
    return model


@lru_cache(maxsize=1)
def _problem(name: str, training: bool) -> tuple[nn.Module, nn.Module, Tensor, Tensor, Step]:
    """The network, its twin after a step, images, targets, and what the step found."""
    make, side = LARGE[name]
    x, target = batch(3, side)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = _disturbed(make().double(), x.flip(3)).train(training)
    twin = copy.deepcopy(model)
    return model, twin, x, target, eager_step(twin, x, target)


def _cross_entropy_gradients(model: nn.Module, x: Tensor, target: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(2)  # of dropout
    return gradients_of(model, F.cross_entropy(model(x), target))


@MEMORY
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in LARGE]
)
def test_networks_that_people_train(name: str, training: bool, memory: str) -> None:
    model, twin, x, target, expected = _problem(name, training)
    ours = engined(model, memory)
    assert_same_step(engine_step(ours, x, target), expected)
    assert_same_buffers(ours, twin)
    twin = copy.deepcopy(model)
    alone, mine = (_cross_entropy_gradients(m, x, target) for m in (twin, ours))
    assert_same_gradients(mine, alone)
    largest = max(float(g.abs().max()) for g in expected.gradients.values())
    assert max(float(g.abs().max()) for g in alone.values()) < 0.5 * largest


@pytest.mark.parametrize("memory", ["fast", "lean", "everything dropped"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SMALL)
def test_small_networks(name: str, training: bool, memory: str) -> None:
    model = network(name, training)
    twin = copy.deepcopy(model)
    x, target = batch()
    expected = eager_step(twin, x, target)
    ours = engined(model, "lean" if memory == "everything dropped" else memory)
    if memory == "everything dropped":
        with everything_dropped():
            found = engine_step(ours, x, target)
        assert sum(len(stage.dropped) for stage in stages(ours, x)) >= 1
    else:
        found = engine_step(ours, x, target)
    assert_same_step(found, expected)
    assert_same_buffers(ours, twin)


def test_lean_plans_drop_convolutions_and_fast_ones_do_not() -> None:
    x, target = batch()
    for name in SMALL:
        counts = []
        for memory in ("fast", "lean"):
            model = engined(network(name), memory)
            engine_step(model, x, target)
            counts.append(sum(len(stage.dropped) for stage in stages(model, x)))
        assert counts[0] == 0 < counts[1], name


@MEMORY
@pytest.mark.parametrize("name", SMALL)
def test_cross_entropy_alone(name: str, memory: str) -> None:
    for training in (True, False):
        model = network(name, training)
        twin = copy.deepcopy(model)
        x, target = batch()
        ours = engined(model, memory)
        found = gradients_of(ours, F.cross_entropy(ours(x), target))
        assert_same_gradients(found, gradients_of(twin, F.cross_entropy(twin(x), target)), 1e-11)
        assert_same_buffers(ours, twin)


@MEMORY
@pytest.mark.parametrize(
    "options",
    [
        {"layer": "layer4"},
        {"layer": "layer3"},
        {"layer": "layer2", "head": "autograd"},
        {"layer": ["layer3", "layer4"], "head": "autograd"},
        {"layer": ["layer2", "layer4"], "regularizer": "dispersion"},
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_cam_entropy(options: dict[str, object], memory: str) -> None:
    torch.manual_seed(0)
    x, target = batch(3, 64)
    model = _disturbed(_tv("resnet18")().double(), x.flip(3))
    found = []
    for candidate in (engined(model, memory), copy.deepcopy(model)):
        criterion = ck.CAMEntropyLoss(candidate, beta=100.0, **options)  # type: ignore[arg-type]
        loss = criterion(candidate(x), target)
        assert float(criterion.terms["live"]) > 1
        found.append((loss, gradients_of(candidate, loss), criterion.head))
    (loss, gradients, head), (loss_, gradients_, head_) = found
    assert head.split()[0] == head_.split()[0]
    torch.testing.assert_close(loss, loss_, rtol=1e-11, atol=1e-11)
    assert_same_gradients(gradients, gradients_)


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_storage_is_close(name: str) -> None:
    x, target = batch()
    model = network(name).float()
    found = []
    for memory in ("fast", "lean-bf16"):
        ours = engined(model, memory)
        criterion = ck.InterpretableGradientLoss(ours, weight=1e3)
        loss = criterion(ours(x.float()), target)
        regularizer = loss - F.cross_entropy(ours(x.float()), target)
        found.append(gradients_of(ours, regularizer))
        assert all(g.dtype == torch.float32 for g in found[-1].values())
    a, b = (torch.cat([g.flatten().double() for g in f.values()]) for f in found)
    assert float((a - b).norm() / a.norm()) < 1e-2
    assert float(F.cosine_similarity(a, b, dim=0)) > 0.999
    if name != "plain":  # it has no BatchNorm, whose tensors are stored in bfloat16
        assert not torch.equal(a, b)
