"""The network functions together in a graph: orders, recipes, and what PyTorch does with a graph
(transforms, compilers)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nn import eager
from nn.chain import LAYOUTS, images, mine, network, parameters, sides
from torch import Tensor

import camkernels as ck
from camkernels import backends
from camkernels.nn import functional as ours

pytestmark = pytest.mark.skipif(
    backends.triton_interpreted() or backends.unavailable_reason("cpu") is not None,
    reason="needs the C++ kernels, in a process that does not interpret Triton",
)


# ---- one graph, two orders; penalties on gradients of parameters are among them ----


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_orders_of_a_network(layout: str) -> None:
    """eager.two_orders contracts the gradients of all parameters too."""
    tensors, truth, cotangent = sides(layout)
    eager.assert_same(eager.two_orders(mine, tensors, cotangent), truth, 1e-9)


def test_a_penalty_on_the_gradients_of_parameters() -> None:
    found = []
    for side in (ours, eager):
        p = {n: t.requires_grad_() for n, t in parameters().items()}
        loss = network(side, images(), p).square().mean()
        gradients = torch.autograd.grad(loss, list(p.values()), create_graph=True)
        penalty = loss + 10 * sum((g.square().sum() for g in gradients), torch.zeros(()))
        found.append(torch.autograd.grad(penalty, list(p.values())))
    for name, one, other in zip(parameters(), *found, strict=True):
        scale = float(other.abs().max())
        assert float((one - other).abs().max()) <= 1e-9 * max(1.0, scale), name


def test_twice_over_one_graph_and_bit_for_bit() -> None:
    tensors, _, cotangent = sides()
    leaves = {n: t.requires_grad_() for n, t in tensors.items()}
    y = mine(**leaves)
    (delta,) = torch.autograd.grad(y, leaves["x"], cotangent, create_graph=True)
    loss = delta.square().sum()
    results = [
        torch.autograd.grad(loss, list(leaves.values()), retain_graph=True, allow_unused=True)
        for _ in range(3)
    ]
    torch.autograd.grad(loss, leaves["x"])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves["x"])
    for again in results[1:]:
        for one, other in zip(results[0], again, strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)


def test_batch_norm_does_not_depend_on_the_thread_count() -> None:
    z = torch.randn(4, 16, 40, 41)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        tensors: Any = {"z": z, "weight": torch.linspace(-1, 1, 16), "bias": torch.zeros(16)}
        found.append(
            eager.two_orders(
                lambda z, weight, bias: ours.batch_norm_relu(z, None, None, weight, bias, True),
                tensors, eager.signed(z.shape, 1, torch.float32),
            )
        )  # fmt: skip
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)


# ---- recipes ----


def _recipe_user(change: str, side: Any) -> Callable[..., Tensor]:
    convolution = ours.conv2d if side is ours else F.conv2d

    def function(x: Tensor, **p: Tensor) -> Tensor:
        if change.endswith("conv_bn_act"):
            a = side.conv_bn_act(
                x, p["w0"], None, None, None, p["g0"], p["b0"], padding=1, training=True
            )
        else:
            a = side.batch_norm_relu(x, None, None, p["g0"], p["b0"], True)
        if change.startswith("in place"):
            a.add_(1)
        if change.startswith("through a view"):
            a[:, 1:3].mul_(-2)
        if change.startswith("relu"):
            a = a.sub_(0.5)
            a = ours.relu(a, inplace=True) if side is ours else F.relu(a)
        if change.startswith("a part"):
            a = torch.cat((a[:, 4:], a[:, :4]), 1)
        y = convolution(a, p["w1"], padding=1)
        if change.startswith("two"):
            y = y * convolution(a, p["w2"], padding=1) + a
        return y

    return function


@pytest.mark.parametrize("op", ["batch_norm_relu", "conv_bn_act"])
@pytest.mark.parametrize(
    "change", ["none", "in place", "through a view", "relu", "a part", "two convolutions"]
)
def test_an_output_changed_before_the_convolution_is_not_made_again(change: str, op: str) -> None:
    p = parameters()
    used = {n: p[n] for n in ("w0", "g0", "b0", "w1", "w2")}
    if op == "batch_norm_relu":
        used.pop("w0")
    if not change.startswith("two"):
        used.pop("w2")
    tensors: Any = {"x": images(), **used}
    cotangent = eager.signed(tensors["x"].shape, 1)
    name = f"{change}, {op}"
    found = eager.two_orders(_recipe_user(name, ours), tensors, cotangent)
    eager.assert_same(found, eager.two_orders(_recipe_user(name, eager), tensors, cotangent), 1e-9)


def test_an_output_changed_after_the_convolution_does_not_matter() -> None:
    """Eager raises there; what is made again from z is what the convolution read."""
    p = {n: t.requires_grad_() for n, t in parameters().items()}
    a = ours.batch_norm_relu(images(), None, None, p["g0"], p["b0"], True)
    y = ours.conv2d(a, p["w0"])
    a.mul_(3.0)
    (found,) = torch.autograd.grad(y.sum(), p["w0"])
    b = eager.batch_norm_relu(images(), None, None, p["g0"], p["b0"], True)
    (truth,) = torch.autograd.grad(F.conv2d(b, p["w0"]).sum(), p["w0"])
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10)


def test_no_recipe_without_a_graph() -> None:
    p = parameters()
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            a = ours.batch_norm_relu(images(), None, None, p["g0"], p["b0"], True)
        assert not vars(a), "z lives as long as the output for nobody's use"


# ---- what is refused ----


@pytest.mark.parametrize("op", ["batch_norm_relu", "conv_bn_act"])
def test_a_third_derivative_raises_and_the_reference_has_it(op: str) -> None:
    p = parameters()

    def formula(z: Tensor) -> Tensor:
        """PyTorch's own third derivative of F.batch_norm is wrong: it takes the statistics for
        constants there."""
        var, mean = torch.var_mean(z, (0, 2, 3), correction=0, keepdim=True)
        gamma, beta = (p[n].view(1, -1, 1, 1) for n in ("g0", "b0"))
        return ((z - mean) / (var + 1e-5).sqrt() * gamma + beta).relu()

    def third(side: Any) -> Tensor:
        x = images().requires_grad_()
        if side is None:
            y = formula(F.conv2d(x, p["w0"]) if op == "conv_bn_act" else x)
        elif op == "conv_bn_act":
            y = side.conv_bn_act(x, p["w0"], None, None, None, p["g0"], p["b0"], training=True)
        else:
            y = side.batch_norm_relu(x, None, None, p["g0"], p["b0"], True)
        value = y.square().sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, x, create_graph=True)
            value = (gradient * eager.signed(gradient.shape, 1)).square().sum()
        return gradient.detach()

    with pytest.raises(RuntimeError, match=f"third derivative through {op}.*reference"):
        third(ours)
    with ck.backend("reference"):
        found = third(ours)
    truth = third(None)
    assert bool(truth.any())
    torch.testing.assert_close(found, truth, rtol=1e-8, atol=1e-8 * float(truth.abs().max()))


@pytest.mark.parametrize("op", ["batch_norm_relu", "conv_bn_act"])
def test_a_third_derivative_in_evaluation_raises(op: str) -> None:
    """There nothing goes back to z, and only the double backward itself can refuse."""
    p = parameters()
    x, gamma = images().requires_grad_(), p["g0"].requires_grad_()
    constants = (p["b1"], p["g1"].abs() + 1)
    if op == "conv_bn_act":
        y = ours.conv_bn_act(x, p["w0"], None, *constants, gamma, p["b0"])
    else:
        y = ours.batch_norm_relu(x, *constants, gamma, p["b0"])
    (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"third derivative through {op}"):
        torch.autograd.grad(first.square().sum(), gamma, create_graph=True)


def test_the_graph_of_a_penalty_on_weight_gradients_raises_and_the_reference_has_it() -> None:
    """A cotangent reaches z by the input that is made again, around the double backward."""
    p = parameters()

    def penalty() -> tuple[Tensor, Tensor]:
        x, weight = images().requires_grad_(), p["w1"].detach().requires_grad_()
        a = ours.conv_bn_act(x, p["w0"], None, None, None, p["g0"], p["b0"], training=True)
        y = ours.conv2d(a, weight)
        (first,) = torch.autograd.grad(y.sum(), weight, create_graph=True)
        return first.square().sum(), x

    value, x = penalty()
    (plain,) = torch.autograd.grad(value, x, retain_graph=True)
    with pytest.raises(RuntimeError, match="third derivative through conv_bn_act"):
        torch.autograd.grad(value, x, create_graph=True)
    with ck.backend("reference"):
        value, x = penalty()
        (found,) = torch.autograd.grad(value, x, create_graph=True)
        assert found.requires_grad
    torch.testing.assert_close(plain, found.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "dual"])
@pytest.mark.parametrize("op", ["relu", "conv2d", "batch_norm_relu", "conv_bn_act"])
def test_transforms_raise_or_are_right(op: str, transform: str) -> None:
    p = parameters()
    calls: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "relu": lambda side, x: ours.relu(x) if side is ours else F.relu(x),
        "conv2d": lambda side, x: (ours if side is ours else F).conv2d(x, p["w0"]),
        "batch_norm_relu": lambda side, x: side.batch_norm_relu(x, None, None, p["g0"], p["b0"]),
        "conv_bn_act": lambda side, x: side.conv_bn_act(
            x, p["w0"], None, None, None, p["g0"], p["b0"]
        ),
    }

    def apply(side: Any) -> Tensor:
        function, x = (lambda v: calls[op](side, v)), images()
        if transform == "grad":
            return torch.func.grad(lambda v: function(v).square().sum())(x)
        if transform == "vmap":
            return torch.func.vmap(function)(torch.stack((x, 2 * x)))
        if transform == "jvp":
            return torch.func.jvp(function, (x,), (torch.ones_like(x),))[1]
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            return torch.autograd.forward_ad.unpack_dual(function(dual)).tangent

    try:
        found = apply(ours)
    except (RuntimeError, NotImplementedError):
        return
    assert found is not None, "a tangent lost in silence"

    class Plain:  # F.relu, which transforms know
        batch_norm_relu = staticmethod(lambda *a: F.relu(F.batch_norm(*a[:5], True)))
        conv_bn_act = staticmethod(lambda x, w, _, *a: Plain.batch_norm_relu(F.conv2d(x, w), *a))

    torch.testing.assert_close(found, apply(Plain), rtol=1e-10, atol=1e-10)


# ---- compiled regions ----


def test_compiled_regions_are_right_or_raise() -> None:
    torch._dynamo.reset()
    tensors, truth, cotangent = sides()
    compiled = torch.compile(mine, backend="eager")
    eager.assert_same(eager.two_orders(compiled, tensors, cotangent), truth, 1e-9)
    leaves = {n: t.requires_grad_() for n, t in tensors.items()}
    results = []
    for function in (compiled, mine):
        with ck.guided():
            results.append(torch.autograd.grad(function(**leaves), leaves["x"], cotangent)[0])
    assert torch.equal(*results), "a guided backward that a compiler made plain"
    torch._dynamo.reset()  # or the pieces compiled above are found again
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"torch\.compiler\.disable"):
        torch.compile(mine, backend="eager", fullgraph=True)(**leaves)
    torch._dynamo.reset()


@pytest.mark.parametrize("op", ["relu", "conv2d", "batch_norm_relu", "conv_bn_act", "bn_relu_conv"])
def test_no_function_is_ever_traced(op: str) -> None:
    """Whatever a compiler could make of an op: the op itself says no, not something within it."""
    p = parameters()
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "relu": ours.relu,
        "conv2d": lambda x: ours.conv2d(x, p["w0"]),
        "batch_norm_relu": lambda x: ours.batch_norm_relu(x, None, None, p["g0"], p["b0"]),
        "conv_bn_act": lambda x: ours.conv_bn_act(x, p["w0"], None, None, None, p["g0"], p["b0"]),
        "bn_relu_conv": lambda x: ours.bn_relu_conv(x, None, None, p["g0"], p["b0"], p["w0"]),
    }
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: calls[op](x * 1), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"torch\.compiler\.disable"):
        compiled(images().requires_grad_())
    torch._dynamo.reset()
