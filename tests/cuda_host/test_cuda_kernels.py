"""What is special to the CUDA kernels: layouts of every path, orders of threads, barriers, errors.

Run on the host build (see build.py), and on a GPU where there is one.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_host import build
from cuda_host.exercise import exercise, lay_out
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import camkernels as ck
from camkernels import backends, doctor
from camkernels.ops import _cuda_launch, _gpu

reason = backends.unavailable_reason("cuda")
pytestmark = pytest.mark.skipif(reason is not None, reason=f"backend cuda: {reason}")
on_host = pytest.mark.skipif(
    not backends.cuda_on_host(), reason="the CUDA kernels are not built for the host here"
)
DEVICE = "cpu" if reason is not None or backends.cuda_on_host() else "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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


@given(
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
    batch: int, channels: int, height: int, width: int, dtypes: Any, layouts: Any, relu: bool,
    seed: int,
) -> None:  # fmt: skip
    """Maps and both cotangents are those of float64; sums of signed values, so errors are held
    against the sums of magnitudes."""
    shape = (batch, channels, height, width)
    a, g = (
        values(shape, dtype, layout, seed + i)
        for i, (dtype, layout) in enumerate(zip(dtypes, layouts, strict=True))
    )
    cotangent = values((batch, 1, height, width), torch.float32, "nchw", seed + 2)[:, 0]

    def run(a: Tensor, g: Tensor, cotangent: Tensor, backend: str) -> list[Tensor]:
        leaves = a.detach().requires_grad_(), g.detach().requires_grad_()
        with ck.backend(backend):  # type: ignore[arg-type]
            maps = ck.grad_cam(*leaves, relu=relu)
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
    for x, y, size, (eps, least) in zip(found, truth, sizes, rounding, strict=True):
        error = (x.double() - y).abs().where(~edge[:, None] if x.dim() == 4 else ~edge, 0.0)
        if x is found[2] and bool(edge.any()):
            continue  # of every pixel of the map something goes to G
        assert bool((error <= (1e-5 + eps) * size + least + 1e-30).all())


@on_host
def test_results_do_not_depend_on_the_order_of_threads_and_blocks() -> None:
    assert exercise(module()) == []


def forward_and_backward(criterion: nn.Module, model: nn.Module, x: Tensor, y: Tensor) -> None:
    criterion(model(x), y).backward()


def test_a_cam_entropy_step_is_one_launch_each_way() -> None:
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(8, 5)).to(DEVICE)
    x, y = torch.randn(4, 3, 9, 9, device=DEVICE), torch.tensor([0, 1, 2, 3], device=DEVICE)
    with ck.backend("cuda"):
        criterion = ck.CAMEntropyLoss(model, "1", beta=0.1)
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


def test_a_failed_launch_names_the_error_the_op_and_the_shape(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module(), "map_statistics_fwd", lambda *arguments: 1)
    with (
        ck.backend("cuda"),
        pytest.raises(RuntimeError, match=r"map_statistics_fwd.*\(2, 3, 5\) float32: cudaErrorInv"),
    ):
        ck.map_statistics(torch.rand(2, 3, 5, device=DEVICE))


# ---- every barrier is needed, and is missed where it is removed ---------------------------------

BARRIER = "__syncthreads();"
# Not seen where blocks run one after another: in arrives_last, what a block wrote comes before
# its arrival.
UNSEEN = {("common/block.cuh", 3)}


def barriers() -> list[tuple[str, int]]:
    """File and number of each barrier in the kernels."""
    found = []
    for path in sorted(build.CSRC.glob("*/*.cu*")):
        count = path.read_text(encoding="utf-8").count(BARRIER)
        found += [(path.relative_to(build.CSRC).as_posix(), i) for i in range(count)]
    return [barrier for barrier in found if barrier not in UNSEEN]


def without(text: str, index: int) -> str:
    spots = [m.start() for m in re.finditer(re.escape(BARRIER), text)]
    return text[: spots[index]] + ";" + text[spots[index] + len(BARRIER) :]


def seen_to_fail(folder: Path, file: str, index: int) -> str:
    """What the kernels' exercise says of a copy without one barrier."""
    copy = folder / "csrc"
    shutil.copytree(build.CSRC, copy)
    path = copy / file
    path.write_text(without(path.read_text(encoding="utf-8"), index), encoding="utf-8")
    built = build.build(folder / "build", copy)
    run = subprocess.run(
        [sys.executable, str(build.HERE / "exercise.py"), str(built)],
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert run.returncode in (0, 1), run.stderr[-2000:]
    return run.stdout


@on_host
def test_a_removed_barrier_is_caught(tmp_path: Path) -> None:
    """One in CI; all of them in the slow test below."""
    file = "cam/channels.cuh"
    assert "race on shared memory" in seen_to_fail(tmp_path, file, 2)


@on_host
@pytest.mark.slow
@pytest.mark.parametrize(("file", "index"), barriers())
def test_every_removed_barrier_is_caught(tmp_path: Path, file: str, index: int) -> None:
    found = seen_to_fail(tmp_path, file, index)
    assert "race on shared memory" in found or "result" in found, "not needed, or not watched"
