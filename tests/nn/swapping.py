"""What the tests of swap_in share: networks, twins and the comparison of a step."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import camkernels as ck
from camkernels.nn import functional


def twins(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A swapped network in float64 and its unswapped copy."""
    model = model.double()
    plain = copy.deepcopy(model)
    return ck.swap_in(model), plain


def randomize_norms(model: nn.Module) -> nn.Module:
    """Weights, biases and running statistics that are not 1 and 0; some weights negative, one 0."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                if module.affine:
                    module.weight.normal_(1.0, 0.5)
                    module.weight[0] = 0.0
                    module.bias.normal_(0.0, 0.5)
                if module.running_mean is not None:
                    module.running_mean.normal_(0.0, 0.3)
                    module.running_var.uniform_(0.5, 2.0)
    return model


def tensor_of(output: Any) -> Tensor:
    """The first output of a network that may have several."""
    return output if isinstance(output, Tensor) else output[0]


def assert_same_step(
    swapped: nn.Module, plain: nn.Module, *inputs: Any, tolerance: float = 1e-9
) -> None:
    """Output, gradients of all parameters and of the input, and buffers agree after one step."""
    results = []
    for model in (swapped, plain):
        mine = [_leaf(i) for i in inputs]
        state = torch.get_rng_state()
        output = tensor_of(model(*mine))
        weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)
        leaves = [i for i in mine if isinstance(i, Tensor) and i.requires_grad]
        leaves += [p for p in model.parameters() if p.requires_grad]
        found = torch.autograd.grad((output * weights).sum(), leaves, allow_unused=True)
        results.append((output, found))
        if model is swapped:
            torch.set_rng_state(state)
    (output, found), (expected, wanted) = results
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            # a bias before a BatchNorm has gradient 0, made of rounding
            scale = float(theirs.abs().max()) + 1e-3
            assert float((mine - theirs).abs().max()) < 10 * tolerance * scale
    for (name, mine), theirs in zip(swapped.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance, msg=name)


def _leaf(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.clone().requires_grad_()
    return value


@contextmanager
def counting(*names: str) -> Iterator[dict[str, int]]:
    """Calls of our functions in the block, by name."""
    counts = dict.fromkeys(names, 0)
    originals = {name: getattr(functional, name) for name in names}

    def counted(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return originals[name](*args, **kwargs)

        return call

    for name in names:
        setattr(functional, name, counted(name))
    try:
        yield counts
    finally:
        for name, original in originals.items():
            setattr(functional, name, original)


class Block(nn.Module):
    """A residual block; ``functional`` writes ReLUs and the sum as functions."""

    def __init__(self, channels: int = 4, functional: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding="same")
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.functional = functional

    def forward(self, x: Tensor) -> Tensor:
        if self.functional:
            out = torch.relu(self.bn1(self.conv1(x)))
            out = torch.add(x, self.bn2(self.conv2(out)))
            return out.relu_()
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


def small_network(functional: bool = False) -> nn.Module:
    """Stem, two blocks, head."""
    return randomize_norms(
        nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU()),
            Block(functional=functional),
            Block(functional=functional),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 5),
        )
    )


def images(size: int = 2, side: int = 12) -> Tensor:
    return torch.randn(size, 3, side, side, dtype=torch.float64)


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


def swapped_alone(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no ReLU
        return twins(module)
