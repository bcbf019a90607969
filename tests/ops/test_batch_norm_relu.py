"""batch_norm_relu against F.batch_norm, add and ReLU: both orders, every option, every edge."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from nn import eager
from ops.base import device_of, every_backend, has_double
from ops.oracle import gradcheck_twice, lay_out
from torch import Tensor

import camkernels as ck
from camkernels import backends
from camkernels.nn import functional as ours

DOUBLE = torch.float64
LAYOUTS = ("contiguous", "channels_last", "sliced", "offset", "transposed", "expanded_batch")
CHANNELS = ("plain", "zero gamma", "negative gamma", "dead")
cpu = pytest.mark.skipif(
    backends.unavailable_reason("cpu") is not None or backends.triton_interpreted(),
    reason="needs the C++ kernels, in a process that does not interpret Triton",
)


@dataclasses.dataclass
class Call:
    """One call: tensors by name, and the rest."""

    tensors: eager.Arguments
    mean: Tensor | None
    var: Tensor | None
    training: bool
    relu: bool = True

    def of(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """``function`` with statistics of its own, so that calls do not see one another."""

        def run(z: Tensor, weight: Any, bias: Any, residual: Any) -> Tensor:
            # statistics are kept in float32 beside half precision, as modules keep them
            mean, var = (
                None if v is None else v.to(z.device, copy=True) for v in (self.mean, self.var)
            )
            return function(
                z, mean, var, weight, bias, self.training, residual=residual, relu=self.relu
            )

        return run

    def to(self, dtype: torch.dtype) -> Call:
        tensors = {n: None if t is None else t.to(dtype) for n, t in self.tensors.items()}
        wide = DOUBLE if dtype == DOUBLE else torch.float32
        stats = (None if v is None else v.to(wide) for v in (self.mean, self.var))
        return dataclasses.replace(
            self, tensors=tensors, **dict(zip(("mean", "var"), stats, strict=True))
        )

    @property
    def z(self) -> Tensor:
        assert self.tensors["z"] is not None
        return self.tensors["z"]


def pre_activation(call: Call) -> Tensor:
    call = call.to(DOUBLE)
    plain = dataclasses.replace(call, relu=False)
    return plain.of(eager.batch_norm_relu)(**call.tensors)


def make(
    shape: tuple[int, ...] = (3, 4, 5, 6),
    *,
    training: bool = True,
    residual: bool = False,
    affine: str = "both",
    channels: str = "plain",
    relu: bool = True,
    statistics: bool = True,
    dtype: torch.dtype = DOUBLE,
    layouts: tuple[str, str] = ("contiguous", "contiguous"),
    seed: int = 0,
    margin: float = 1e-4,
) -> Call:
    """A call whose pre-activations keep ``margin`` from the ReLU's kink."""
    for attempt in range(200):
        generator = torch.Generator().manual_seed(1000 * seed + attempt)

        def draw(*size: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float32).double()

        c = shape[1]
        gamma, beta = draw(c).abs() + 0.5, draw(c)
        gamma[::2] *= {"zero gamma": 0.0, "negative gamma": -1.0}.get(channels, 1.0)
        beta[::2] -= 100.0 if channels == "dead" else 0.0
        z = lay_out((2 * draw(*shape) + 0.5).to(dtype), layouts[0])
        added = lay_out(draw(*shape).to(dtype), layouts[1]) if residual else None
        call = Call(
            {
                "z": z,
                "weight": None if affine == "none" else gamma.to(dtype),
                "bias": beta.to(dtype) if affine == "both" else None,
                "residual": added,
            },
            draw(c).float() if statistics else None,
            draw(c).float().abs() + 0.5 if statistics else None,
            training,
            relu,
        )
        call = call.to(dtype) if dtype == DOUBLE else call
        u = pre_activation(call)
        off = u[u != 0].abs()  # exactly zero is masked on both sides
        if off.numel() == 0 or float(off.min()) > margin:
            return call
    raise AssertionError("no such inputs found")


OPTIONS = [
    pytest.param(dict(zip(("training", "residual", "relu", "affine"), o, strict=True)), id=str(o))
    for o in (
        (True, False, True, "both"),
        (True, True, True, "both"),
        (True, True, False, "both"),
        (True, False, True, "none"),
        (True, True, True, "gamma"),
        (False, False, True, "both"),
        (False, True, True, "both"),
        (False, False, False, "none"),
    )
]


def both_sides(call: Call, cotangent: Tensor, order: int = 2) -> tuple[Any, Any]:
    return (
        eager.two_orders(call.of(ours.batch_norm_relu), call.tensors, cotangent, order=order),
        eager.two_orders(call.of(eager.batch_norm_relu), call.tensors, cotangent, order=order),
    )


# ---- values and two orders ----


@every_backend
@hypothesis.given(data=st.data())
def test_two_orders_equal_eager(backend: str, data: Any) -> None:
    if not has_double(backend):
        pytest.skip("takes no float64; compared in float32 below")
    size = [data.draw(st.integers(1, n)) for n in (4, 9, 6, 9)]
    hypothesis.assume(size[0] * size[2] * size[3] > 2)
    layouts = data.draw(st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)))
    training = data.draw(st.booleans())
    call = make(
        tuple(size),
        training=training,
        residual=data.draw(st.booleans()),
        affine=data.draw(st.sampled_from(("both", "gamma", "none"))),
        channels=data.draw(st.sampled_from(CHANNELS)),
        relu=data.draw(st.booleans()),
        statistics=data.draw(st.booleans()) or not training,
        layouts=layouts,
        seed=data.draw(st.integers(0, 99)),
        margin=1e-7,
    )
    spread = call.z.var((0, 2, 3), correction=0).min()
    hypothesis.assume(not training or float(spread) > 1e-3)  # else r^3 cancels on both sides
    cotangent = lay_out(eager.signed(call.z.shape, 1), data.draw(st.sampled_from(LAYOUTS)))
    with ck.backend(backend):  # type: ignore[arg-type]
        found, truth = both_sides(call, cotangent)
    eager.assert_same(found, truth, 1e-9)


@every_backend
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("channels", CHANNELS)
def test_gradcheck_and_gradgradcheck(backend: str, options: Any, channels: str) -> None:
    if not has_double(backend):
        pytest.skip("takes no float64")
    if channels == "negative gamma" or (channels != "plain" and options["affine"] != "both"):
        pytest.skip("compared with eager above; finite differences take long")
    call = make((2, 3, 2, 2), channels=channels, margin=1e-2, **options)
    names = [n for n, t in call.tensors.items() if t is not None]
    leaves = [call.tensors[n].detach().requires_grad_() for n in names]  # type: ignore[union-attr]
    run = call.of(ours.batch_norm_relu)

    def function(*values: Tensor) -> Tensor:
        return run(**{**call.tensors, **dict(zip(names, values, strict=True))})

    with ck.backend(backend):  # type: ignore[arg-type]
        gradcheck_twice(function, leaves)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_as_good_as_eager(backend: str, dtype: torch.dtype, training: bool, residual: bool) -> None:
    small = backends.triton_interpreted()
    call = make(
        (2, 3, 3, 5) if small else (4, 16, 9, 7), training=training, residual=residual, dtype=dtype,
        channels="negative gamma", margin=1e-3,
        layouts=("contiguous", "contiguous") if training else ("channels_last", "contiguous"),
    )  # fmt: skip
    # gamma and beta stay in float32 beside half precision, as under autocast
    for name in ("weight", "bias"):
        call.tensors[name] = call.tensors[name].float()  # type: ignore[union-attr]
    cotangent = eager.signed(call.z.shape, 1)
    device = device_of(backend)
    moved = {n: None if t is None else t.to(device) for n, t in call.tensors.items()}
    with ck.backend(backend):  # type: ignore[arg-type]
        found = eager.two_orders(call.of(ours.batch_norm_relu), moved, cotangent.to(device, dtype))
    other = eager.two_orders(call.of(eager.batch_norm_relu), call.tensors, cotangent.to(dtype))
    wide = call.to(DOUBLE)
    truth = eager.two_orders(wide.of(eager.batch_norm_relu), wide.tensors, cotangent)
    found = {name: value.cpu() for name, value in found.items()}
    assert all(found[name].dtype == other[name].dtype for name in truth)
    eager.assert_as_good_as(found, other, truth, torch.finfo(dtype).eps)


# ---- statistics ----


@every_backend
@pytest.mark.parametrize("momentum", [0.1, 0.7, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_running_statistics_equal_torchs(backend: str, momentum: float, dtype: torch.dtype) -> None:
    if dtype == DOUBLE and not has_double(backend):
        pytest.skip("takes no float64")
    device = device_of(backend)
    mine = [torch.zeros(5, dtype=dtype, device=device), torch.ones(5, dtype=dtype, device=device)]
    theirs = [torch.zeros(5, dtype=dtype), torch.ones(5, dtype=dtype)]
    with ck.backend(backend):  # type: ignore[arg-type]
        for step in range(3):
            z = torch.randn(2 + step, 5, 3, 2, dtype=dtype) + step
            ours.batch_norm_relu(z.to(device), *mine, training=True, momentum=momentum)
            F.batch_norm(z, *theirs, training=True, momentum=momentum)
            before = [v.clone() for v in mine]
            ours.batch_norm_relu(z.to(device), *mine, training=False)
            assert all(map(torch.equal, before, mine)), "evaluation moved the statistics"
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=tolerance, atol=tolerance)


@cpu
def test_none_for_statistics_takes_those_of_the_batch() -> None:
    for training in (True, False):
        call = make(statistics=False, training=training)
        eager.assert_same(*both_sides(call, eager.signed(call.z.shape, 1)))


# ---- edges ----


@cpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(6, 3, 1, 1), (4, 1, 3, 2), (1, 2, 4, 4), (2, 1, 1, 1)])
def test_maps_of_one_pixel_and_one_channel(shape: Any, training: bool, layout: str) -> None:
    call = make(shape, training=training, residual=True, layouts=(layout, "contiguous"))
    eager.assert_same(*both_sides(call, eager.signed(shape, 1)), 1e-9)


@every_backend
def test_one_value_per_channel_raises_as_in_pytorch(backend: str) -> None:
    z = torch.ones(1, 3, 1, 1, device=device_of(backend))
    with pytest.raises(ValueError, match=r"more than 1 value per channel") as theirs:
        F.batch_norm(z, None, None, training=True)
    with (
        ck.backend(backend),  # type: ignore[arg-type]
        pytest.raises(ValueError, match=r"more than 1 value per channel") as mine,
    ):
        ours.batch_norm_relu(z, torch.zeros(3), torch.ones(3), training=True)
    assert str(mine.value) == str(theirs.value)
    assert ours.batch_norm_relu(z, z.new_zeros(3), z.new_ones(3)).shape == z.shape


@every_backend
@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(backend: str, training: bool) -> None:
    dtype, device = torch.float32, device_of(backend)
    z = torch.empty(0, 3, 4, 4, dtype=dtype, device=device, requires_grad=True)
    gamma = torch.ones(3, device=device, requires_grad=True)
    mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
    with ck.backend(backend):  # type: ignore[arg-type]
        output = ours.batch_norm_relu(z, mean, var, gamma, training=training)
        first = torch.autograd.grad(output.sum(), (z, gamma), create_graph=True)
        (second,) = torch.autograd.grad(first[0].sum(), z, allow_unused=True)
    assert output.shape == first[0].shape == (0, 3, 4, 4)
    assert second is None or second.shape == z.shape
    assert first[1].tolist() == [0.0] * 3
    assert mean.tolist() == [0.0] * 3
    assert var.tolist() == [1.0] * 3


@every_backend
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_bad_values_show_where_they_do_in_eager(
    backend: str, bad: float, training: bool, residual: bool
) -> None:
    call = make(training=training, residual=residual, dtype=torch.float32)
    cotangent = eager.signed(call.z.shape, 1, torch.float32)
    places = [("z", call.z), ("c", cotangent)]
    if residual:
        places.append(("residual", call.tensors["residual"]))  # type: ignore[arg-type]
    for name, broken in places:
        kept = broken[1, 2, 3, 4].item()
        broken[1, 2, 3, 4] = bad
        moved = {
            n: None if t is None else t.to(device_of(backend)) for n, t in call.tensors.items()
        }
        with ck.backend(backend):  # type: ignore[arg-type]
            run = call.of(ours.batch_norm_relu)
            found = eager.two_orders(run, moved, cotangent.to(device_of(backend)), order=1)
        truth = eager.two_orders(call.of(_plain), call.tensors, cotangent, order=1)
        for label, expected in truth.items():
            differs = found[label].cpu().isfinite() != expected.isfinite()
            if label == "d z" and not training:
                differs[1, 2, 3, 4] = False  # 0 times a bad zhat stays bad, there and only there
            assert not bool(differs.any()), f"{bad} in {name}: {label}"
        broken[1, 2, 3, 4] = kept


def _plain(*arguments: Any, residual: Tensor | None, relu: bool) -> Tensor:
    u = eager.batch_norm_relu(*arguments, residual=residual, relu=False)
    return F.relu(u) if relu else u


@cpu
@pytest.mark.usefixtures("poisoned_allocations")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_every_output_is_written(options: Any, layout: str) -> None:
    call = make((2, 17, 3, 5), layouts=(layout, "channels_last"), **options)
    eager.assert_same(*both_sides(call, eager.signed(call.z.shape, 1)))


# ---- guided ----


@every_backend
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("channels", CHANNELS)
def test_guided_and_plain_on_one_graph(backend: str, options: Any, channels: str) -> None:
    """Against F.batch_norm's backward, given the guided gradient of the ReLU by hand."""
    if not has_double(backend):
        pytest.skip("takes no float64")
    call = make(channels=channels, **options)
    leaves = {n: t if t is None else t.requires_grad_() for n, t in call.tensors.items()}
    wanted = [t for t in leaves.values() if t is not None]
    cotangent = eager.signed(call.z.shape, 1)
    assert bool((cotangent < 0).any())
    u = dataclasses.replace(call, relu=False).of(eager.batch_norm_relu)(**leaves)
    open_ = (u > 0) if call.relu else torch.ones_like(u, dtype=torch.bool)
    by_hand = {
        "plain": cotangent * open_,
        "guided": (cotangent.clamp(min=0) if call.relu else cotangent) * open_,
    }
    with ck.backend(backend):  # type: ignore[arg-type]
        output = call.of(ours.batch_norm_relu)(**leaves)
        for mode in ("guided", "plain", "guided"):
            expected = torch.autograd.grad(u, wanted, by_hand[mode], retain_graph=True)
            context = ck.guided() if mode == "guided" else torch.enable_grad()
            with context:
                found = torch.autograd.grad(output, wanted, cotangent, retain_graph=True)
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@every_backend
def test_guided_has_no_graph(backend: str) -> None:
    z = torch.randn(2, 3, 4, 4, requires_grad=True, device=device_of(backend))
    with ck.backend(backend):  # type: ignore[arg-type]
        output = ours.batch_norm_relu(z, None, None)
        with ck.guided(), pytest.raises(RuntimeError, match="create_graph"):
            torch.autograd.grad(output.sum(), z, create_graph=True)
        (delta,) = torch.autograd.grad(output.square().sum(), z, create_graph=True)
        with ck.guided(), pytest.raises(RuntimeError, match="guided"):
            delta.square().sum().backward()
