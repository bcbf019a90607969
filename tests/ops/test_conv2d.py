"""conv2d against F.conv2d: every geometry, to any order, by true convolutions."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from nn import eager
from ops.oracle import lay_out
from torch import Tensor

import camkernels as ck
from camkernels import backends
from camkernels.nn import functional as ours

pytestmark = pytest.mark.skipif(
    backends.triton_interpreted(), reason="runs no Triton kernel: convolutions are the library's"
)
DOUBLE = torch.float64
GEOMETRIES: dict[str, dict[str, Any]] = {
    "3x3": {"weight": (4, 3, 3, 3), "padding": 1},
    "stride": {"weight": (4, 3, 3, 3), "stride": 2, "padding": 1},
    "pairs": {"weight": (4, 3, 3, 2), "stride": (1, 2), "padding": (2, 0), "dilation": (2, 1)},
    "dilation": {"weight": (2, 3, 3, 3), "dilation": 2, "padding": 2},
    "groups": {"weight": (6, 1, 3, 3), "groups": 3, "padding": 1},
    "grouped outputs": {"weight": (4, 2, 3, 3), "groups": 2, "input": (2, 4, 5, 6)},
    "depthwise": {"weight": (3, 1, 3, 3), "groups": 3, "stride": 2, "padding": 1},
    "1x1": {"weight": (5, 3, 1, 1)},
    "1x1 stride": {"weight": (5, 3, 1, 1), "stride": 2},
    "rows left over": {"weight": (2, 3, 2, 2), "stride": 3},
    "map of one pixel": {"weight": (2, 3, 1, 1), "input": (3, 3, 1, 1)},
    "kernel as large as the map": {"weight": (2, 3, 5, 6)},
}


def split(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    geometry = dict(GEOMETRIES[name])
    shape, weight = geometry.pop("input", (2, 3, 5, 6)), geometry.pop("weight")
    tensors = {
        "input": torch.randn(shape, dtype=DOUBLE),
        "weight": torch.randn(weight, dtype=DOUBLE),
        "bias": torch.randn(weight[0], dtype=DOUBLE),
    }
    return tensors, geometry


def both_sides(tensors: Any, geometry: Any, layout: str = "contiguous", order: int = 2) -> Any:
    def run(function: Any) -> Any:
        return lambda input, weight, bias: function(input, weight, bias, **geometry)

    shape = run(F.conv2d)(**tensors).shape
    cotangent = lay_out(eager.signed(shape, 1, tensors["input"].dtype), layout)
    return tuple(
        eager.two_orders(run(function), tensors, cotangent, order=order)
        for function in (ours.conv2d, F.conv2d)
    )


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "expanded_batch"])
def test_two_orders_equal_eager(name: str, layout: str) -> None:
    tensors, geometry = split(name)
    tensors["input"] = lay_out(tensors["input"], layout)
    if layout == "channels_last":
        tensors["weight"] = lay_out(tensors["weight"], layout)
    eager.assert_same(*both_sides(tensors, geometry, layout))
    without: dict[str, Any] = {**tensors, "bias": None}
    eager.assert_same(*both_sides(without, geometry))


@hypothesis.given(data=st.data())
def test_any_geometry(data: Any) -> None:
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    def pair(low: int, high: int) -> tuple[int, int]:
        return draw(low, high), draw(low, high)

    groups, kernel, dilation, padding = draw(1, 3), pair(1, 3), pair(1, 2), pair(0, 2)
    size = pair(1, 7)
    for s, k, d, p in zip(size, kernel, dilation, padding, strict=True):
        hypothesis.assume(s + 2 * p >= d * (k - 1) + 1)
    channels, filters = groups * draw(1, 2), groups * draw(1, 2)
    tensors: dict[str, Any] = {
        "input": torch.randn(draw(0, 3), channels, *size, dtype=DOUBLE),
        "weight": torch.randn(filters, channels // groups, *kernel, dtype=DOUBLE),
        "bias": torch.randn(filters, dtype=DOUBLE) if data.draw(st.booleans()) else None,
    }
    geometry = {
        "stride": pair(1, 3), "padding": padding, "dilation": dilation, "groups": groups
    }  # fmt: skip
    eager.assert_same(*both_sides(tensors, geometry))


def orders(function: Any, tensors: dict[str, Tensor], geometry: Any, order: int) -> list[Tensor]:
    """Gradients of a function that is no polynomial of low degree, contracted again and again."""
    leaves = [t.detach().requires_grad_() for t in tensors.values()]
    output = function(*leaves, **geometry)
    scalar = (output.sin() * eager.signed(output.shape, 1)).sum()
    for level in range(order):
        found = torch.autograd.grad(scalar, leaves, create_graph=True)
        scalar = sum(
            ((g * eager.signed(g.shape, 10 * level + i)).sum() for i, g in enumerate(found)),
            torch.zeros(()),
        )
    return [g.detach() for g in found]


@pytest.mark.parametrize("name", ["stride", "pairs", "grouped outputs", "depthwise"])
def test_third_and_fourth_order_equal_eager(name: str) -> None:
    tensors, geometry = split(name)
    for order in (3, 4):
        found = orders(ours.conv2d, tensors, geometry, order)
        expected = orders(F.conv2d, tensors, geometry, order)
        for one, other in zip(found, expected, strict=True):
            assert bool(other.any())
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * float(other.abs().max()))


def test_gradcheck_and_gradgradcheck() -> None:
    tensors, geometry = split("depthwise")
    small = {**tensors, "input": tensors["input"][:1, :, :3, :3].clone()}
    leaves = [t.requires_grad_() for t in small.values()]

    def function(*values: Tensor) -> Tensor:
        return ours.conv2d(*values, **geometry)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["3x3", "stride", "depthwise", "1x1"])
def test_as_good_as_eager(name: str, dtype: torch.dtype) -> None:
    tensors, geometry = split(name)
    rounded = {n: t.to(dtype) for n, t in tensors.items()}
    found, other = both_sides(rounded, geometry)
    _, truth = both_sides({n: t.double() for n, t in rounded.items()}, geometry)
    assert all(found[label].dtype == other[label].dtype == dtype for label in truth)
    eager.assert_as_good_as(found, other, truth, torch.finfo(dtype).eps)


def test_autocast_runs_it_in_bfloat16_and_gives_float32_gradients() -> None:
    tensors = {n: t.float().requires_grad_() for n, t in split("3x3")[0].items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ours.conv2d(**tensors)
        other = F.conv2d(**tensors)
        assert ours.conv2d(*(t.double() for t in tensors.values())).dtype == DOUBLE
    assert y.dtype == other.dtype == torch.bfloat16
    found = torch.autograd.grad(y.square().sum(), list(tensors.values()))
    expected = torch.autograd.grad(other.square().sum(), list(tensors.values()))
    for one, two in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, two, rtol=0.05, atol=0.05 * float(two.abs().max()))


# ---- which convolutions run ----


def test_double_backward_runs_true_convolutions() -> None:
    tensors, geometry = split("3x3")
    leaves = [t.requires_grad_() for t in tensors.values()]
    y = ours.conv2d(*leaves, **geometry)
    with eager.Convolutions() as first:
        delta, *_ = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
    assert first.counts == {"F": 0, "D": 1, "W": 1}
    with eager.Convolutions() as second:
        torch.autograd.grad(delta.square().sum(), leaves, retain_graph=True, allow_unused=True)
    # the cotangent goes forward, its weight gradient, and back through y: D and W once more
    assert second.counts == {"F": 1, "D": 1, "W": 2}
    assert set(second.filters) == {tuple(leaves[1].shape)}, "a filter as large as a map"


def test_no_weight_gradients_in_input_gradient_passes() -> None:
    tensors, geometry = split("3x3")
    x, weight, bias = (t.requires_grad_() for t in tensors.values())
    y = ours.conv2d(x, weight, bias, **geometry)
    with ck.no_weight_gradients(), eager.Convolutions() as counted:
        torch.autograd.grad(y.square().sum(), x, create_graph=True)
        assert torch.autograd.grad(
            y.sum(), (weight, bias), retain_graph=True, allow_unused=True
        ) == (None, None)
        with pytest.raises(RuntimeError, match="not have been used"):
            torch.autograd.grad(y.sum(), weight, retain_graph=True)
    assert counted.counts["W"] == 0
    assert torch.autograd.grad(y.sum(), weight)[0].any(), "the mode outlived its block"


# ---- bad input ----


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input": torch.ones(1, 3, 4, 4, dtype=torch.int64)}, TypeError, "input: expected float"),
        ({"input": torch.ones(3, 4, 4)}, ValueError, "input: expected shape"),
        ({"weight": torch.ones(2, 3, 3, 3).double()}, TypeError, "weight: expected the dtype"),
        ({"weight": torch.ones(2, 3, 3)}, ValueError, "weight: expected shape"),
        ({"stride": 0}, ValueError, "stride: expected an int or a pair"),
        ({"padding": -1}, ValueError, "padding: expected an int or a pair"),
        ({"padding": "same"}, ValueError, "padding: expected an int or a pair"),
        ({"dilation": (1, 1, 1)}, ValueError, "dilation: expected an int or a pair"),
        ({"weight": torch.ones(2, 4, 3, 3)}, RuntimeError, "to have 4 channels"),
        ({"bias": torch.ones(3)}, RuntimeError, "bias"),
    ],
)
def test_bad_arguments_are_named(changes: Any, error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"input": torch.ones(1, 3, 4, 4), "weight": torch.ones(2, 3, 3, 3)}
    with pytest.raises(error, match=message):
        ours.conv2d(**{**arguments, **changes})
