"""Swapped max-pooling against PyTorch's, to the second order, and what it keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ops.base import device_of, every_backend, has_double
from swapping import assert_same_step, counting, images, reason, swapped_alone, twins
from torch import Tensor, nn

import camkernels as ck

LAYOUTS = (torch.contiguous_format, torch.channels_last)
POOLS: list[dict[str, Any]] = [
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 3, "stride": 2, "ceil_mode": True},
    {"kernel_size": (2, 1)},
    {"kernel_size": [3, 2], "stride": [1, 2], "dilation": (2, 1)},
]


def second_order(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """Output, gradient, and what a function of the gradient sends to x and to the weights of y."""
    x = x.detach().clone().requires_grad_()
    y = model(x)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    weights.requires_grad_()
    (grad,) = torch.autograd.grad((y.square() * weights).sum(), x, create_graph=True)
    (grad_grad, to_weights) = torch.autograd.grad(grad.pow(3).sum(), (x, weights))
    return y, grad, grad_grad, to_weights


@every_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", POOLS)
def test_orders(backend: str, layout: torch.memory_format, options: dict[str, Any]) -> None:
    swapped, plain = swapped_alone(nn.MaxPool2d(**options))
    assert type(swapped) is ck.nn.MaxPool2d
    dtype = torch.float64 if has_double(backend) else torch.float32
    x = images(2, 11).round().to(device_of(backend), dtype).contiguous(memory_format=layout)  # ties
    with ck.backend(backend), counting("max_pool2d") as counts:
        found = second_order(swapped, x)
    assert counts["max_pool2d"] == 1
    for mine, theirs in zip(found, second_order(plain, x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert found[0].is_contiguous(memory_format=layout)


@every_backend
def test_gradients_are_derivatives(backend: str) -> None:
    if not has_double(backend):
        pytest.skip("finite differences need float64")
    x = torch.randperm(2 * 3 * 7 * 6).double().view(2, 3, 7, 6).div(9).requires_grad_()
    with ck.backend(backend):
        pool = lambda x: ck.nn.functional.max_pool2d(x, 3, 2, 1)  # noqa: E731
        torch.autograd.gradcheck(pool, x)
        torch.autograd.gradgradcheck(pool, x)
        curve = lambda x: torch.autograd.grad(pool(x.sin()).sum(), x, create_graph=True)[0]  # noqa: E731
        torch.autograd.gradgradcheck(curve, x)  # third order


def test_a_byte_is_kept_per_window() -> None:
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = ck.nn.functional.max_pool2d(x, 2)
    assert sum(t.nbytes for t in kept) == y.numel()


def test_the_rectified_map_before_it_is_not_kept() -> None:
    """As in the stem of a ResNet: of conv + BatchNorm + ReLU + pooling, z stays, and the bytes."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)
    )
    ck.swap_in(model)
    x = torch.randn(2, 3, 16, 16)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(x)
    full = 2 * 8 * 16 * 16
    assert sum(size >= 4 * full for size in kept.values()) == 1
    assert sum(kept.values()) < 4 * full + full / 4 + x.nbytes + 4096


def test_in_networks() -> None:
    stem = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2, 2),
        nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True), nn.MaxPool2d(3, 1, 1), nn.Conv2d(4, 2, 1),
    )  # fmt: skip
    swapped, plain = twins(stem)
    assert [type(swapped[i]) for i in (3, 6)] == [ck.nn.MaxPool2d] * 2
    assert swapped[5].save == "mask"  # nobody keeps its output now
    assert_same_step(swapped, plain, images())
    assert_same_step(swapped[3], plain[3], images()[0])  # without batch: PyTorch's own
    ck.swap_out(swapped)
    assert [type(swapped[i]) for i in (3, 6)] == [nn.MaxPool2d] * 2


def test_guided_goes_through_it() -> None:
    net = ck.swap_in(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2)).double())
    x = images().requires_grad_()
    y = net(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    with ck.guided():
        (found,) = torch.autograd.grad(y, x, weights)
    z = F.conv2d(x, net[0].weight, net[0].bias)
    v = z.relu()
    (to_v,) = torch.autograd.grad(F.max_pool2d(v, 2), v, weights, retain_graph=True)
    (expected,) = torch.autograd.grad(z, x, to_v.clamp(min=0) * (z > 0))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("pool", "why"),
    [
        (nn.MaxPool2d(2, return_indices=True), "return_indices"),
        (nn.MaxPool2d(17, padding=8), "kernel_size=17"),
        (type("Own", (nn.MaxPool2d,), {})(2), "subclass"),
    ],
)
def test_left_alone(pool: nn.Module, why: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), pool)
    kind = type(pool)
    ck.swap_in(model)
    assert type(model[2]) is kind
    assert why in reason(model, "2")
    assert model[1].save == "output"  # PyTorch's keeps its input


def test_changed_after_swapping() -> None:
    pool, _ = swapped_alone(nn.MaxPool2d(2))
    pool.return_indices = True
    assert len(pool(images())) == 2


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_what_pytorch_refuses_or_takes(dtype: torch.dtype) -> None:
    swapped, plain = swapped_alone(nn.MaxPool2d(2))
    empty = torch.zeros(0, 3, 4, 4, dtype=dtype)
    assert swapped(empty).shape == plain(empty).shape
    x = torch.arange(16).view(1, 1, 4, 4).to(dtype)
    torch.testing.assert_close(swapped(x), plain(x))
    for model in (swapped, plain):
        with pytest.raises(RuntimeError, match="too small"):
            model(torch.zeros(1, 1, 1, 4, dtype=dtype))


def test_arguments() -> None:
    pool, x = ck.nn.functional.max_pool2d, torch.rand(1, 2, 5, 5)
    with pytest.raises(TypeError, match="input: expected float"):
        pool(x.long(), 2)
    with pytest.raises(ValueError, match=r"input: expected shape \(B, C, H, W\)"):
        pool(x[0], 2)
    with pytest.raises(ValueError, match="at most 256 elements"):
        pool(x, 17)
    with pytest.raises(ValueError, match="padding"):
        pool(x, 2, padding=2)
    with pytest.raises(ValueError, match="kernel_size"):
        pool(x, 0)
    with pytest.raises(ValueError, match="no window"):
        pool(x, 7)
