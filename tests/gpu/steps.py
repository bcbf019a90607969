"""What the tests of a GPU run: a small network with each criterion, and where they run."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import camkernels as ck

CLASSES = 5
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available")
ON_GPU = [pytest.mark.gpu, needs_cuda]
# Device and backend; auto takes Triton on a GPU, where this says so by name.
ON_CPU, BY_TRITON, BY_CUDA = ("cpu", "auto"), ("cuda", "triton"), ("cuda", "cuda")
PLACES = (ON_CPU, BY_TRITON, BY_CUDA)


class Residual(nn.Module):
    """Convolution, BatchNorm, the input added, ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn, self.relu = nn.BatchNorm2d(channels), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)) + x)


def network(device: str) -> nn.Module:
    """The same weights at every call."""
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    layers = OrderedDict(
        stem=nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1)),
        features=Residual(16),
        pool=nn.AdaptiveAvgPool2d(1),
        flat=nn.Flatten(),
        fc=nn.Linear(16, CLASSES),
    )
    return nn.Sequential(layers).to(device).train()


def batch(device: str, count: int = 6, size: int = 32, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, size, size, generator=generator)
    targets = torch.randint(CLASSES, (count,), generator=generator)
    return images.to(device), targets.to(device)


class Step:
    """Loss and gradients of all parameters, the latter made from None."""

    def __init__(self, model: nn.Module, criterion: nn.Module) -> None:
        self.model, self.criterion = model, criterion
        self.parameters = list(model.parameters())

    def clear(self) -> None:
        for p in self.parameters:
            p.grad = None

    def __call__(self, images: Tensor, targets: Tensor) -> list[Tensor]:
        self.clear()
        loss = self.criterion(self.model(images), targets)
        loss.backward()
        found = [p.grad for p in self.parameters if p.grad is not None]
        self.clear()
        return [loss.detach(), *found]


def _views(count: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Fixed crops, on the device that is current: a copy from the host cannot be captured."""
    box = torch.tensor([[height // 8, width // 8, height // 2, width // 2]])
    return box.repeat(count, 1), torch.arange(count) % 2 == 1


def _entropy(head: str) -> Callable[[str], Step]:
    def make(device: str) -> Step:
        model = network(device)
        return Step(model, ck.CAMEntropyLoss(model, "features", beta=0.5, head=head))

    return make


def _consistency(device: str) -> Step:
    model = network(device)
    boxes, flips = (t.to(device) for t in _views(64, 32, 32))

    def draw(count: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        return boxes[:count], flips[:count]

    return Step(model, ck.CAMConsistencyLoss(model, "features", 1.0, 1e-2, transform=draw))


def _interpretable(engine: str | None) -> Callable[[str], Step]:
    def make(device: str) -> Step:
        model = network(device)
        if engine is None:
            model = ck.swap_in(model)
        else:
            model = ck.swap_in(model, engine=True, memory=engine)
        return Step(model, ck.InterpretableGradientLoss(model, "cosine", 10.0))

    return make


STEPS: dict[str, Callable[[str], Step]] = {
    "entropy": _entropy("auto"),
    "entropy by autograd": _entropy("autograd"),
    "consistency": _consistency,
    "interpretable": _interpretable(None),
    "engine fast": _interpretable("fast"),
    "engine lean": _interpretable("lean"),
}
OF_CUDA = ("entropy", "entropy by autograd")
"""Those of whose ops every one has CUDA kernels."""
every_step = pytest.mark.parametrize("kind", list(STEPS))


def place(name: tuple[str, str], *before: str) -> Any:
    """A set of parameters that ends in a device and a backend."""
    return pytest.param(*before, *name, marks=ON_GPU if name[0] == "cuda" else ())


def every_step_at(*places: tuple[str, str]) -> pytest.MarkDecorator:
    """Kind, device and backend of each step that has kernels there."""
    found = [
        place(name, kind) for name in places for kind in STEPS if name != BY_CUDA or kind in OF_CUDA
    ]
    return pytest.mark.parametrize(("kind", "device", "backend"), found)


def using(backend: str) -> ck.backend:
    """For a ``with``; the test is skipped where the backend cannot work."""
    reason = ck.backends.unavailable_reason(backend)
    if reason is not None:
        pytest.skip(f"backend {backend}: {reason}")
    return ck.backend(backend)  # type: ignore[arg-type]


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    """To the bit."""
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


def close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-3) -> None:
    """In the Euclidean norm, of each tensor or of all, whichever is kinder: gradients of biases
    before a BatchNorm are nothing but rounding."""
    assert len(found) == len(expected)
    whole = max(float(t.double().norm()) for t in expected[1:])
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        size = float(y.double().norm()) if i == 0 else max(float(y.double().norm()), 1e-3 * whole)
        error = float((x.double() - y.double().to(x.device)).norm())
        assert error <= tolerance * size, f"tensor {i}: {error:.2e} of {size:.2e}"
