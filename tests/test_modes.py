"""ck.guided and ck.no_weight_gradients: who sees them, and what refuses to work under them."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import camkernels as ck
from camkernels import modes
from camkernels.nn.functional import relu

U = torch.tensor([-1.0, 2.0, 3.0, 4.0])
GRAD = torch.tensor([1.0, -1.0, 1.0, -2.0])
PLAIN, GUIDED = [0.0, -1.0, 1.0, -2.0], [0.0, 0.0, 1.0, 0.0]


def leaf() -> Tensor:
    return U.clone().requires_grad_()


def backward_of(function: Callable[[Tensor], Tensor], guided: bool) -> list[float]:
    u = leaf()
    v = function(u)
    if guided:
        with ck.guided():
            (found,) = torch.autograd.grad(v, u, GRAD)
    else:
        (found,) = torch.autograd.grad(v, u, GRAD)
    result: list[float] = found.tolist()
    return result


def test_the_mode_at_backward_time_decides() -> None:
    with ck.guided():
        u = leaf()
        v = relu(u)
    (found,) = torch.autograd.grad(v, u, GRAD, retain_graph=True)
    assert found.tolist() == PLAIN
    with ck.guided():
        (found,) = torch.autograd.grad(v, u, GRAD)
    assert found.tolist() == GUIDED


@pytest.mark.parametrize(
    ("mode", "active"),
    [(ck.guided, modes.guided_now), (ck.no_weight_gradients, lambda: not _weights())],
)
def test_nesting_and_exceptions(mode: Any, active: Callable[[], bool]) -> None:
    with torch.no_grad():
        assert not active()
        with mode():
            with mode():
                assert active()
            assert active()
        assert not active()
        with pytest.raises(KeyError), mode(), mode():
            raise KeyError
        assert not active()
        reused = mode()
        with reused, reused:
            assert active()
        assert not active()


def _weights() -> bool:
    return modes.weight_gradients_wanted()


def test_the_modes_do_not_mix() -> None:
    with ck.no_weight_gradients(), torch.no_grad():
        assert not modes.guided_now()
    with ck.guided():
        assert _weights()


def test_create_graph_raises() -> None:
    u = leaf()
    v = relu(u)
    with ck.guided(), pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(v, u, GRAD, create_graph=True)
    (found,) = torch.autograd.grad(v, u, GRAD)  # the failure left nothing behind
    assert found.tolist() == PLAIN


def test_a_double_backward_raises() -> None:
    u, g = leaf(), GRAD.clone().requires_grad_()
    (first,) = torch.autograd.grad(relu(u), u, g, create_graph=True)
    with ck.guided(), pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(first.sum(), g, retain_graph=True)
    (found,) = torch.autograd.grad(first.sum(), g)
    assert found.tolist() == [0.0, 1.0, 1.0, 1.0]


def test_two_threads_at_once() -> None:
    """One guided, one plain, both inside their backward at the same time."""
    meet = threading.Barrier(2, timeout=60)
    wrong: list[Any] = []

    def work(guided: bool) -> None:
        try:
            for _ in range(50):
                u = leaf()
                v = relu(u)
                v.register_hook(lambda grad: (meet.wait(), None)[1])
                if guided:
                    with ck.guided():
                        (found,) = torch.autograd.grad(v, u, GRAD)
                else:
                    (found,) = torch.autograd.grad(v, u, GRAD)
                if found.tolist() != (GUIDED if guided else PLAIN):
                    wrong.append((guided, found.tolist()))
        except Exception as error:  # told below, on the main thread
            wrong.append(error)
            meet.abort()

    threads = [threading.Thread(target=work, args=(guided,)) for guided in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_new_thread_starts_without_modes() -> None:
    seen: list[bool] = []
    with ck.guided(), ck.no_weight_gradients(), torch.no_grad():
        thread = threading.Thread(
            target=lambda: seen.extend((modes._depth(modes.guided.key) > 0, _weights()))
        )
        thread.start()
        thread.join()
    assert seen == [False, True]


class _Nested(torch.autograd.Function):
    """A backward that runs another backward: reentrant, as in checkpoints."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, depth: int, threads: set[int]) -> Tensor:
        ctx.depth, ctx.threads = depth, threads
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.threads.add(threading.get_ident())
        with torch.enable_grad():
            u = leaf()
            # The ReLU only innermost: those further out would hide a plain one there.
            v = _Nested.apply(u * 1, ctx.depth - 1, ctx.threads) if ctx.depth else relu(u)
        v.backward(grad)
        return u.grad, None, None  # type: ignore[return-value]


@pytest.mark.parametrize("depth", [0, 3, 80])
def test_threads_of_autograd_see_the_mode_of_the_caller(depth: int) -> None:
    """Beyond 60 nested backwards autograd hands over to a thread of its pool."""
    threads: set[int] = set()
    assert backward_of(lambda u: _Nested.apply(u, depth, threads), True) == GUIDED
    assert backward_of(lambda u: _Nested.apply(u, depth, threads), False) == PLAIN
    assert (len(threads) > 1) == (depth > 60)
    assert backward_of(lambda u: _Nested.apply(u, depth, threads), True) == GUIDED


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant: bool) -> None:
    def function(u: Tensor) -> Tensor:
        found: Tensor = checkpoint(lambda x: relu(x * 1), u, use_reentrant=reentrant)
        return found

    for guided, expected in ((True, GUIDED), (False, PLAIN)):
        u = leaf()
        v = function(u)
        if guided:
            with ck.guided():
                v.backward(GRAD)  # reentrant checkpoints allow no autograd.grad
        else:
            v.backward(GRAD)
        assert u.grad is not None
        assert u.grad.tolist() == expected


# ---- leaves whose gradient nobody reads ----


def test_the_mark_of_an_unread_leaf_is_its_own() -> None:
    marked, other = leaf(), leaf()
    modes.mark_unread(marked)
    modes.mark_unread(marked)
    assert modes.is_unread(marked)
    made = (marked.detach(), marked.clone(), marked.view(2, 2), marked * 1, marked[:])
    assert not any(map(modes.is_unread, (other, *made)))
    assert marked.requires_grad
    assert torch.autograd.grad(relu(marked), marked, GRAD)[0].tolist() == PLAIN


# ---- autocast ----


def test_autocast_of_meta_follows_the_cpu() -> None:
    devices = ("cpu", "meta", torch.device("cpu"), torch.device("meta"))
    for device in devices:
        assert modes.autocast_dtype(device) is None
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype=dtype):
                assert modes.autocast_dtype(device) == dtype
                assert modes.autocast_dtype("cuda") is None
                with torch.autocast("cpu", enabled=False):
                    assert modes.autocast_dtype(device) is None
        assert modes.autocast_dtype(device) is None


@pytest.mark.parametrize("device", ["cpu", "meta", torch.device("meta")])
def test_no_autocast(device: torch.device | str) -> None:
    place = torch.device(device)
    one = torch.ones(2, 2, device=place)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        with modes.no_autocast(device):
            assert modes.autocast_dtype(device) is None
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
            assert (one @ one).dtype == torch.float32
        assert modes.autocast_dtype(device) == torch.bfloat16, "the block outlived itself"
    with modes.no_autocast(device):
        assert modes.autocast_dtype(device) is None


def test_convolutions_on_meta_have_the_dtype_of_those_on_the_cpu() -> None:
    tensors = torch.ones(1, 3, 5, 5), torch.ones(2, 3, 3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [
            ck.nn.functional.conv2d(*(t.to(device) for t in tensors)).dtype
            for device in ("cpu", "meta")
        ]
    assert found == [torch.bfloat16] * 2


# ---- transforms: right, or an error; never quietly plain ----


@pytest.mark.parametrize("guided", [False, True])
def test_functorch_raises(guided: bool) -> None:
    context = ck.guided() if guided else torch.enable_grad()
    with context:
        with pytest.raises(RuntimeError, match="setup_context"):
            torch.func.grad(lambda u: relu(u).sum())(U)
        with pytest.raises(RuntimeError, match="setup_context"):
            torch.vmap(relu)(U.view(2, 2))
        with pytest.raises(RuntimeError, match="setup_context"):
            torch.func.jvp(relu, (U,), (GRAD,))


def test_forward_mode_raises() -> None:
    import torch.autograd.forward_ad as forward_ad

    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        relu(forward_ad.make_dual(U, GRAD))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_records_the_rule_of_its_time(mode: str) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    for guided, expected in ((True, GUIDED), (False, PLAIN)):
        traced = make_fx(functools.partial(_grad_inside, guided=guided), tracing_mode=mode)(U, GRAD)
        assert traced(U, GRAD).tolist() == expected


def _grad_inside(u: Tensor, grad: Tensor, guided: bool) -> Tensor:
    u = u.detach().requires_grad_()
    v = relu(u)
    if guided:
        with ck.guided():
            return torch.autograd.grad(v, u, grad)[0]
    return torch.autograd.grad(v, u, grad)[0]


@pytest.fixture
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
class TestCompiled:
    """relu is a graph break, so that its backward runs eagerly and reads the mode."""

    def test_backward_outside(self) -> None:
        compiled = torch.compile(lambda u: relu(u * 1) + 0, backend="aot_eager")
        assert backward_of(compiled, True) == GUIDED
        assert backward_of(compiled, False) == PLAIN
        assert backward_of(compiled, True) == GUIDED

    def test_backward_inside(self) -> None:
        for guided, expected in ((True, GUIDED), (False, PLAIN)):
            torch._dynamo.reset()
            compiled = torch.compile(
                lambda u, grad, g=guided: _grad_inside(u, grad, g), backend="eager"
            )
            assert compiled(U, GRAD).tolist() == expected

    def test_fullgraph_raises(self) -> None:
        compiled = torch.compile(lambda u: relu(u * 1), backend="eager", fullgraph=True)
        with pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):
            compiled(leaf())

    def test_compiled_autograd(self) -> None:
        from torch._dynamo import compiled_autograd

        with compiled_autograd._enable(torch.compile(backend="eager")):
            for guided in (False, True, False, True):
                u = leaf()
                v = relu(u * 1)
                if guided:
                    with ck.guided():
                        v.backward(GRAD)
                else:
                    v.backward(GRAD)
                assert u.grad is not None
                assert u.grad.tolist() == (GUIDED if guided else PLAIN)
