"""conv_bn_act where nothing is recorded: BatchNorm in the weights, sum and ReLU over the output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import camkernels as ck
from camkernels.nn import functional as network
from camkernels.ops.conv_bn_act import inference

C, K = 3, 5


def constants(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    gamma = torch.tensor([1.5, 0.0, -0.7, 0.3, 1.0], dtype=dtype)
    random = torch.randn(3, K, generator=generator, dtype=dtype)
    return {
        "running_mean": random[0],
        "running_var": random[1].square(),
        "weight": gamma,
        "bias": random[2],
    }


def plain(
    x: Tensor, w: Tensor, b: Tensor | None, residual: Tensor | None, relu: bool, geometry: Any,
    stats: dict[str, Any],
) -> Tensor:  # fmt: skip
    y = F.batch_norm(F.conv2d(x, w, b, **geometry), **stats, training=False, eps=1e-3)
    y = y if residual is None else y + residual
    return F.relu(y) if relu else y


@settings(deadline=None)
@given(
    batch=st.integers(0, 4),
    side=st.tuples(st.integers(3, 9), st.integers(3, 9)),
    kernel=st.integers(1, 3),
    geometry=st.fixed_dictionaries(
        {"stride": st.integers(1, 2), "padding": st.integers(0, 1), "dilation": st.just(1)}
    ),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
    bias=st.booleans(),
    affine=st.booleans(),
    adds=st.booleans(),
    relu=st.booleans(),
    grad=st.booleans(),
)
def test_equals_the_modules_one_by_one(
    batch: int, side: tuple[int, int], kernel: int, geometry: Any, dtype: torch.dtype,
    layout: torch.memory_format, bias: bool, affine: bool, adds: bool, relu: bool, grad: bool,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, C, *side, generator=generator, dtype=dtype)
    x = x.contiguous(memory_format=layout)
    w = torch.randn(K, C, kernel, kernel, generator=generator, dtype=dtype)
    b = torch.randn(K, generator=generator, dtype=dtype) if bias else None
    stats: dict[str, Any] = constants(dtype)
    if not affine:
        stats.update(weight=None, bias=None)
    shape = F.conv2d(x, w, b, **geometry).shape
    residual = torch.randn(shape, generator=generator, dtype=dtype) if adds else None
    before = None if residual is None else residual.clone()
    # what requires a gradient records one; where nothing does, grad mode does not matter
    w.requires_grad_(not grad)
    with torch.set_grad_enabled(grad):
        y = network.conv_bn_act(
            x, w, b, **stats, **geometry, eps=1e-3, residual=residual, relu=relu
        )
        expected = plain(x, w, b, residual, relu, geometry, stats)
    assert not y.requires_grad
    assert y.dtype == dtype
    assert y.shape == expected.shape
    if batch > 1 and min(shape[1:]) > 1:
        assert y.is_contiguous(memory_format=layout)
    close = 1e-11 if dtype == torch.float64 else 2e-4
    torch.testing.assert_close(y, expected, rtol=close, atol=close)
    if before is not None:
        assert residual is not None
        assert torch.equal(residual, before)


def test_it_is_what_runs_and_only_where_nothing_is_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    run = inference.conv_bn_act
    monkeypatch.setattr(inference, "conv_bn_act", lambda *a: calls.append(a) or run(*a))
    x = torch.rand(2, C, 8, 8, dtype=torch.float64)
    w = torch.rand(K, C, 3, 3, dtype=torch.float64)
    stats = constants()

    def call(x: Tensor, **changed: Any) -> Tensor:
        return network.conv_bn_act(x, w, None, **{**stats, **changed})

    with torch.no_grad():
        call(x)
        assert len(calls) == 1
        call(x, training=True)
        call(x, running_mean=None, running_var=None)
        half = {name: value.float() for name, value in stats.items()}
        network.conv_bn_act(x.bfloat16(), w.bfloat16(), None, **half)
        with ck.backend("reference"):
            call(x)
        assert len(calls) == 1
    for name in ("weight", "bias"):
        y = call(x, **{name: stats[name].clone().requires_grad_()})
        assert y.requires_grad
    assert call(x.clone().requires_grad_()).requires_grad
    assert len(calls) == 1


def test_weights_are_scaled_only_where_they_are_fewer_than_the_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = []
    run = inference.convolve
    monkeypatch.setattr(inference, "convolve", lambda x, w, *a: given.append(w) or run(x, w, *a))
    w = torch.rand(K, C, 3, 3, dtype=torch.float64)
    with torch.no_grad():
        for side, scaled in ((8, True), (3, False)):
            x = torch.rand(1, C, side, side, dtype=torch.float64)
            y = network.conv_bn_act(x, w, None, **constants(), eps=1e-3)
            assert (given.pop() is not w) == scaled
            expected = plain(x, w, None, None, True, {}, {**constants()})
            torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(value: float) -> None:
    x = torch.rand(2, C, 8, 8).contiguous(memory_format=torch.channels_last)
    x[0, 1, 4, 4] = value
    w, stats = torch.randn(K, C, 3, 3), constants(torch.float32)
    y = network.conv_bn_act(x, w, None, **stats, eps=1e-3)
    expected = plain(x, w, None, None, True, {}, stats)
    assert torch.equal(y.isnan(), expected.isnan())
    assert expected.isnan().any()  # of infinity: where gamma is 0


def test_a_residual_of_another_shape_raises() -> None:
    x, w = torch.rand(2, C, 8, 8), torch.rand(K, C, 3, 3)
    with pytest.raises(ValueError, match=r"residual: expected shape \(2, 5, 6, 6\)"):
        network.conv_bn_act(x, w, None, **constants(torch.float32), residual=torch.rand(2, K, 1, 1))


def test_a_swapped_network_in_evaluation_leaves_nothing_changed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    ).double()  # fmt: skip
    x = torch.rand(4, 3, 12, 12, dtype=torch.float64)
    for _ in range(3):
        model(x)
    model.eval()
    expected = model(x)
    ck.swap_in(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        y = model(x)
    with torch.inference_mode():
        z = model(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(y, z.clone())
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)  # recorded
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
