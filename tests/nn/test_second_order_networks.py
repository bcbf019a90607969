"""Double backpropagation through the networks people train, swapped, against eager float64 twins.

The loss is the paper's with a weight that makes the regulariser dominate, or its errors hide under
the cross-entropy: CE + 1e3 mean(1 - cos(delta, delta_G)), delta_G guided and detached. The twin
runs PyTorch's own modules with ReLUs that a switch makes guided, functional ones too.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import largest_difference, parameter_gradients
from nn import eager
from torch import Tensor, nn

import camkernels as ck
from camkernels import backends

torchvision = pytest.importorskip("torchvision", reason="the networks are torchvision's")
timm = pytest.importorskip("timm", reason="two networks are timm's")
pytestmark = pytest.mark.skipif(
    backends.unavailable_reason("cpu") is not None, reason="needs the C++ kernels"
)
CLASSES, WEIGHT = 10, 1e3


def _tv(name: str) -> Callable[[], nn.Module]:
    return lambda: getattr(torchvision.models, name)(num_classes=CLASSES)


def _vgg() -> nn.Module:
    model: nn.Module = _tv("vgg11_bn")()
    model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, CLASSES)
    return model


def _timm(name: str) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=CLASSES)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (_tv("resnet18"), 64),
    "resnet50": (_tv("resnet50"), 64),
    "vgg11_bn": (_vgg, 48),
    "squeezenet1_1": (_tv("squeezenet1_1"), 48),
    "densenet121": (_tv("densenet121"), 64),
    "resnet26d": (_timm("resnet26d"), 64),
    "regnetx_002": (_timm("regnetx_002"), 64),
}
SLOW = {"densenet121", "resnet50", "vgg11_bn", "resnet26d"}


@contextmanager
def switchable_relus() -> Iterator[None]:
    """Every ReLU that a forward calls inside the block has eager.SwitchableReLU's backward."""
    originals = {(m, n): getattr(m, n) for m, n in ((F, "relu"), (F, "relu_"), (torch, "relu"))}
    forward = nn.ReLU.forward

    def relu(u: Tensor, inplace: bool = False) -> Tensor:
        return eager.SwitchableReLU.apply(u)

    for module, name in originals:
        setattr(module, name, relu)
    nn.ReLU.forward = lambda self, u: relu(u)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for (module, name), original in originals.items():
            setattr(module, name, original)
        nn.ReLU.forward = forward  # type: ignore[method-assign]


def step(
    model: nn.Module, x: Tensor, target: Tensor, guided: Callable[[], AbstractContextManager[Any]]
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """delta, delta_G, the loss and the gradients of all parameters."""
    x = x.detach().requires_grad_()
    torch.manual_seed(1)  # dropout draws the same mask on both sides
    ce = F.cross_entropy(model(x), target)
    with guided():
        (teacher,) = torch.autograd.grad(ce, x, retain_graph=True)
    (delta,) = torch.autograd.grad(ce, x, create_graph=True)
    cosine = F.cosine_similarity(delta.flatten(1), teacher.flatten(1), eps=0.0)
    loss = ce + WEIGHT * (1 - cosine).mean()
    return delta.detach(), teacher, loss.detach(), parameter_gradients(model, loss)


def disturb(model: nn.Module, how: str) -> nn.Module:
    """Some gamma zero, as networks begin their residual blocks; some negative."""
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                draw = torch.rand(module.num_features, generator=generator)
                if how == "gammas":
                    module.weight[draw < 0.1] = 0.0
                    module.weight[draw > 0.8] *= -1
                module.bias += 0.3 * torch.randn(module.num_features, generator=generator)
    return model


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("how", [pytest.param("plain", marks=pytest.mark.slow), "gammas"])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in NETWORKS]
)
def test_regularised_gradients_equal_eager(name: str, how: str) -> None:
    make, side = NETWORKS[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = disturb(make().double().train(), how)
    twin = copy.deepcopy(model)
    ck.swap_in(model)
    x, target = torch.randn(3, 3, side, side, dtype=torch.float64), torch.tensor([1, 4, 7])
    delta, teacher, loss, ours = step(model, x, target, ck.guided)
    with switchable_relus():
        delta_, teacher_, loss_, theirs = step(twin, x, target, eager.eager_guided)
    largest = max(float(g.abs().max()) for g in theirs)
    error = largest_difference(ours, theirs)
    print(
        f"{name}, {how}: largest difference {error:.1e}, relative {error / largest:.1e}; "
        f"delta {relative(delta, delta_):.1e}, guided {relative(teacher, teacher_):.1e}"
    )
    assert not torch.allclose(teacher_, delta_), "the twin's guided gradient is the plain one"
    assert relative(delta, delta_) <= 1e-9
    assert relative(teacher, teacher_) <= 1e-9
    torch.testing.assert_close(loss, loss_, rtol=1e-11, atol=0)
    assert error / largest <= 1e-9
    assert error <= 1e-9 * max(1.0, largest)
    # the cross-entropy alone is a small part of what is compared
    with switchable_relus():
        torch.manual_seed(1)
        alone = parameter_gradients(twin, F.cross_entropy(twin(x), target))
    assert max(float(g.abs().max()) for g in alone) < 0.1 * largest
    for one, other in zip(model.buffers(), twin.buffers(), strict=True):
        assert one.shape == other.shape
