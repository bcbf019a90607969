"""What is special to the CUDA kernels: layouts of every path, launches, errors.

Run on the host build (see build.py), and on a GPU where there is one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pytest
import torch
from cuda_host.cases import DEVICE, OPS, WAYS, both_ways, forward, kernel_of, leaves_of
from cuda_host.exercise import lay_out
from hypothesis import example, given
from hypothesis import strategies as st
from ops import oracle
from ops.base import OpTests, Request
from ops.test_cam_statistics import TestCamStatistics as CamStatisticsTests
from ops.test_map_statistics import TestMapStatistics as MapStatisticsTests
from torch import Tensor, nn

import camkernels as ck
from camkernels import backends, doctor
from camkernels.ops import _cuda_launch, _gpu
from camkernels.ops.relu import cuda as relu_cuda

reason = backends.unavailable_reason("cuda")
pytestmark = pytest.mark.skipif(reason is not None, reason=f"backend cuda: {reason}")
on_host = pytest.mark.skipif(
    not backends.cuda_on_host(), reason="the CUDA kernels are not built for the host here"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Test = TypeVar("Test", bound=Callable[..., None])


def module() -> Any:
    return _cuda_launch.module()


def values(shape: tuple[int, ...], dtype: torch.dtype, layout: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(shape, generator=generator).to(dtype).to(DEVICE)
    if layout == "offset":  # no vector can be read from it
        flat = torch.cat((made.new_zeros(1), made.flatten()))
        return flat[1:].view(shape)
    if layout == "expanded":
        return made[..., :1, :1].expand(shape)
    return lay_out(made, layout)


LAYOUTS = st.sampled_from(("nchw", "channels_last", "strided", "offset", "expanded"))
# No sample, one pixel, one channel, more channels than a block takes, more pixels than it has
# threads and than a tile has.
SIZES = ((0, 3, 4, 5), (2, 5, 1, 1), (2, 1, 6, 7), (1, 257, 3, 5), (2, 2, 60, 53))


def at_the_edges(ops: Sequence[str], **rest: Any) -> Callable[[Test], Test]:
    """Every op at each of SIZES, whatever Hypothesis draws."""

    def pinned(test: Test) -> Test:
        for op in ops:
            for batch, channels, height, width in SIZES:
                test = example(
                    op=op, batch=batch, channels=channels, height=height, width=width, seed=0,
                    dtypes=(torch.float32, torch.bfloat16), relu=True, **rest,
                )(test)  # fmt: skip
        return test

    return pinned


@at_the_edges(("grad_cam", "class_activation_map"), layouts=("nchw", "channels_last"))
@given(
    op=st.sampled_from(("grad_cam", "class_activation_map")),
    batch=st.integers(0, 3),
    channels=st.integers(1, 70) | st.sampled_from((256, 257, 530)),
    height=st.integers(1, 20) | st.just(60),
    width=st.integers(1, 20) | st.just(53),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    layouts=st.tuples(LAYOUTS, LAYOUTS),
    relu=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_every_path_through_the_layouts(
    op: str, batch: int, channels: int, height: int, width: int, dtypes: Any, layouts: Any,
    relu: bool, seed: int,
) -> None:  # fmt: skip
    """Maps and both cotangents are those of float64; sums of signed values, so errors are held
    against the sums of magnitudes."""
    shape = (batch, channels, height, width)
    a, g = (
        values(shape, dtype, layout, seed + i)
        for i, (dtype, layout) in enumerate(zip(dtypes, layouts, strict=True))
    )
    if op == "class_activation_map":
        g = g[..., 0, 0]
    cotangent = values((batch, 1, height, width), torch.float32, "nchw", seed + 2)[:, 0]

    def run(a: Tensor, g: Tensor, cotangent: Tensor, backend: str) -> list[Tensor]:
        leaves = a.detach().requires_grad_(), g.detach().requires_grad_()
        with ck.backend(backend):  # type: ignore[arg-type]
            maps = getattr(ck, op)(*leaves, relu=relu)
        grads = torch.autograd.grad(maps, leaves, cotangent.to(maps.dtype))
        return [maps.detach(), *grads]

    found = run(a, g, cotangent, "cuda")
    truth = run(a.double(), g.double(), cotangent, "reference")
    sizes = run(a.double().abs(), g.double().abs(), cotangent.abs(), "reference")
    # A pixel at the edge of the ReLU may be open on one side and shut on the other.
    edge = (truth[0] <= 1e-5 * sizes[0]) & (truth[0] >= 0) & relu
    edge &= (found[0] != 0) != (truth[0] != 0)
    rounding = [(0.0, 0.0)]
    for kind in map(torch.finfo, dtypes):
        rounding.append((kind.eps, kind.tiny * kind.eps))  # denormals are spaced evenly
    for i, (x, y, size) in enumerate(zip(found, truth, sizes, strict=True)):
        eps, least = rounding[i]
        if i == 2 and bool(edge.any()):
            continue  # of every pixel of the map something goes to G, or the weights
        error = (x.double() - y).abs()
        if i < 2:
            error = error.where(~edge[:, None] if i == 1 else ~edge, 0.0)
        assert bool((error <= (1e-5 + eps) * size + least + 1e-30).all())


STATISTICS: dict[str, OpTests] = {
    "cam_statistics": CamStatisticsTests(),
    "map_statistics": MapStatisticsTests(),
}


@at_the_edges(tuple(STATISTICS), layouts=("contiguous", "channels_last"))
@given(
    op=st.sampled_from(tuple(STATISTICS)),
    batch=st.integers(0, 3),
    channels=st.integers(1, 70) | st.just(257),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    layouts=st.tuples(st.sampled_from(oracle.LAYOUTS), st.sampled_from(oracle.LAYOUTS)),
    relu=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_statistics_over_every_path(
    op: str, batch: int, channels: int, height: int, width: int, dtypes: Any, layouts: Any,
    relu: bool, seed: int,
) -> None:  # fmt: skip
    """As good as eager PyTorch, see ops/oracle.py: statistics are no sums whose terms tell."""
    request = Request(
        batch, channels, height, width, "gradients", dtypes, layouts, relu, seed=seed
    )  # fmt: skip
    tests = STATISTICS[op]
    tests.check("cuda", tests.build(request))


# ---- launches -----------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("batch", "launches"), [(2, 1), (0, 0)])
def test_an_op_is_one_launch_each_way(op: str, batch: int, launches: int) -> None:
    leaves = leaves_of(op, batch)
    before = module().launches()
    value = forward(op, leaves)
    assert module().launches() == before + launches
    torch.autograd.grad(value.sum(), leaves)
    assert module().launches() == before + 2 * launches


def forward_and_backward(criterion: nn.Module, model: nn.Module, x: Tensor, y: Tensor) -> None:
    criterion(model(x), y).backward()


@pytest.mark.parametrize("head", ["closed_form", "autograd"])
@pytest.mark.parametrize("regularizer", ["entropy", "area", "dispersion"])
def test_a_cam_entropy_step_is_one_launch_each_way(regularizer: str, head: str) -> None:
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(8, 5)).to(DEVICE)
    x, y = torch.randn(4, 3, 9, 9, device=DEVICE), torch.tensor([0, 1, 2, 3], device=DEVICE)
    with ck.backend("cuda"):
        criterion = ck.CAMEntropyLoss(model, "1", beta=0.1, regularizer=regularizer, head=head)
        forward_and_backward(criterion, model, x, y)
        before = module().launches()
        loss = criterion(model(x), y)
        assert module().launches() == before + 1
        loss.backward()
        assert module().launches() == before + 2


def test_arrival_counters_are_left_at_zero() -> None:
    a = torch.rand(1, 600, 7, 7, device=DEVICE)
    with ck.backend("cuda"):
        ck.grad_cam(a, a)
        ck.cam_statistics(a, a)
    assert _cuda_launch.split(a.shape, a).block < 600  # several blocks met
    assert all(not bool(counter.any()) for counter in _gpu._counters.values())


def test_ops_without_cuda_kernels_say_so() -> None:
    maps = torch.rand(2, 7, 7, device=DEVICE)
    with (
        ck.backend("cuda"),
        pytest.raises(ck.BackendUnavailableError, match=r"no kernel lp_norm_fwd.*'triton'"),
    ):
        ck.lp_norm(maps)


def test_the_doctor_runs_them() -> None:
    assert doctor.check_backend("cuda") == (True, f"CUDA C++ for {module().archs}")


def test_float64_and_other_devices_are_refused() -> None:
    with ck.backend("cuda"), pytest.raises(ck.BackendUnavailableError, match="got float64"):
        ck.map_statistics(torch.rand(2, 3, 3, device=DEVICE, dtype=torch.float64))
    if DEVICE == "cuda":
        with ck.backend("cuda"), pytest.raises(ck.BackendUnavailableError, match="CUDA tensors"):
            ck.map_statistics(torch.rand(2, 3, 3))


# ---- what fails ---------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("op", OPS)
def test_a_failed_launch_names_the_error_the_op_and_all_shapes(
    op: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, leaves = kernel_of(op, way), leaves_of(op, 2)
    value = forward(op, leaves) if way == "bwd" else None
    monkeypatch.setattr(module(), kernel, lambda *arguments: 1)
    with pytest.raises(RuntimeError) as caught:
        forward(op, leaves) if value is None else torch.autograd.grad(value.sum(), leaves)
    message = str(caught.value)
    assert re.match(rf"camkernels::{kernel} on .*: cudaErrorInvalidValue \(", message)
    for leaf in leaves:
        assert f"{tuple(leaf.shape)} float32" in message
    # what stands beside the leaves, of shapes that none of them has
    cotangents = {"ssim": (2,), "warped_ssim": (2,), "grad_cam": (2, 3, 5)}
    if way == "bwd" and op in cotangents:
        assert f"{cotangents[op]} float32" in message
    assert op != "warped_ssim" or "(2, 4) int64, (2,) bool" in message


def test_every_kernel_has_a_failing_launch() -> None:
    kernels = {name for name in dir(module()) if name.endswith(WAYS)}
    assert kernels == {kernel_of(op, way) for op in OPS for way in WAYS}


def test_too_many_blocks_are_a_failed_launch() -> None:
    count = 2**43  # 2^32 blocks; all of it is one element, which is not touched
    expected = rf"relu_fwd on .* of \({count},\) float32: cudaErrorInvalidConfiguration"
    with pytest.raises(RuntimeError, match=expected):
        relu_cuda.relu_fwd(torch.zeros(1, device=DEVICE).expand(count), True, False)


@on_host
def test_too_much_shared_memory_is_a_failed_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1024)

    def asks_for_too_much(*arguments: Any) -> int:
        return int(module().probe("too much shared memory", x.data_ptr(), x.data_ptr()))

    monkeypatch.setattr(module(), "relu_fwd", asks_for_too_much)
    with pytest.raises(RuntimeError, match=r"relu_fwd on .* \(2, 3, 5\) .*cudaErrorInvalidValue"):
        forward("relu", leaves_of("relu", 2))


def fail_allocation(monkeypatch: pytest.MonkeyPatch, number: int) -> list[BaseException | None]:
    """Lets this allocation of those to come fail, and no other; one entry for each that was made,
    which is the error where there was one."""
    made: list[BaseException | None] = []

    def watched(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapper(*arguments: Any, **options: Any) -> Tensor:
            error = torch.OutOfMemoryError("no memory left") if len(made) == number else None
            made.append(error)
            if error is not None:
                raise error
            return allocate(*arguments, **options)

        return wrapper

    for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty"), (torch, "empty_like"),
                        (torch, "zeros")):  # fmt: skip
        monkeypatch.setattr(owner, name, watched(getattr(owner, name)))
    return made


@pytest.mark.parametrize("op", OPS)
def test_the_call_after_one_without_memory_is_as_if_nothing_had_been(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each allocation of the op and its backward in turn; that of the counters is one of them."""
    leaves = leaves_of(op, 2)
    with monkeypatch.context() as patch:
        patch.setattr(_gpu, "_counters", {})
        made = fail_allocation(patch, -1)
        expected = both_ways(op, leaves)
    count = len(made)
    assert count > 1  # of both ways
    for number in range(count):
        with monkeypatch.context() as patch:
            patch.setattr(_gpu, "_counters", {})
            made = fail_allocation(patch, number)
            with pytest.raises(torch.OutOfMemoryError) as caught:
                both_ways(op, leaves)
            assert caught.value is made[-1]
            assert len(made) == number + 1
            assert not any(bool(counter.any()) for counter in _gpu._counters.values())
            for found, value in zip(both_ways(op, leaves), expected, strict=True):
                assert torch.equal(found, value)
