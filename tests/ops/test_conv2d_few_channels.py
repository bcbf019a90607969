"""The data gradient of a strided convolution of few channels, made by a forward convolution."""

from __future__ import annotations

import dataclasses
from typing import Any

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from nn import eager
from ops.oracle import lay_out
from torch import Tensor

from camkernels import backends
from camkernels.nn import functional as ours
from camkernels.ops.conv2d import few_channels, op
from camkernels.ops.conv2d.op import ConvSpec

pytestmark = pytest.mark.skipif(
    backends.triton_interpreted(), reason="runs no Triton kernel: convolutions are the library's"
)
DOUBLE = torch.float64
LAYOUTS = ("contiguous", "channels_last")


@dataclasses.dataclass(frozen=True)
class Case:
    channels: int = 3
    filters: int = 5
    kernel: tuple[int, int] = (7, 7)
    stride: int = 2
    padding: tuple[int, int] = (3, 3)
    size: tuple[int, int] = (16, 16)
    batch: int = 2
    layout: str = "contiguous"

    @property
    def spec(self) -> ConvSpec:
        return ConvSpec((self.stride, self.stride), self.padding, (1, 1), 1)

    @property
    def output(self) -> tuple[int, ...]:
        lengths = zip(self.size, self.kernel, self.padding, strict=True)
        return (
            self.batch,
            self.filters,
            *((n + 2 * p - k) // self.stride + 1 for n, k, p in lengths),
        )

    @property
    def uncovered(self) -> tuple[int, ...]:
        """Rows and columns of the image behind the last window."""
        ends = zip(self.size, self.kernel, self.padding, self.output[2:], strict=True)
        return tuple(max(n - ((o - 1) * self.stride + k - p), 0) for n, k, p, o in ends)

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """The output's gradient, an input and a weight."""
        shapes = (
            self.output,
            (self.batch, self.channels, *self.size),
            (self.filters, self.channels, *self.kernel),
        )
        grad, x, weight = (torch.randn(s, dtype=DOUBLE).to(dtype) for s in shapes)
        return lay_out(grad, self.layout), lay_out(x, self.layout), lay_out(weight, self.layout)


def library(grad: Tensor, x: Tensor, weight: Tensor, spec: ConvSpec, mask: Any) -> Any:
    return torch.ops.aten.convolution_backward(
        grad, x, weight, (weight.shape[0],), spec.stride, spec.padding, (1, 1), False, (0, 0), 1,
        mask,
    )  # fmt: skip


def compare(case: Case, dtype: torch.dtype, found: Tensor, operands: Any) -> None:
    grad, x, weight = operands
    truth = library(
        grad.double(), x.double(), weight.double(), case.spec, (True, False, False)
    )[0]  # fmt: skip
    assert found.shape == x.shape
    assert found.dtype == dtype
    # the sum of the magnitudes of what each entry is summed from
    size = library(
        grad.abs().double(), x.double(), weight.abs().double(), case.spec, (True, False, False)
    )[0]  # fmt: skip
    rounding = 1e-12 if dtype == DOUBLE else 2 * torch.finfo(dtype).eps
    error = (found.double() - truth).abs()
    assert bool((error <= rounding * size).all()), f"{float(error.max()):.3g} off: {case}"
    for dimension, rest in zip((2, 3), case.uncovered, strict=True):
        if rest:
            behind = found.narrow(dimension, found.shape[dimension] - rest, rest)
            assert not bool(behind.any()), f"rows no window covers: {case}"


@st.composite
def cases(draw: Any) -> Case:
    def pair(low: int, high: int) -> tuple[int, int]:
        return draw(st.tuples(st.integers(low, high), st.integers(low, high)))

    kernel, padding, size = pair(1, 8), pair(0, 4), pair(1, 15)
    for n, k, p in zip(size, kernel, padding, strict=True):
        hypothesis.assume(n + 2 * p >= k)
    return Case(
        draw(st.integers(1, 4)), draw(st.integers(1, 6)), kernel, draw(st.integers(2, 4)), padding,
        size, draw(st.integers(1, 3)), draw(st.sampled_from(LAYOUTS)),
    )  # fmt: skip


@hypothesis.given(case=cases())
@hypothesis.settings(max_examples=100)
def test_any_geometry_equals_the_library(case: Case) -> None:
    for dtype in (DOUBLE, torch.float32, torch.bfloat16):
        operands = case.tensors(dtype)
        grad, _, weight = operands
        assert few_channels.is_suited(grad, weight, case.spec)
        compare(
            case, dtype, few_channels.data_gradient(grad, case.size, weight, case.spec), operands
        )


NAMED = {
    "ResNet": Case(),
    "odd": Case(size=(15, 17)),
    "patches": Case(kernel=(4, 4), stride=4, padding=(0, 0)),
    "rows left over": Case(kernel=(2, 2), stride=4, padding=(0, 0), size=(13, 15)),
    "kernel below the stride": Case(kernel=(1, 2), stride=3, padding=(0, 1), size=(9, 10)),
    "padding past the kernel": Case(kernel=(2, 3), stride=2, padding=(3, 4), size=(5, 6)),
    "one window": Case(kernel=(8, 7), stride=3, padding=(0, 0), size=(8, 7)),
    "one channel, one filter": Case(channels=1, filters=1, kernel=(3, 3), padding=(1, 1)),
}


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMED)
def test_named_geometries(name: str, layout: str, dtype: torch.dtype) -> None:
    case = dataclasses.replace(NAMED[name], layout=layout)
    assert any(case.uncovered) == (name in ("rows left over", "kernel below the stride"))
    operands = case.tensors(dtype)
    found = few_channels.data_gradient(operands[0], case.size, operands[2], case.spec)
    compare(case, dtype, found, operands)


# ---- who takes this path ----

SUITED = Case(size=(9, 8))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the weights that took the path."""
    taken: list[tuple[int, ...]] = []
    function = few_channels.data_gradient

    def counted(grad: Tensor, size: tuple[int, int], weight: Tensor, spec: ConvSpec) -> Tensor:
        taken.append(tuple(weight.shape))
        return function(grad, size, weight, spec)

    monkeypatch.setattr(few_channels, "data_gradient", counted)
    return taken


@pytest.mark.parametrize(
    "wanted", [(True, False, False), (True, True, False), (True, True, True), (False, True, True)]
)
def test_gradients_of_a_suited_convolution(wanted: Any, calls: list[Any]) -> None:
    for dtype in (DOUBLE, torch.float32, torch.bfloat16):
        grad, x, weight = SUITED.tensors(dtype)
        with eager.Convolutions() as counted:
            found = op.gradients(grad, x, weight, SUITED.spec, wanted)
        assert calls == ([tuple(weight.shape)] if wanted[0] else [])
        assert counted.counts == {"F": int(wanted[0]), "D": 0, "W": int(wanted[1])}
        calls.clear()
        wide = (grad.double(), x.double(), weight.double())
        truth = library(*wide, SUITED.spec, wanted)
        for one, other, asked in zip(found, truth, wanted, strict=True):
            assert (one is not None) == asked
            if one is not None:
                tolerance = 1e-12 if dtype == DOUBLE else 4 * torch.finfo(dtype).eps
                assert one.dtype == dtype
                atol = tolerance * float(other.abs().max())
                torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=atol)


def _spec(**changes: Any) -> ConvSpec:
    return dataclasses.replace(SUITED.spec, **changes)


@pytest.mark.parametrize(
    ("name", "x", "weight", "spec"),
    [
        ("suited", (2, 4, 9, 8), (6, 4, 3, 3), _spec()),
        ("five channels", (2, 5, 9, 8), (6, 5, 3, 3), _spec()),
        ("stride 1", (2, 3, 9, 8), (6, 3, 3, 3), _spec(stride=(1, 1))),
        ("two strides", (2, 3, 9, 8), (6, 3, 3, 3), _spec(stride=(2, 3))),
        ("stride along rows", (2, 3, 9, 8), (6, 3, 3, 3), _spec(stride=(1, 2))),
        ("groups", (2, 4, 9, 8), (6, 2, 3, 3), _spec(groups=2)),
        ("dilation", (2, 3, 9, 8), (6, 3, 3, 3), _spec(dilation=(1, 2))),
        ("empty batch", (0, 3, 9, 8), (6, 3, 3, 3), _spec()),
    ],
)
def test_only_suited_convolutions_take_it(
    name: str, x: Any, weight: Any, spec: ConvSpec, calls: list[Any]
) -> None:
    tensors = {"x": torch.randn(x, dtype=DOUBLE), "w": torch.randn(weight, dtype=DOUBLE)}
    geometry = dataclasses.asdict(spec)
    y = F.conv2d(tensors["x"], tensors["w"], None, **geometry)
    assert few_channels.is_suited(y, tensors["w"], spec) == (name == "suited")
    assert not few_channels.is_suited(y.to("meta"), tensors["w"], spec)
    cotangent = eager.signed(y.shape, 1)
    found, truth = (
        eager.two_orders(lambda x, w, f=f: f(x, w, None, **geometry), tensors, cotangent)
        for f in (ours.conv2d, F.conv2d)
    )
    eager.assert_same(found, truth, 1e-12)
    assert bool(calls) == (name == "suited")


# ---- through the op ----


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_orders_of_the_first_convolution_of_a_resnet(layout: str, calls: list[Any]) -> None:
    case = dataclasses.replace(SUITED, layout=layout)
    _, x, weight = case.tensors(DOUBLE)
    tensors = {"x": x, "w": weight, "b": torch.randn(case.filters, dtype=DOUBLE)}
    cotangent = eager.signed(case.output, 1)
    found, truth = (
        eager.two_orders(lambda x, w, b, f=f: f(x, w, b, 2, 3), tensors, cotangent)
        for f in (ours.conv2d, F.conv2d)
    )
    eager.assert_same(found, truth, 1e-12)
    # the cotangent's way back, and that of a cotangent of the weight's gradient
    assert calls == [(5, 3, 7, 7)] * 2


def test_gradcheck_and_gradgradcheck(calls: list[Any]) -> None:
    x = torch.randn(1, 3, 6, 5, dtype=DOUBLE, requires_grad=True)
    weight = torch.randn(2, 3, 7, 7, dtype=DOUBLE, requires_grad=True)

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return ours.conv2d(x, weight, None, stride=2, padding=3)

    assert torch.autograd.gradcheck(function, (x, weight), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, weight), fast_mode=True)
    # in full, towards the image alone
    weight = weight.detach()
    assert torch.autograd.gradcheck(lambda x: function(x, weight), (x,))
    assert torch.autograd.gradgradcheck(lambda x: function(x, weight), (x,))
    assert calls
