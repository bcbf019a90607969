"""The network functions together in a graph: recipes, memory, passes, and what else PyTorch does
with a graph (hooks, checkpoints, compilers, transforms)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nn import eager
from ops.oracle import lay_out, storages
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import camkernels as ck
from camkernels import backends
from camkernels.nn import functional as ours

pytestmark = pytest.mark.skipif(
    backends.triton_interpreted() or backends.unavailable_reason("cpu") is not None,
    reason="needs the C++ kernels, in a process that does not interpret Triton",
)
DOUBLE = torch.float64
LAYOUTS = ("contiguous", "channels_last")
C, SIDE = 8, 7
PLANES = 2 * C * SIDE * SIDE  # elements of a z


def parameters(dtype: torch.dtype = DOUBLE) -> dict[str, Tensor]:
    """Of four convolutions with BatchNorm; one gamma is zero, one negative."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=DOUBLE)

    found = {}
    for i in range(4):
        gamma = draw(C).abs() + 0.5
        gamma[1], gamma[2] = 0.0, -gamma[2]
        found |= {f"w{i}": draw(C, C, 3, 3) / 5, f"g{i}": gamma, f"b{i}": draw(C) / 2}
    return {name: value.to(dtype) for name, value in found.items()}


def images(layout: str = "contiguous", dtype: torch.dtype = DOUBLE) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return lay_out(torch.randn(2, C, SIDE, SIDE, generator=generator, dtype=DOUBLE), layout).to(
        dtype
    )


def network(side: Any, x: Tensor, p: dict[str, Tensor], training: bool = True) -> Tensor:
    """conv_bn_act twice, a residual block of it, and BatchNorm-ReLU-convolution."""

    def unit(x: Tensor, i: int, **options: Any) -> Tensor:
        return side.conv_bn_act(
            x, p[f"w{i}"], None, None, None, p[f"g{i}"], p[f"b{i}"], padding=1, training=training,
            **options,
        )  # fmt: skip

    a = unit(x, 0)
    b = unit(unit(a, 1), 2, residual=a)
    c = side.batch_norm_relu(b, None, None, p["g3"], p["b3"], training)
    convolution = ours.conv2d if side is ours else F.conv2d
    return convolution(c, p["w3"], padding=1)


def run(side: Any, layout: str = "contiguous") -> Callable[..., Tensor]:
    return lambda x, **p: network(side, lay_out(x, layout) if layout != "contiguous" else x, p)


def sides(layout: str = "contiguous") -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    tensors = {"x": images(layout), **parameters()}
    return tensors, expected(layout), eager.signed(tensors["x"].shape, 1)


def expected(layout: str = "contiguous") -> dict[str, Tensor]:
    tensors = {"x": images(layout), **parameters()}
    return eager.two_orders(
        lambda x, **p: network(eager, x, p), tensors, eager.signed(tensors["x"].shape, 1)
    )


def mine(x: Tensor, **p: Tensor) -> Tensor:
    return network(ours, x, p)


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


# ---- memory ----


class Saved:
    """Bytes of what is saved inside the block, by storage."""

    def __enter__(self) -> Saved:
        self.tensors: list[Tensor] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)
        self._hooks.__enter__()
        return self

    def _pack(self, tensor: Tensor) -> Tensor:
        self.tensors.append(tensor)
        return tensor

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def full(self, itemsize: int) -> dict[int, int]:
        return {a: n for a, n in storages(self.tensors).items() if n >= PLANES * itemsize}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_bytes(layout: str, dtype: torch.dtype) -> None:
    p = {n: t.requires_grad_() for n, t in parameters(dtype).items()}
    x = images(layout, dtype).requires_grad_()
    x = x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x

    def unit(x: Tensor, i: int, **options: Any) -> Tensor:
        return ours.conv_bn_act(
            x, p[f"w{i}"], None, None, None, p[f"g{i}"], p[f"b{i}"], padding=1, training=True,
            **options,
        )  # fmt: skip

    size = PLANES * x.itemsize
    with Saved() as plain:
        y = unit(unit(unit(x, 0), 1), 2)
    kept = plain.full(x.itemsize)
    assert list(kept.values()) == [size] * 4, "x and the z of three ops"
    with ck.no_weight_gradients(), Saved() as again:
        cotangent = eager.signed(y.shape, 1, dtype)
        (delta,) = torch.autograd.grad(y, x, cotangent, create_graph=True)
    new = {a: n for a, n in again.full(x.itemsize).items() if a not in kept}
    assert list(new.values()) == [size] * 3, "one g' for each of three ops"
    del delta
    with Saved() as residual:
        unit(x, 0, residual=x)
    masks = [t for t in residual.tensors if t.dtype == torch.uint8]
    bits = 2 * C * -(-SIDE * SIDE // 8) if layout == "contiguous" else 2 * SIDE * SIDE * -(-C // 8)
    assert list(residual.full(x.itemsize).values()) == [size] * 2, "x and z"
    assert [m.numel() for m in masks] == [bits]
    with Saved() as alone:
        ours.conv2d(ours.batch_norm_relu(x * 1, None, None, p["g0"], p["b0"], True), p["w1"])
    assert list(alone.full(x.itemsize).values()) == [size], "z alone serves both"


class Carried:
    """Saved tensors are carried elsewhere: as copies, or as NumPy arrays that forget strides."""

    def __init__(self, how: str) -> None:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(
            (lambda t: t.detach().cpu().clone())
            if how == "copies"
            else (
                lambda t: (
                    t.detach().numpy().tobytes("C")
                    and (t.dtype, t.shape, t.detach().contiguous().clone())
                )
            ),
            (lambda t: t) if how == "copies" else (lambda kept: kept[2].clone()),
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("how", ["copies", "without strides"])
def test_saved_tensors_may_be_carried_elsewhere(how: str, layout: str) -> None:
    tensors, truth, cotangent = sides(layout)
    with Carried(how).hooks:
        eager.assert_same(eager.two_orders(mine, tensors, cotangent), truth, 1e-9)


@pytest.mark.parametrize("order", [1, 2])
def test_checkpoint(order: int) -> None:
    tensors, truth, cotangent = sides()

    def function(x: Tensor, **p: Tensor) -> Tensor:
        return checkpoint(lambda v: network(ours, v, p), x, use_reentrant=False)

    found = eager.two_orders(function, tensors, cotangent, order=order)
    eager.assert_same(found, {n: truth[n] for n in found}, 1e-9)


# ---- convolution passes ----


def test_seven_passes_per_convolution() -> None:
    """Forward, guided D, plain D, and F + W + D + W of the backward of the loss."""
    p = {n: t.requires_grad_() for n, t in parameters(torch.float32).items()}
    x = images(dtype=torch.float32).requires_grad_()
    with eager.Convolutions() as counted:
        loss = network(ours, x, p).flatten(1).mean(1).square().sum()
        with ck.guided(), ck.no_weight_gradients():
            (guided,) = torch.autograd.grad(loss, x, retain_graph=True)
        with ck.no_weight_gradients():
            (delta,) = torch.autograd.grad(loss, x, create_graph=True)
        before = dict(counted.counts)
        (loss + F.cosine_similarity(delta.flatten(1), guided.flatten(1)).mean()).backward()
    assert before == {"F": 4, "D": 8, "W": 0}, "weight gradients in an input-gradient pass"
    assert counted.counts == {"F": 8, "D": 12, "W": 8}
    assert set(counted.filters) == {(C, C, 3, 3)}
    assert all(t.grad is not None for t in p.values())


def test_no_weight_gradients_leaves_them_out() -> None:
    p = {n: t.requires_grad_() for n, t in parameters().items()}
    x = images().requires_grad_()
    y = mine(x, **p)
    with ck.no_weight_gradients():
        found = torch.autograd.grad(y.sum(), [x, *p.values()], retain_graph=True, allow_unused=True)
        with pytest.raises(RuntimeError, match="not have been used"):
            torch.autograd.grad(y.sum(), p["g1"], retain_graph=True)
    assert found[0].any()
    assert set(found[1:]) == {None}
    (plain,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(plain, found[0])


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
    with pytest.raises(Exception, match=r"(?i)graph.?break|disable|unsupported|skip"):
        torch.compile(mine, backend="eager", fullgraph=True)(**leaves)
    torch._dynamo.reset()
