"""conv_bn_act and bn_relu_conv against F.conv2d, F.batch_norm, add and ReLU, to two orders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from nn import eager
from ops.base import tested_backends
from ops.oracle import lay_out
from torch import Tensor

import camkernels as ck
from camkernels import backends
from camkernels.nn import functional as ours

DOUBLE = torch.float64
pytestmark = pytest.mark.skipif(
    backends.triton_interpreted(), reason="its kernels are those of batch_norm_relu"
)
every_backend = pytest.mark.parametrize(
    "backend", [b for b in tested_backends() if b == "reference" or "cpu" in str(b)]
)
CHANNELS = ("plain", "zero gamma", "negative gamma", "dead")
OPTIONS: dict[str, dict[str, Any]] = {
    "training": {"training": True},
    "evaluation": {"training": False},
    "residual": {"training": True, "residual": True, "bias": False},
    "residual, evaluation": {"training": False, "residual": True},
    "no relu": {"training": True, "relu": False, "residual": True},
    "no affine": {"training": True, "affine": False, "bias": False},
    "no relu, no affine, evaluation": {"training": False, "affine": False, "relu": False},
}


class Call:
    """Tensors by name, and a function of them for either side."""

    def __init__(
        self,
        *,
        training: bool,
        residual: bool = False,
        relu: bool = True,
        affine: bool = True,
        bias: bool = True,
        channels: str = "plain",
        dtype: torch.dtype = DOUBLE,
        layout: str = "contiguous",
        geometry: dict[str, Any] | None = None,
        shape: tuple[int, ...] = (3, 2, 5, 6),
        weight: tuple[int, ...] = (4, 2, 3, 3),
        margin: float = 1e-4,
    ) -> None:
        self.geometry = {"stride": 1, "padding": 1} if geometry is None else geometry
        filters = weight[0]
        for seed in range(300):
            generator = torch.Generator().manual_seed(seed)

            def draw(*size: int, generator: torch.Generator = generator) -> Tensor:
                return torch.randn(size, generator=generator, dtype=DOUBLE)

            gamma, beta = draw(filters).abs() + 0.5, draw(filters)
            gamma[::2] *= {"zero gamma": 0.0, "negative gamma": -1.0}.get(channels, 1.0)
            beta[::2] -= 100.0 if channels == "dead" else 0.0
            self.mean, self.var = draw(filters), draw(filters).abs() + 0.5
            self.tensors: dict[str, Any] = {
                "x": lay_out(draw(*shape).to(dtype), layout),
                "conv_weight": draw(*weight).to(dtype),
                "conv_bias": draw(filters).to(dtype) if bias else None,
                "weight": gamma if affine else None,
                "bias": beta if affine else None,
                "residual": None,
            }
            self.options = {"training": training, "relu": False}
            output = self.of(eager.conv_bn_act)(**self.tensors)
            if residual:
                self.tensors["residual"] = lay_out(draw(*output.shape).to(dtype), layout)
                output = output + self.tensors["residual"]
            self.options["relu"] = relu
            off = output[output != 0].abs()
            if off.numel() == 0 or float(off.min()) > margin:
                break
        else:
            raise AssertionError("no such inputs found")
        if dtype != DOUBLE:
            for name in ("weight", "bias"):
                self.tensors[name] = self.tensors[name].float() if affine else None
        self.cotangent = eager.signed(output.shape, 1, dtype)

    def of(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """``function`` with running statistics of its own."""

        def run(
            x: Tensor, conv_weight: Tensor, conv_bias: Any, weight: Any, bias: Any, **rest: Any
        ) -> Tensor:
            wide = DOUBLE if x.dtype == DOUBLE else torch.float32
            mean, var = self.mean.to(wide, copy=True), self.var.to(wide, copy=True)
            return function(
                x, conv_weight, conv_bias, mean, var, weight, bias,
                **self.geometry, **self.options, **rest,
            )  # fmt: skip

        return run

    def both_sides(self, order: int = 2) -> tuple[Any, Any]:
        return (
            eager.two_orders(self.of(ours.conv_bn_act), self.tensors, self.cotangent, order=order),
            eager.two_orders(self.of(eager.conv_bn_act), self.tensors, self.cotangent, order=order),
        )


@every_backend
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    ("channels", "layout"), zip(CHANNELS, ("contiguous", "channels_last") * 2, strict=True)
)
def test_two_orders_equal_eager(backend: str, options: str, channels: str, layout: str) -> None:
    call = Call(channels=channels, layout=layout, **OPTIONS[options])
    with ck.backend(backend):  # type: ignore[arg-type]
        eager.assert_same(*call.both_sides(), 1e-9)


@every_backend
@pytest.mark.parametrize("options", OPTIONS)
def test_a_loss_and_a_penalty_in_one_backward(backend: str, options: str) -> None:
    """The cotangent of z that the double backward leaves joins that of the output."""
    call = Call(channels="negative gamma", **OPTIONS[options])
    leaves = {n: None if t is None else t.requires_grad_() for n, t in call.tensors.items()}
    wanted = [t for t in leaves.values() if t is not None]
    found = []
    for function in (ours.conv_bn_act, eager.conv_bn_act):
        with ck.backend(backend):  # type: ignore[arg-type]
            loss = (call.of(function)(**leaves) * call.cotangent).square().sum()
            (delta,) = torch.autograd.grad(loss, leaves["x"], create_graph=True)
            found.append(torch.autograd.grad(loss + delta.square().sum(), wanted))
    for one, other in zip(*found, strict=True):
        scale = max(1.0, float(other.abs().max()))
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9 * scale)


@hypothesis.given(data=st.data())
def test_any_geometry(data: Any) -> None:
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    groups = draw(1, 2)
    weight = (groups * draw(1, 3), draw(1, 2), draw(1, 3), draw(1, 3))
    call = Call(
        training=data.draw(st.booleans()), residual=data.draw(st.booleans()),
        relu=data.draw(st.booleans()), affine=data.draw(st.booleans()),
        bias=data.draw(st.booleans()), channels=data.draw(st.sampled_from(CHANNELS)),
        layout=data.draw(st.sampled_from(("contiguous", "channels_last", "sliced"))),
        shape=(draw(2, 3), groups * weight[1], draw(3, 6), draw(3, 6)), weight=weight,
        geometry={"stride": (draw(1, 2), draw(1, 2)), "padding": draw(0, 2), "groups": groups},
        margin=1e-7,
    )  # fmt: skip
    eager.assert_same(*call.both_sides(), 1e-8)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck_and_gradgradcheck(options: str) -> None:
    call = Call(
        shape=(2, 1, 2, 2), weight=(2, 1, 2, 1), geometry={"padding": (1, 0)}, margin=1e-2,
        channels="plain" if "no affine" in options else "zero gamma",
        **OPTIONS[options],
    )  # fmt: skip
    names = [n for n, t in call.tensors.items() if t is not None]
    leaves = [call.tensors[n].requires_grad_() for n in names]

    def function(*values: Tensor) -> Tensor:
        given = {**call.tensors, **dict(zip(names, values, strict=True))}
        return call.of(ours.conv_bn_act)(**given)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", ["training", "residual", "evaluation"])
def test_as_good_as_eager(dtype: torch.dtype, options: str) -> None:
    # no bias of the convolution when training: its gradient is zero, and both sides give noise
    call = Call(
        bias=OPTIONS[options].get("bias", not OPTIONS[options]["training"]),
        dtype=DOUBLE,
        margin=2e-3,
        shape=(4, 8, 6, 7),
        weight=(3, 8, 3, 3),
        **{n: o for n, o in OPTIONS[options].items() if n != "bias"},
    )
    narrow = {n: None if t is None else t.to(dtype) for n, t in call.tensors.items()}
    for name in ("weight", "bias"):
        narrow[name] = narrow[name].float()
    cotangent = call.cotangent.to(dtype)
    found = eager.two_orders(call.of(ours.conv_bn_act), narrow, cotangent)
    other = eager.two_orders(call.of(eager.conv_bn_act), narrow, cotangent)
    wide = {n: None if t is None else t.double() for n, t in narrow.items()}
    truth = eager.two_orders(call.of(eager.conv_bn_act), wide, call.cotangent)
    eager.assert_as_good_as(found, other, truth, torch.finfo(dtype).eps)


@every_backend
@pytest.mark.parametrize("options", OPTIONS)
def test_guided_and_plain_on_one_graph(backend: str, options: str) -> None:
    call = Call(channels="negative gamma", **OPTIONS[options])
    leaves = {n: None if t is None else t.requires_grad_() for n, t in call.tensors.items()}
    wanted = [t for t in leaves.values() if t is not None]
    with ck.backend(backend):  # type: ignore[arg-type]
        mine = call.of(ours.conv_bn_act)(**leaves)
        theirs = call.of(eager.conv_bn_act)(**leaves)
        for guided in (True, False, True):
            with ck.guided() if guided else torch.enable_grad():
                found = torch.autograd.grad(mine, wanted, call.cotangent, retain_graph=True)
            with eager.eager_guided() if guided else torch.enable_grad():
                expected = torch.autograd.grad(theirs, wanted, call.cotangent, retain_graph=True)
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@every_backend
def test_running_statistics(backend: str) -> None:
    call = Call(training=True)
    statistics = [[call.mean.clone(), call.var.clone()] for _ in range(2)]
    t = call.tensors
    for function, (mean, var) in zip((ours, eager), statistics, strict=True):
        with ck.backend(backend):  # type: ignore[arg-type]
            for momentum in (0.1, 0.5):
                function.conv_bn_act(  # type: ignore[attr-defined]
                    t["x"], t["conv_weight"], t["conv_bias"], mean, var, t["weight"], t["bias"],
                    training=True, momentum=momentum,
                )  # fmt: skip
    for one, other in zip(*statistics, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


@every_backend
def test_wrong_residuals_and_single_values_raise(backend: str) -> None:
    x, w = torch.rand(1, 3, 4, 4), torch.rand(2, 3, 4, 4)
    with ck.backend(backend):  # type: ignore[arg-type]
        for shape in ((1, 2, 2, 1), (1, 1, 1, 1), (2, 2, 1, 1)):
            with pytest.raises(ValueError, match=r"residual: expected shape \(1, 2, 1, 1\)"):
                ours.conv_bn_act(
                    x, w, None, torch.zeros(2), torch.ones(2), None, None,
                    residual=torch.rand(shape),
                )  # fmt: skip
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            ours.conv_bn_act(x, w, None, None, None, None, None, training=True)
        with pytest.raises(ValueError, match=r"weight: expected shape \(2,\)"):
            ours.conv_bn_act(x, w, None, None, None, torch.ones(3), torch.ones(3), training=True)


@pytest.mark.usefixtures("poisoned_allocations")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_every_output_is_written(options: str, layout: str) -> None:
    call = Call(layout=layout, **OPTIONS[options])
    eager.assert_same(*call.both_sides(), 1e-9)


# ---- bn_relu_conv ----


@every_backend
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_bn_relu_conv_equals_eager(backend: str, training: bool, layout: str) -> None:
    torch.manual_seed(3)
    tensors: dict[str, Any] = {
        "x": lay_out(torch.randn(3, 4, 5, 6, dtype=DOUBLE), layout),
        "weight": torch.tensor([1.0, 0.0, -1.0, 2.0], dtype=DOUBLE),
        "bias": torch.randn(4, dtype=DOUBLE),
        "conv_weight": torch.randn(3, 4, 3, 3, dtype=DOUBLE),
        "conv_bias": torch.randn(3, dtype=DOUBLE),
    }

    def mine(x: Tensor, weight: Tensor, bias: Tensor, **conv: Tensor) -> Tensor:
        mean, var = torch.zeros(4, dtype=DOUBLE), torch.ones(4, dtype=DOUBLE)
        return ours.bn_relu_conv(
            x, mean, var, weight, bias, **conv, stride=2, padding=1, training=training
        )

    def theirs(x: Tensor, weight: Tensor, bias: Tensor, **conv: Tensor) -> Tensor:
        mean, var = torch.zeros(4, dtype=DOUBLE), torch.ones(4, dtype=DOUBLE)
        a = eager.batch_norm_relu(x, mean, var, weight, bias, training)
        return torch.nn.functional.conv2d(a, conv["conv_weight"], conv["conv_bias"], 2, 1)

    cotangent = eager.signed((3, 3, 3, 3), 1)
    with ck.backend(backend):  # type: ignore[arg-type]
        found = eager.two_orders(mine, tensors, cotangent)
    eager.assert_same(found, eager.two_orders(theirs, tensors, cotangent), 1e-9)
