"""Sums of weight gradients, a factor per filter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from camkernels import backends
from camkernels.ops.conv2d.filters import add_scaled

pytestmark = pytest.mark.skipif(
    backends.unavailable_reason("cpu") is not None or backends.triton_interpreted(),
    reason="of the C++ kernels",
)
NARROW = (torch.bfloat16, torch.float16)


def lay_out(tensor: Tensor, channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return tensor.contiguous(memory_format=layout)


def expected(value: Tensor | None, other: Tensor, scale: Tensor | None) -> Tensor:
    factor = 1.0 if scale is None else scale.double().view(-1, 1, 1, 1)
    return factor * other.double() + (0 if value is None else value.double())


def check(value: Tensor | None, other: Tensor, scale: Tensor | None, dtype: torch.dtype) -> None:
    truth = expected(value, other, scale)
    terms = truth.abs() if value is None else truth.abs() + value.double().abs()
    copies = [None if t is None else t.clone() for t in (value, other)]
    found = add_scaled(*copies, scale, dtype, "cpu")  # type: ignore[arg-type]
    assert found.dtype == dtype
    assert found.shape == other.shape
    digits = 2.0**-50 if dtype == torch.float64 else 2.0**-22
    assert bool(((found.double() - truth).abs() <= digits * terms).all())


@pytest.mark.usefixtures("poisoned_allocations")
@given(st.data())
def test_any_shape(data: Any) -> None:
    shape = data.draw(st.tuples(*(st.integers(0, 19), st.integers(1, 9)), *[st.integers(1, 3)] * 2))
    narrow = data.draw(st.sampled_from((*NARROW, torch.float32, torch.float64)))
    dtype = torch.float64 if narrow == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    value, other = (
        lay_out(torch.randn(shape, generator=generator).to(narrow), data.draw(st.booleans()))
        for _ in range(2)
    )
    scale = torch.randn(shape[0], generator=generator, dtype=dtype)
    given_scale = data.draw(st.sampled_from((scale, scale.repeat_interleave(2)[::2], None)))
    check(data.draw(st.sampled_from((value, None))), other, given_scale, dtype)


@pytest.mark.parametrize("narrow", NARROW)
def test_more_than_one_thread(narrow: torch.dtype) -> None:
    value, other = torch.randn(2, 65, 33, 3, 5).to(narrow).unbind(0)
    check(value, other, torch.randn(65), torch.float32)
    check(None, other, None, torch.float32)


@pytest.mark.parametrize("narrow", NARROW)
def test_nan_and_infinity_stay_where_they_are(narrow: torch.dtype) -> None:
    value, other = torch.ones(2, 3, 5, 3, 3).to(narrow).unbind(0)
    other, scale = other.clone(), torch.tensor([0.0, 2.0, torch.inf])
    other[0, 1, 1, 1], other[1, 2, 0, 0] = torch.nan, torch.inf
    found = add_scaled(value.clone(), other.clone(), scale, torch.float32, "cpu")
    assert found[0].isnan().sum() == 1
    assert bool(found[0, 1, 1, 1].isnan())
    assert found[1].isinf().sum() == 1
    assert bool(found[1, 2, 0, 0].isinf())
    assert bool(found[2].isinf().all())


def test_the_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """For 16 bits on the CPU, and for nothing else; not for filters that lie otherwise."""
    from camkernels import _cpu

    calls: list[int] = []
    run = _cpu.add_scaled
    monkeypatch.setattr(_cpu, "add_scaled", lambda *a: calls.append(1) or run(*a))
    for narrow, dtype, backend, times in (
        (torch.bfloat16, torch.float32, "cpu", 1),
        (torch.float16, torch.float32, "cpu", 1),
        (torch.bfloat16, torch.float32, "reference", 0),
        (torch.float32, torch.float32, "cpu", 0),
        (torch.bfloat16, torch.bfloat16, "cpu", 0),
    ):
        value, other = torch.randn(2, 4, 8, 3, 3).to(narrow).unbind(0)
        calls.clear()
        add_scaled(value.clone(), other.clone(), torch.rand(4), dtype, backend)
        assert len(calls) == times, (narrow, dtype, backend)
        add_scaled(lay_out(value.clone(), True), other.clone(), torch.rand(4), dtype, backend)
        assert len(calls) == times, "filters that lie otherwise"


def test_on_the_meta_device_as_much_is_allocated() -> None:
    other = torch.empty(4, 8, 3, 3, device="meta", dtype=torch.bfloat16)
    other = other.to(memory_format=torch.channels_last)
    found = add_scaled(None, other, torch.empty(4, device="meta"), torch.float32, "meta")
    assert (found.dtype, found.shape, found.stride()) == (
        torch.float32, other.shape, other.stride(),
    )  # fmt: skip
