"""1 x 1 convolutions as matrix products: equal to the library's, and taken where they were told."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from nn import eager
from ops.oracle import lay_out
from torch import Tensor

from camkernels import backends
from camkernels.nn import functional as ours
from camkernels.ops.conv2d import op, pointwise
from camkernels.ops.conv2d.op import ConvSpec

pytestmark = pytest.mark.skipif(
    backends.triton_interpreted(), reason="runs no Triton kernel: convolutions are the library's"
)
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Case:
    """Which of the three are products, in the order forward, data gradient, weight gradient; a
    strided data gradient is always made of the pixels that were read."""

    shape: tuple[int, int, int, int]
    filters: int
    stride: tuple[int, int]
    layout: str
    taken: tuple[bool, bool, bool]

    @property
    def spec(self) -> ConvSpec:
        return ConvSpec(self.stride, (0, 0), (1, 1), 1)

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """The output's gradient, the input, the weight."""
        batch, channels, height, width = self.shape
        size = (-(-height // self.stride[0]), -(-width // self.stride[1]))
        shapes = ((batch, self.filters, *size), self.shape, (self.filters, channels, 1, 1))
        grad, x, weight = (torch.randn(s, dtype=torch.float64).to(dtype) for s in shapes)
        return lay_out(grad, self.layout), lay_out(x, self.layout), weight


ALL, NONE = (True, True, True), (False, False, False)
PLANES, ROWS = "contiguous", "channels_last"
CASES = {
    "large planes": Case((1, 40, 48, 49), 48, (1, 1), PLANES, ALL),
    "planes large for pixels": Case((2, 70, 24, 25), 40, (1, 1), PLANES, (True, True, False)),
    "strided to large planes": Case((1, 70, 48, 51), 60, (2, 2), PLANES, (True, True, False)),
    "small planes": Case((4, 128, 6, 7), 128, (1, 1), PLANES, NONE),
    "strided, small planes": Case((4, 128, 12, 13), 130, (2, 2), PLANES, (False, True, False)),
    "strided one way": Case((4, 128, 12, 13), 130, (2, 1), PLANES, (False, True, False)),
    "few pixels": Case((2, 150, 6, 7), 300, (1, 1), ROWS, ALL),
    "more pixels than channels": Case((6, 200, 6, 6), 60, (1, 1), ROWS, (False, False, True)),
    "many pixels": Case((8, 64, 12, 12), 64, (1, 1), ROWS, NONE),
    "strided, few pixels": Case((2, 200, 11, 12), 150, (2, 2), ROWS, ALL),
    "strided, many pixels": Case((8, 64, 23, 24), 64, (3, 2), ROWS, (False, True, False)),
    "one pixel": Case((30, 300, 1, 1), 260, (1, 1), ROWS, ALL),
    "one pixel of many": Case((30, 300, 2, 2), 260, (2, 2), PLANES, (False, True, False)),
}


def _library(case: Case, grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rest = (case.stride, (0, 0), (1, 1), False, (0, 0), 1)
    y = torch.ops.aten.convolution(x, weight, None, *rest)
    to_x, to_weight, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, (case.filters,), *rest, (True, True, False)
    )
    return y, to_x, to_weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_products_equal_the_library(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    grad, x, weight = case.tensors(dtype)
    size = (x.shape[2], x.shape[3])
    found = (
        pointwise.convolve(x, weight, None, case.spec),
        pointwise.data_gradient(grad, size, weight, case.spec),
        pointwise.weight_gradient(grad, x, weight, case.spec),
    )
    wide = (grad.double(), x.double(), weight.double())
    truths = _library(case, *wide)
    # the sums of the magnitudes of what each entry is summed from
    sizes = _library(case, *(t.abs() for t in wide))
    layouts = (x, x, weight)
    rounding = 1e-14 if dtype == torch.float64 else 8 * torch.finfo(dtype).eps
    for one, truth, scale, taken, like in zip(
        found, truths, sizes, case.taken, layouts, strict=True
    ):
        assert (one is not None) == taken
        if one is None:
            continue
        assert one.shape == truth.shape
        assert one.dtype == dtype
        last = like.is_contiguous(memory_format=torch.channels_last)
        tells = one.shape[2] * one.shape[3] > 1 and name != "one pixel of many"
        assert not tells or last == one.is_contiguous(memory_format=torch.channels_last)
        assert bool(((one.double() - truth).abs() <= rounding * scale).all())


@pytest.mark.parametrize("name", CASES)
def test_two_orders_through_the_op(name: str) -> None:
    case = CASES[name]
    grad, x, weight = case.tensors(torch.float64)
    tensors = {"x": x, "w": weight}
    found, truth = (
        eager.two_orders(lambda x, w, f=f: f(x, w, None, case.stride), tensors, grad)
        for f in (ours.conv2d, torch.nn.functional.conv2d)
    )
    eager.assert_same(found, truth, 1e-12)


def _spec(**changes: Any) -> ConvSpec:
    return dataclasses.replace(CASES["large planes"].spec, **changes)


@pytest.mark.parametrize(
    ("weight", "spec"),
    [
        ((48, 40, 1, 2), _spec()),
        ((48, 40, 1, 1), _spec(padding=(1, 1))),
        ((48, 20, 1, 1), _spec(groups=2)),
    ],
    ids=["kernel", "padding", "groups"],
)
def test_other_convolutions_are_the_librarys(weight: Any, spec: ConvSpec) -> None:
    x, w = torch.randn(1, 40, 48, 49), torch.randn(weight)
    truth = torch.nn.functional.conv2d(x, w, None, spec.stride, spec.padding, (1, 1), spec.groups)
    assert pointwise.convolve(x, w, None, spec) is None
    assert pointwise.data_gradient(truth, (48, 49), w, spec) is None
    assert pointwise.weight_gradient(truth, x, w, spec) is None
    torch.testing.assert_close(op.convolve(x, w, None, spec), truth)


def test_a_lowered_precision_of_products_leaves_convolutions_alone() -> None:
    case = CASES["large planes"]
    _, x, weight = case.tensors(torch.float32)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert pointwise.convolve(x, weight, None, case.spec) is None
    finally:
        torch.set_float32_matmul_precision(before)
    assert pointwise.convolve(x, weight, None, case.spec) is not None


@pytest.mark.parametrize("shape", [(0, 40, 48, 49), (1, 40, 0, 49)], ids=["empty batch", "no rows"])
def test_empty(shape: Any) -> None:
    x, weight = torch.randn(shape), torch.randn(48, 40, 1, 1)
    assert pointwise.convolve(x, weight, None, _spec()) is None


def test_neither_layout_is_left_to_the_library() -> None:
    case = CASES["large planes"]
    _, x, weight = case.tensors(torch.float32)
    assert pointwise.convolve(x.transpose(2, 3), weight, None, case.spec) is None
