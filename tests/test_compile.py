"""Under torch.compile and dispatch modes: the library ops, with both orders intact.

``TABLE`` is the table of the documentation: (what is compiled, compiler) to what happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import camkernels as ck
from camkernels import backends

COMPILERS = ("eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow))
TABLE = {
    ("forward", "eager"): "right",
    ("forward", "aot_eager"): "right",
    ("forward, then first order", "eager"): "right",
    ("forward, then first order", "aot_eager"): "right",
    ("inner gradient and loss in one function", "eager"): "right",
    ("inner gradient and loss in one function", "aot_eager"): "right",
    ("forward, then both orders outside", "eager"): "right",
    ("forward, then both orders outside", "aot_eager"): "raises",
}
kernels = pytest.mark.parametrize(
    "backend",
    [
        "reference",
        pytest.param(
            "cpu",
            marks=pytest.mark.skipif(
                backends.unavailable_reason("cpu") is not None,
                reason=f"backend cpu: {backends.unavailable_reason('cpu')}",
            ),
        ),
    ],
)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def inner_gradients() -> Iterator[None]:
    """Lets ``torch.autograd.grad`` stand inside a compiled function; put back after."""
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        pytest.skip("this torch cannot trace torch.autograd.grad")
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        yield


def inputs(batch: int = 2, width: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 3, 4, width)
    return torch.rand(shape, generator=generator) + 0.1, torch.rand(shape, generator=generator)


def loss(a: Tensor, g: Tensor) -> Tensor:
    statistics, maps = ck.cam_statistics(a, g, return_maps=True)
    weighted = ck.class_activation_map(a, g.mean((2, 3)))
    return (
        statistics.entropy.sum()
        + statistics.area.sum()
        + maps.square().sum()
        + ck.cam_dispersion(ck.grad_cam(a, g)).sum()
        + ck.map_statistics(weighted, clamp=True).variance.sum()
    )


def penalty(a: Tensor, g: Tensor) -> Tensor:
    """A loss whose gradient is differentiated inside."""
    a = a * 1.0
    found = torch.autograd.grad(loss(a, g), (a, g), create_graph=True)
    return sum((f.square().sum() for f in found), torch.zeros(()))


def training_step(images: Tensor, scale: Tensor, head: Tensor) -> Tensor:
    """As CAM entropy does it: G by the inner gradient, the loss on the map."""
    a = images * scale
    scores = ((a.mean((2, 3)) @ head).tanh()).square().sum()
    (g,) = torch.autograd.grad(scores, a, create_graph=True)
    return scores + ck.cam_statistics(a, g).dispersion.sum() + ck.grad_cam(a, g).square().sum()


def gradients(function: Callable[..., Tensor], *values: Tensor) -> list[Tensor]:
    leaves = [v.clone().requires_grad_() for v in values]
    result = function(*leaves)
    return [result.detach(), *torch.autograd.grad(result, leaves)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=1e-5)
        assert bool(other.any())


@kernels
@pytest.mark.parametrize("compiler", COMPILERS)
def test_forward_and_first_order(backend: str, compiler: str) -> None:
    with ck.backend(backend):  # type: ignore[arg-type]
        compiled = torch.compile(loss, backend=compiler, fullgraph=True)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*inputs()), loss(*inputs()))
        assert_same(gradients(compiled, *inputs()), gradients(loss, *inputs()))


@pytest.mark.parametrize("compiler", COMPILERS)
def test_dynamic_shapes_compile_once(compiler: str) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend(compiler)
    compiled = torch.compile(loss, backend=counter, fullgraph=True, dynamic=True)
    for batch, width in ((2, 5), (3, 7), (6, 9)):
        values = inputs(batch, width, seed=batch)
        assert_same(gradients(compiled, *values), gradients(loss, *values))
    assert counter.frame_count == 1


@kernels
@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.usefixtures("inner_gradients")
def test_inner_gradient_and_loss_in_one_function(backend: str, compiler: str) -> None:
    with ck.backend(backend):  # type: ignore[arg-type]
        compiled = torch.compile(penalty, backend=compiler, fullgraph=True)
        assert_same(gradients(compiled, *inputs()), gradients(penalty, *inputs()))
        images, _ = inputs()
        generator = torch.Generator().manual_seed(3)
        values = images, torch.tensor(1.3), torch.rand(3, 4, generator=generator)
        compiled = torch.compile(training_step, backend=compiler, fullgraph=True)
        assert_same(gradients(compiled, *values), gradients(training_step, *values))


def both_orders_outside(function: Callable[..., Tensor]) -> list[Tensor]:
    a, g = (v.clone().requires_grad_() for v in inputs())
    (to_a,) = torch.autograd.grad(function(a, g), a, create_graph=True)
    to_a.square().sum().backward()
    assert a.grad is not None
    assert g.grad is not None
    return [to_a.detach(), a.grad, g.grad]


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_both_orders_outside(compiler: str) -> None:
    compiled = torch.compile(loss, backend=compiler, fullgraph=True)
    if TABLE["forward, then both orders outside", compiler] == "raises":
        with pytest.raises(RuntimeError, match=r"double backward|does not require grad"):
            both_orders_outside(compiled)
    else:
        assert_same(both_orders_outside(compiled), both_orders_outside(loss))


def test_the_library_ops_are_what_is_traced() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compile(loss, backend=keep, fullgraph=True)(*inputs())
    targets = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    for name in ("cam_fwd", "cam_statistics_fwd", "map_statistics_fwd"):
        assert any(f"camkernels.{name}" in target for target in targets), targets


def test_fake_tensors_get_shapes_and_gradients() -> None:
    with FakeTensorMode():
        a = torch.rand(2, 3, 4, 5, requires_grad=True)
        statistics, maps = ck.cam_statistics(a, torch.rand(2, 3, 4, 5), return_maps=True)
        statistics.area.sum().backward()
        assert maps.shape == (2, 4, 5)
        assert a.grad is not None
        assert a.grad.shape == a.shape


# ---- torch.library's own checks of every op, with inputs that require grad ----


def library_calls(backend: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    a, g = (v.requires_grad_() for v in inputs())
    weights = torch.rand(2, 3).requires_grad_()
    ops = torch.ops.camkernels
    for relu in (True, False):
        for second in (g, weights):
            yield "cam_fwd", (a, second, relu, backend)
            yield "cam_statistics_fwd", (a, second, relu, backend)
    maps = (torch.rand(2, 4, 5) + 0.1).requires_grad_()
    cotangent = torch.rand(2, 4, 5).requires_grad_()
    for channels_last in (True, False):
        rest = (channels_last, torch.float32, backend)
        yield "cam_bwd", (cotangent, a, weights, maps.detach(), *rest)
    yield "cam_bwd", (cotangent, None, weights, None, False, torch.float32, backend)
    yield "cam_bwd", (cotangent, a, None, maps.detach(), False, torch.float32, backend)
    for clamp in (True, False):
        yield "map_statistics_fwd", (maps, clamp, backend)
        known = [s.detach() for s in ops.map_statistics_fwd(maps, clamp, backend)]
        grads: list[Tensor | None] = [torch.rand_like(s).requires_grad_() for s in known]
        grads[3] = None
        yield "map_statistics_bwd", (maps, *known, *grads, clamp, backend)
        rest = (clamp, False, torch.float32, backend)
        yield "cam_statistics_bwd", (maps, a, weights, cotangent, *known, *grads, *rest)


# It takes its time, and what it checks is the specification that all backends share.
@pytest.mark.parametrize(
    "backend", [pytest.param(b, marks=pytest.mark.slow) for b in ("reference", "cpu")]
)
@pytest.mark.filterwarnings("ignore:.*anomaly.*")
def test_opcheck(backend: str) -> None:
    if reason := backends.unavailable_reason(backend):
        pytest.skip(f"backend {backend}: {reason}")
    seen = set()
    for name, arguments in library_calls(backend):
        torch.library.opcheck(getattr(torch.ops.camkernels, name).default, arguments)
        seen.add(name)
    ops = ("cam", "map_statistics", "cam_statistics")
    assert seen == {f"{op}_{kind}" for op in ops for kind in ("fwd", "bwd")}
