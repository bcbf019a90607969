"""What a careful user writes in eager PyTorch for the network ops, and how two sides are compared.

Two orders of a function: its output, the gradients of <c, output> for a signed cotangent c, and the
gradients of those gradients along signed directions, to every argument and to c. So every cotangent
that a double backward can carry is there, those of parameter gradients too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Arguments = dict[str, "Tensor | None"]


class SwitchableReLU(torch.autograd.Function):
    """ReLU in plain operations, guided inside ``eager_guided``."""

    guided = False

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        ctx.save_for_backward(u)
        return u.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (u,) = ctx.saved_tensors
        if SwitchableReLU.guided:
            grad = grad.clamp(min=0)
        return grad * (u > 0)


@contextmanager
def eager_guided() -> Iterator[None]:
    SwitchableReLU.guided = True
    try:
        yield
    finally:
        SwitchableReLU.guided = False


def batch_norm_relu(
    z: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    relu: bool = True,
) -> Tensor:
    batch = training or running_mean is None
    u = F.batch_norm(z, running_mean, running_var, weight, bias, batch, momentum, eps)
    u = u if residual is None else u + residual
    return SwitchableReLU.apply(u) if relu else u


def conv_bn_act(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    **norm: Any,
) -> Tensor:
    z = F.conv2d(x, conv_weight, conv_bias, stride, padding, dilation, groups)
    return batch_norm_relu(z, running_mean, running_var, weight, bias, **norm)


def signed(shape: Any, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random quarters of both signs, which every dtype holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-12, 13, tuple(shape), generator=generator) / 4).to(dtype)


def two_orders(
    function: Callable[..., Tensor],
    arguments: Arguments,
    cotangent: Tensor,
    *,
    wanted: tuple[str, ...] | None = None,
    order: int = 2,
) -> dict[str, Tensor]:
    """See the docstring of this file. ``function`` takes ``arguments`` by name."""
    given = {
        name: value
        if value is None
        else value.detach().requires_grad_(name in (wanted or arguments))
        for name, value in arguments.items()
    }
    names = [name for name, value in given.items() if value is not None and value.requires_grad]
    leaves: list[Any] = [given[name] for name in names]
    cotangent = cotangent.detach().requires_grad_(order > 1)
    output = function(**given)
    first = torch.autograd.grad(output, leaves, cotangent, create_graph=order > 1)
    found = {"output": output.detach()}
    found |= {f"d {n}": g.detach() for n, g in zip(names, first, strict=True)}
    if order > 1:
        pairs = zip(names, first, strict=True)
        scalar = sum((g * signed(g.shape, 7 + i, g.dtype)).sum() for i, (_, g) in enumerate(pairs))
        second = torch.autograd.grad(scalar, [*leaves, cotangent], allow_unused=True)  # type: ignore[arg-type]
        for name, leaf, value in zip([*names, "c"], [*leaves, cotangent], second, strict=True):
            found[f"dd {name}"] = torch.zeros_like(leaf) if value is None else value
    return found


def assert_same(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10
) -> float:
    """Equal to ``tolerance``, absolutely and relative to the largest entry; the largest error."""
    assert found.keys() == expected.keys()
    largest = 0.0
    for name, truth in expected.items():
        value = found[name]
        assert value.shape == truth.shape, name
        assert torch.equal(value.isnan(), truth.isnan()), f"{name}: NaN elsewhere"
        if truth.numel() == 0:
            continue
        scale = max(1.0, float(truth.nan_to_num(0.0, 0.0, 0.0).abs().max()))
        error = float((value - truth).nan_to_num(0.0).abs().max()) / scale
        assert error <= tolerance, f"{name}: off by {error:.3g} of {scale:.3g}"
        largest = max(largest, error)
    return largest


def assert_as_good_as(
    found: dict[str, Tensor], eager: dict[str, Tensor], truth: dict[str, Tensor], rounding: float
) -> None:
    """The largest error is at most 1.5 times eager's own and a few roundings of the result."""
    for name, expected in truth.items():
        value, scale = found[name].double(), float(expected.abs().max())
        error = float((value - expected).abs().max())
        other = float((eager[name].double() - expected).abs().max())
        bound = 1.5 * other + 3 * rounding * scale
        assert error <= bound, f"{name}: off by {error:.3g} of {scale:.3g}, eager by {other:.3g}"


class Convolutions(TorchDispatchMode):
    """Counts F, D and W, and notes the shape of every filter that F runs with."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = {"F": 0, "D": 0, "W": 0}
        self.filters: list[tuple[int, ...]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten.convolution.default:
            self.counts["F"] += 1
            self.filters.append(tuple(args[1].shape))
        if function is torch.ops.aten.convolution_backward.default:
            for kind, wanted in zip("DW", args[-1], strict=False):
                self.counts[kind] += bool(wanted)
        return function(*args, **(kwargs or {}))
