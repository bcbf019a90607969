"""relu: plain and guided on one graph, a mask of one bit per element, in place."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from ops.base import device_of, every_backend, has_double
from torch import Tensor

import camkernels as ck
from camkernels import backends
from camkernels.nn.functional import relu
from camkernels.ops.relu import op

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SAVES = ("mask", "output")
every_save = pytest.mark.parametrize("save", SAVES)
BAD = (math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0)
LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced", "expanded", "negated", "offset")


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(2)


def dtypes_of(backend: str) -> tuple[torch.dtype, ...]:
    return DTYPES if has_double(backend) else DTYPES[:3]


def values(count: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Signed, with NaN, infinities, zeros of both signs and denormals where they fit (none of
    bfloat16 in Triton's interpreter, which flushes them)."""
    u = torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(dtype)
    denormal = 6e-8 if dtype == torch.float16 else torch.finfo(dtype).tiny / 2
    if dtype == torch.bfloat16 and backends.triton_interpreted():
        denormal = 1.0
    special = torch.tensor([*BAD, denormal, -denormal], dtype=dtype)
    if count > 2 * len(special):
        u[: len(special)] = special
        u[-len(special) :] = special
    return u


def truth(u: Tensor, grad: Tensor, guided: bool) -> tuple[Tensor, Tensor]:
    """The rule of the paper, element by element; NaN in u lets the gradient pass."""
    shut = u <= 0
    if guided:
        shut = shut | (grad <= 0)
    return torch.where(u <= 0, 0.0, u), torch.where(shut, 0.0, grad)


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one.cpu(), other.cpu(), rtol=0, atol=0, equal_nan=True)


def lay_out(u: Tensor, layout: str) -> Tensor:
    """(4, 6, 5, 7) values in other strides."""
    if layout == "channels_last":
        return u.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return u.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    if layout == "sliced":
        return u.repeat_interleave(2, 3)[..., ::2]
    if layout == "expanded":
        return u[:, :1].expand_as(u)
    if layout == "negated":
        return torch._neg_view(-u)
    if layout == "offset":
        return torch.cat((u.new_zeros(3), u.flatten()))[3:].view(u.shape)
    return u


@every_backend
@every_save
@pytest.mark.usefixtures("poisoned_allocations")
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 63, 64, 65, 200, 4099, 70001])
def test_values_and_both_backwards(backend: str, save: str, count: int) -> None:
    """One graph, used plain, guided and plain again, with signed cotangents that hold NaN too."""
    if backend == "triton" and count > 5000:
        count = 5001
    for dtype in dtypes_of(backend):
        u, grad = values(count, dtype), values(count, dtype, seed=1).flip(0)
        leaf = u.to(device_of(backend)).requires_grad_()
        with ck.backend(backend):  # type: ignore[arg-type]
            v = relu(leaf, save=save)
        for guided in (False, True, False):
            expected, expected_grad = truth(u, grad, guided)
            same(v.detach(), expected)
            if guided:
                with ck.guided():
                    (found,) = torch.autograd.grad(v, leaf, grad.to(v.device), retain_graph=True)
            else:
                (found,) = torch.autograd.grad(v, leaf, grad.to(v.device), retain_graph=True)
            same(found, expected_grad)


@every_backend
@hypothesis.example(count=0, offset=0, dtype=torch.float32, save="mask", guided=False, seed=0)
@hypothesis.example(count=2048, offset=0, dtype=torch.float16, save="output", guided=True, seed=0)
@hypothesis.example(count=2049, offset=1, dtype=torch.bfloat16, save="mask", guided=True, seed=0)
@hypothesis.given(
    count=st.integers(0, 300) | st.integers(2000, 5000),  # a block of CUDA's takes 2048
    offset=st.integers(0, 9),
    dtype=st.sampled_from(DTYPES),
    save=st.sampled_from(SAVES),
    guided=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_count_and_address(
    backend: str, count: int, offset: int, dtype: torch.dtype, save: str, guided: bool, seed: int
) -> None:
    hypothesis.assume(dtype in dtypes_of(backend))
    u = values(offset + count, dtype, seed)[offset:]
    grad = values(offset + count, dtype, seed + 1).flip(0)[offset:]
    leaf = u.to(device_of(backend)).requires_grad_()
    with ck.backend(backend):  # type: ignore[arg-type]
        v = relu(leaf, save=save)
    with ck.guided() if guided else nullcontext():
        (found,) = torch.autograd.grad(v, leaf, grad.to(v.device))
    expected, expected_grad = truth(u, grad, guided)
    same(v.detach(), expected)
    same(found, expected_grad)


@every_backend
@every_save
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", ["contiguous", "channels_last", "expanded", "negated"])
def test_strides(backend: str, save: str, layout: str, grad_layout: str) -> None:
    u = lay_out(values(840, torch.float32).view(4, 6, 5, 7), layout).to(device_of(backend))
    grad = lay_out(values(840, torch.float32, 1).view(4, 6, 5, 7), grad_layout).to(u.device)
    leaf = u.detach().requires_grad_()
    before = u.clone()
    with ck.backend(backend):  # type: ignore[arg-type]
        v = relu(leaf, save=save)
    assert v.stride() == torch.relu(leaf).stride()
    for guided in (False, True):
        expected, expected_grad = truth(before, grad, guided)
        same(v.detach(), expected)
        with ck.guided() if guided else torch.enable_grad():
            (found,) = torch.autograd.grad(v, leaf, grad, retain_graph=True)
        same(found, expected_grad)
    same(leaf.detach(), before)


@every_backend
@every_save
@pytest.mark.parametrize("layout", [n for n in LAYOUTS if n != "expanded"])
def test_in_place(backend: str, save: str, layout: str) -> None:
    u = values(840, torch.float32).view(4, 6, 5, 7).to(device_of(backend))
    grad = values(840, torch.float32, 1).view(4, 6, 5, 7).to(u.device)
    leaf = u.clone().requires_grad_()
    made = lay_out(leaf * 1, layout)
    version, address = made._version, made.data_ptr()
    with ck.backend(backend):  # type: ignore[arg-type]
        v = relu(made, inplace=True, save=save)
    assert v is made
    assert made.data_ptr() == address
    assert made._version > version
    for guided in (False, True):
        expected, expected_grad = truth(u, grad, guided)
        same(v.detach(), expected)
        with ck.guided() if guided else torch.enable_grad():
            (found,) = torch.autograd.grad(v, leaf, grad, retain_graph=True)
        # the negated view puts the guided rule's sign through a negation and back
        same(found, expected_grad)


def test_in_place_without_grad_counts_as_a_write() -> None:
    x = torch.randn(5)
    with torch.no_grad():
        assert relu(x, inplace=True) is x
    assert x._version == 1
    a = torch.randn(5, requires_grad=True)
    b = a.detach()
    c = a * 1
    kept = c.sin()
    with torch.no_grad():
        relu(c, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()
    assert b is not a


@pytest.mark.parametrize("function", [torch.relu_, lambda x: relu(x, inplace=True)])
def test_in_place_raises_where_pytorch_does(function: Any) -> None:
    leaf = torch.randn(4, 3, requires_grad=True)
    before = leaf.detach().clone()
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        function(leaf)
    with pytest.raises(RuntimeError, match="view of a leaf Variable"):
        function(leaf[0])
    assert torch.equal(leaf.detach(), before), "written before it was refused"
    with pytest.raises(RuntimeError, match="more than one element"):
        function(torch.randn(1, 3).expand(4, 3))
    with pytest.raises(RuntimeError, match="multiple views"):
        function((leaf * 1).unbind(0)[0])
    x = leaf * 1
    y = x.exp()  # keeps its output
    function(y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    z = leaf * 1
    w = z.square()  # keeps its input
    function(z)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        w.sum().backward()
    with torch.no_grad():
        function(leaf)  # legal


def test_in_place_on_a_view_reaches_the_base() -> None:
    for save in SAVES:
        results = []
        for function in (torch.relu_, lambda x, s=save: relu(x, inplace=True, save=s)):
            leaf = torch.linspace(-2, 3, 12).view(3, 4).requires_grad_()
            base = leaf * 1
            function(base[1:, ::2])
            (grad,) = torch.autograd.grad((base * torch.arange(12.0).view(3, 4)).sum(), leaf)
            results.append((base.detach(), grad))
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)


def test_the_mask_survives_a_later_write_and_the_output_notices_it() -> None:
    leaf = torch.randn(9, requires_grad=True)
    v = relu(leaf, save="mask")
    with torch.no_grad():
        v.add_(1)
    v.sum().backward()
    assert torch.equal(leaf.grad, (leaf > 0).float())  # type: ignore[arg-type]
    v = relu(leaf, save="output")
    with torch.no_grad():
        v.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        v.sum().backward()


@every_backend
@every_save
def test_gradcheck_and_gradgradcheck(backend: str, save: str) -> None:
    if not has_double(backend):
        pytest.skip("takes no float64")
    leaf = torch.randn(3, 5, dtype=torch.float64).sign() * (torch.rand(3, 5).double() + 0.5)
    leaf.requires_grad_()

    def function(x: Tensor) -> Tensor:
        with ck.backend(backend):  # type: ignore[arg-type]
            return relu(x, save=save).square()

    assert torch.autograd.gradcheck(function, leaf)
    assert torch.autograd.gradgradcheck(function, leaf)


@every_backend
@every_save
def test_derivatives_up_to_the_third_are_those_of_pytorch(backend: str, save: str) -> None:
    grad, second, third = (torch.randn(50, generator=torch.Generator().manual_seed(i))
                           for i in range(3))  # fmt: skip
    found: list[list[Tensor]] = []
    for ours in (True, False):
        leaf = values(50, torch.float32, 5).nan_to_num(1.0, 1.0, -1.0).to(device_of(backend))
        leaf.requires_grad_()
        g = grad.to(leaf.device).requires_grad_()
        with ck.backend(backend):  # type: ignore[arg-type]
            v = relu(leaf, save=save) if ours else torch.relu(leaf)
        (one,) = torch.autograd.grad(v, leaf, g, create_graph=True)
        h = second.to(leaf.device).requires_grad_()
        (two,) = torch.autograd.grad(one, g, h, create_graph=True)
        (three,) = torch.autograd.grad(two, h, third.to(leaf.device))
        found.append([one.detach(), two.detach(), three])
    for mine, theirs in zip(*found, strict=True):
        same(mine, theirs)


@every_backend
def test_bytes_saved_are_one_bit_per_element(backend: str) -> None:
    for count in (1, 8, 9, 64, 1000, 4099):
        for wanted in (True, False):
            x = torch.randn(count, device=device_of(backend)).requires_grad_(wanted)
            saved: list[Tensor] = []

            def pack(t: Tensor, saved: list[Tensor] = saved) -> Tensor:
                saved.append(t)
                return t

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                with ck.backend(backend):  # type: ignore[arg-type]
                    v = relu(x)
                assert sum(t.untyped_storage().nbytes() for t in saved) == (
                    -(-count // 8) if wanted else 0
                )
                saved.clear()
                with ck.backend(backend):  # type: ignore[arg-type]
                    v = relu(x, save="output")
                assert all(t.data_ptr() == v.data_ptr() for t in saved)
            assert len(saved) == int(wanted)


def test_thread_counts_give_equal_bits() -> None:
    u, grad = values(200003, torch.float32), values(200003, torch.float32, 1)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        leaf = u.clone().requires_grad_()
        v = relu(leaf)
        with ck.guided():
            results.append((v.detach(), torch.autograd.grad(v, leaf, grad)[0]))
    for v, g in results[1:]:
        same(v, results[0][0])
        same(g, results[0][1])


def test_large_outputs_pass_the_caches() -> None:
    """The streaming stores, from 32 MiB on, also where memory is not aligned to them."""
    base = torch.randn((1 << 23) + 77)
    for u in (base[64:], base[:-64]):
        leaf = u.detach().requires_grad_()
        v = relu(leaf)
        assert torch.equal(v, u.relu())
        (grad,) = torch.autograd.grad(v, leaf, u)
        assert torch.equal(grad, u.relu())


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="mask, output"):
        relu(torch.ones(2), save="bits")
    with pytest.raises(TypeError, match="expected float32"):
        relu(torch.ones(2, dtype=torch.int64))
    with pytest.raises(TypeError, match="expected a tensor"):
        relu(None)  # type: ignore[arg-type]


def test_dense_strides() -> None:
    x = torch.empty(2, 3, 4, 5)
    last = x.contiguous(memory_format=torch.channels_last)
    for dense in (x, x.permute(2, 0, 3, 1), x[:0], x[1:], last):
        assert op.is_dense(dense)
    for other in (x[..., ::2], x[:, 1:], x[:1].expand(2, -1, -1, -1)):
        assert not op.is_dense(other)
