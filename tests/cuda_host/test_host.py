"""The host build itself: what it runs is right, and each kind of fault is found and named."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from camkernels import backends

pytestmark = pytest.mark.skipif(
    not backends.cuda_on_host(), reason="the CUDA kernels are not built for the host here"
)
THREADS = 256
ORDERS = (0, 1, 2, 3)


@pytest.fixture
def module() -> Any:
    from camkernels import _cuda  # type: ignore[attr-defined]

    yield _cuda
    _cuda.set_order(0)


def probe(module: Any, name: str) -> tuple[int, Tensor, Tensor]:
    values = torch.randn(THREADS)
    out = torch.full((4, THREADS), math.nan)
    return module.probe(name, values.data_ptr(), out.data_ptr()), values, out


@pytest.mark.parametrize("order", ORDERS)
def test_shared_memory_and_barriers(module: Any, order: int) -> None:
    module.set_order(order)
    status, values, out = probe(module, "mirror")
    assert status == 0
    assert torch.equal(out[0], values.flip(0))


@pytest.mark.parametrize("order", ORDERS)
def test_reductions_shuffles_and_ballots(module: Any, order: int) -> None:
    module.set_order(order)
    _, values, out = probe(module, "warps")
    assert len(out[0].unique()) == 1  # every thread has the same bits
    torch.testing.assert_close(out[0, 0], values.double().sum().float(), rtol=1e-5, atol=1e-5)
    assert bool((out[1] == values.max()).all())
    lanes = values.view(-1, 32)
    assert torch.equal(out[2].view(-1, 32), torch.cat((lanes[:, 1:], lanes[:, -1:]), 1))
    votes = ((lanes[:, :16] > 0) * 2 ** torch.arange(16)).sum(1)
    assert torch.equal(out[3].view(-1, 32), votes[:, None].expand(-1, 32).float())


@pytest.mark.parametrize("order", ORDERS)
def test_one_block_arrives_last(module: Any, order: int) -> None:
    module.set_order(order)
    _, _, out = probe(module, "arrivals")
    assert float(out[0, :3].sum()) == 1
    assert out[0, 3] == 0  # as it was


@pytest.mark.parametrize("order", ORDERS)
def test_what_a_block_wrote_is_fenced_on_both_sides_of_its_arrival(module: Any, order: int) -> None:
    module.set_order(order)
    status, _, out = probe(module, "arrival")
    assert status == 0
    assert bool((out[1] == 1).all())


@pytest.mark.parametrize("order", ORDERS)
def test_a_warp_operation_of_some_lanes(module: Any, order: int) -> None:
    module.set_order(order)
    _, _, out = probe(module, "shuffle of half a warp")
    expected = torch.arange(float(THREADS)).view(-1, 32)
    expected[:, :16] = expected[:, 3:4]
    assert torch.equal(out[0].view(-1, 32), expected)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mirror without barrier", "race on shared memory"),
        ("reuse without barrier", "race on shared memory"),
        ("half a barrier", r"threads wait for others.*thread 0 waits at the barrier.*has ended"),
        ("two barriers", r"threads wait for others.*barrier.*probe.cu.*barrier.*probe.cu"),
        ("half a warp", r"threads wait for others.*waits for its warp"),
        ("beyond", "outside of what the launch asked for"),
        ("below", "outside of what the launch asked for"),
        ("shuffle from outside", "reads a lane outside of its mask"),
        ("shuffle of others", "a warp operation whose mask lacks it"),
        ("part of a warp", "in whole warps"),
        ("too many threads", "up to 1024 threads"),
        ("arrival without fence", "arrives before all its threads have fenced"),
        ("arrival without barrier", "fenced and met at a barrier"),
        ("arrival without second fence", "read without a fence since the arrival"),
    ],
)
def test_faults_are_found(module: Any, name: str, message: str, order: int) -> None:
    module.set_order(order)
    with pytest.raises(RuntimeError, match=message):
        probe(module, name)
    module.set_order(0)
    assert probe(module, "mirror")[0] == 0  # nothing is left behind


def test_shared_memory_begins_as_nan(module: Any) -> None:
    _, _, out = probe(module, "unwritten")
    assert bool(out[0].isnan().all())


def test_too_much_shared_memory_is_a_launch_error(module: Any) -> None:
    status, _, _ = probe(module, "too much shared memory")
    assert module.error_name(status) == "cudaErrorInvalidValue"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conversions_round_as_torch(dtype: torch.dtype) -> None:
    """All 16-bit patterns, and what lies between neighbours: by a map whose map is its gradient."""
    import camkernels as ck

    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    exact = bits.view(dtype)
    finite = exact[exact.isfinite()].sort().values
    between = (finite[1:].float() + finite[:-1].float()) / 2
    tiny = torch.finfo(torch.float32).tiny
    alpha = torch.cat((exact.float(), between, between * (1 + 1e-3), torch.tensor([1e30, tiny, 0])))
    activations = torch.zeros(1, alpha.numel(), 1, 1, dtype=dtype, requires_grad=True)
    with ck.backend("cuda"):
        maps = ck.class_activation_map(activations, alpha[None])
        (found,) = torch.autograd.grad(maps, activations, torch.ones_like(maps))
    torch.testing.assert_close(found.flatten(), alpha.to(dtype), rtol=0, atol=0, equal_nan=True)
