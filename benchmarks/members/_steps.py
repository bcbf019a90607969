"""Models, batches and sides that the benchmarks of training steps share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks import loops
from benchmarks.harness import Options, Side, SidesDisagreeError, UnsupportedError

CLASSES = 1000
Maker = Callable[[nn.Module], tuple[loops.Loop, Callable[[], None]]]


def network(name: str) -> nn.Module:
    """A network of torchvision in train mode, from a fixed seed."""
    try:
        from torchvision import models
    except (ImportError, RuntimeError) as error:
        raise UnsupportedError(f"torchvision does not import ({error})") from error
    torch.manual_seed(0)
    model: nn.Module = getattr(models, name)(weights=None)
    return model.train()


def batch(count: int, size: int, options: Options, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Images (count, 3, size, size) and targets (count,), from a fixed seed."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, size, size, generator=generator)
    targets = torch.randint(CLASSES, (count,), generator=generator)
    return images.to(options.device, dtype), targets.to(options.device)


def side(model: nn.Module, maker: Maker, images: Tensor, targets: Tensor) -> Side:
    """Loss forward, then all parameter gradients in the order of the parameters' names: made from
    None, as after ``zero_grad``, and dropped by who times the step."""
    loop, close = maker(model)
    parameters = tuple(p for _, p in sorted(model.named_parameters()))

    def backward(loss: Tensor) -> list[Tensor]:
        loss.backward()
        gradients = [p.grad for p in parameters if p.grad is not None]
        for p in parameters:
            p.grad = None
        return gradients

    return Side(lambda: loop(images, targets), backward, parameters, close)


def check_maps(ours: Side, theirs: Side, what: str) -> None:
    """Raise unless the maps of both sides, scaled to [0, 1], agree to 1e-3; closes them."""
    found, expected = (side.results()[0] for side in (ours, theirs))
    for one in (ours, theirs):
        if one.close is not None:
            one.close()
    error = float((found - expected).abs().max())
    if not error <= 1e-3:
        raise SidesDisagreeError(f"{what}: maps differ by {error:.2g}")
