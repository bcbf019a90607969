"""What is special to the Triton kernels of batch_norm_relu and relu: splits, ragged tiles, 64-bit
offsets, bits that do not depend on the order of programs.

Values over all options are tested with the other backends; here a few cases of every path that
only these kernels have, against the reference in float64. Run in the interpreter
(``TRITON_INTERPRET=1 pytest tests/ops``), or on a GPU.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from camkernels import backends

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from camkernels.ops import _gpu
from camkernels.ops import _triton_batch_norm as batch_norm_host
from camkernels.ops import _triton_launch as host
from camkernels.ops.batch_norm_relu import reference
from camkernels.ops.batch_norm_relu import triton as kernels
from camkernels.ops.relu import reference as relu_reference
from camkernels.ops.relu import triton as relu_kernels

INTERPRETED = backends.triton_interpreted()
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(
    backends.unavailable_reason("triton") is not None,
    reason=f"backend triton: {backends.unavailable_reason('triton')}",
)
interpreted = pytest.mark.skipif(not INTERPRETED, reason="looks into Triton's interpreter")
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# Whole tiles, ragged ones, a plane of no whole bytes, one pixel, one channel, one value a channel.
SHAPES = [(2, 8, 4, 4), (3, 5, 3, 7), (5, 3, 1, 1), (2, 1, 9, 9), (1, 4, 1, 1)]


class Inputs:
    """Random arguments of every kernel; ``wide`` are the same in float64."""

    def __init__(self, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(sum(shape))

        def full(shift: float = 0.0) -> Tensor:
            values = (torch.randn(shape, generator=generator) + shift).to(dtype)
            return values.contiguous(memory_format=LAYOUTS[layout]).to(DEVICE)

        def channelwise(*lead: int) -> Tensor:
            return torch.randn((*lead, shape[1]), generator=generator).to(DEVICE)

        self.z, self.grad, self.residual = full(0.5), full(), full()
        self.h, self.h_residual, self.grad_prime = full(), full(), full()
        self.mean, self.rstd = channelwise(), channelwise().abs() + 0.5
        self.gamma, self.beta = channelwise(), channelwise()
        self.c_gamma, self.c_beta = channelwise(), channelwise()
        self.sums, self.grad_sums = channelwise(2), channelwise(3)
        self.z[0, 0, 0, 0] = math.nan

    @property
    def wide(self) -> Inputs:
        other = object.__new__(Inputs)
        vars(other).update({name: value.cpu().double() for name, value in vars(self).items()})
        return other

    @property
    def affine(self) -> tuple[Tensor, ...]:
        return self.mean, self.rstd, self.gamma, self.beta


def all_results(room: Any, x: Inputs, masked: bool) -> dict[str, Tensor]:
    """Every kernel of a room; ``masked``: with residual, mask and all that is optional."""
    residual = x.residual if masked else None
    out, mask = room.bn_fwd(x.z, *x.affine, residual, True, masked)
    kept = mask if masked else None
    first, second = (x.c_gamma, x.c_beta) if masked else (None, None)
    to_z, to_residual = room.bn_bwd(
        x.grad, x.z, *x.affine, kept, x.sums, 0.01, True, masked, masked,
        x.h if masked else None, masked,
    )  # fmt: skip
    to_grad, to_z_again = room.bn_bwd_bwd(
        x.h.clone(), x.h_residual if masked else None, x.grad_prime, x.z, *x.affine, kept,
        x.sums, x.grad_sums, 0.01, first, second, True, masked,
    )  # fmt: skip
    mean, squares = room.bn_stats(x.grad)
    return {
        "a": out, "mask": mask, "cotangent of z": to_z, "of the residual": to_residual,
        "of g": to_grad, "of z, again": to_z_again, "mean": mean, "squares": squares,
        "sums": room.bn_bwd_reduce(x.grad, x.z, *x.affine, kept, True, masked),
        "sums again": room.bn_bwd_bwd_reduce(x.h, x.grad_prime, x.z, x.mean, x.rstd),
    }  # fmt: skip


def compare(found: dict[str, Tensor], truth: dict[str, Tensor], dtype: torch.dtype) -> None:
    for name, value in found.items():
        if name == "mask":
            assert torch.equal(value.cpu(), truth[name]), name
            continue
        per_channel = value.dim() < 4
        rtol = TOLERANCE[torch.float32 if per_channel else dtype]
        torch.testing.assert_close(
            value.cpu().double(), truth[name], rtol=rtol, atol=rtol, equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


# ---- values ----


@pytest.mark.usefixtures("poisoned_allocations")
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values(shape: tuple[int, ...], layout: str, masked: bool) -> None:
    dtype = list(TOLERANCE)[sum(shape) % 3]
    x = Inputs(shape, layout, dtype)
    found = all_results(kernels, x, masked)
    compare(found, all_results(reference, x.wide, masked), dtype)
    for name in ("a", "cotangent of z", "of g", "of z, again"):
        assert found[name].stride() == x.z.stride()
        assert found[name].dtype == dtype


@pytest.mark.usefixtures("poisoned_allocations")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loops_and_splits(layout: str, dtype: torch.dtype, small: list[Any]) -> None:
    """Tiles of 64 elements: several in every direction, several for every program."""
    x = Inputs((7, 3 if layout == "nchw" else 20, 5, 6), layout, dtype)
    found = all_results(kernels, x, True)
    compare(found, all_results(reference, x.wide, True), dtype)
    sums = [c for c in small if "SPLIT" in c[1]]
    assert all(c["SPLIT"] for _, c in sums)
    assert all(grid[1] > 1 for grid, _ in sums)
    assert all(not bool(counter.any()) for counter in _gpu._counters.values()), "left a count"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Small tiles, several splits a channel; the grids and constants launched."""
    launched: list[Any] = []
    launch = host.launch

    def recorded(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        launched.append((grid, constants))
        launch(kernel, grid, *args, **constants)

    monkeypatch.setattr(host, "launch", recorded)
    monkeypatch.setattr(host, "pixel_block", lambda length, largest: 16)
    monkeypatch.setattr(batch_norm_host, "SUMS_TILE", 64)
    monkeypatch.setattr(host, "multiprocessors", lambda device: 5)
    return launched


def test_evaluation_mode_and_no_affine() -> None:
    x = Inputs((2, 3, 4, 5), "channels_last", torch.float32)
    arguments = (None, None, None)
    for room, values in ((kernels, x), (reference, x.wide)):
        got = room.bn_bwd(
            values.grad, values.z, values.mean, values.rstd, *arguments, values.sums, 0.0,
            False, True, True, None, False,
        )  # fmt: skip
        if room is kernels:
            found = got[0].cpu().double()
    torch.testing.assert_close(found, got[0], rtol=1e-5, atol=1e-5, equal_nan=True)


def test_an_empty_batch() -> None:
    z = torch.empty(0, 3, 2, 2, device=DEVICE)
    mean, squares = kernels.bn_stats(z)
    assert not bool(mean.any())
    assert not bool(squares.any())
    vector = torch.ones(3, device=DEVICE)
    out, mask = kernels.bn_fwd(z, vector, vector, None, None, z, True, True)
    assert out.shape == z.shape
    assert mask.shape == (0, 1)
    assert not bool(kernels.bn_bwd_reduce(z, z, vector, vector, None, None, None, True, True).any())


# ---- statistics ----


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_large_mean_does_not_cancel(
    layout: str, small: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with an outlier first, which a shift by the first value alone would not survive."""
    monkeypatch.setattr(batch_norm_host, "SUMS_TILE", 1024)
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(40, 2, 5, 6, generator=generator)
    z[:, 0] += 1e5
    z[0, 1, 0, 0] = 1e4
    z = z.contiguous(memory_format=LAYOUTS[layout]).to(DEVICE)
    mean, squares = kernels.bn_stats(z)
    true_mean, true_squares = reference.bn_stats(z.cpu().double())
    size = z.cpu().double().square().mean((0, 2, 3)).sqrt()
    assert bool(((mean.cpu() - true_mean).abs() <= 3e-6 * size).all())
    torch.testing.assert_close(squares.cpu().double(), true_squares, rtol=1e-5, atol=0)
    assert all(constants["SPLIT"] for _, constants in small)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_values_stay_in_their_channel(bad: float) -> None:
    z = torch.randn(2, 3, 4, 4)
    z[0, 1, 0, 0] = bad
    mean, squares = kernels.bn_stats(z.to(DEVICE))
    assert mean.isfinite().tolist() == [True, False, True]
    assert squares.isfinite().tolist() == [True, False, True]


# ---- how they are launched ----


@interpreted
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_bits_do_not_depend_on_which_program_comes_last(
    layout: str, small: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime import interpreter

    x = Inputs((9, 2, 5, 6), layout, torch.float32)

    def sums() -> list[Tensor]:
        again = kernels.bn_bwd_bwd_reduce(x.h, x.grad_prime, x.grad, x.mean, x.rstd)
        return [*kernels.bn_stats(x.grad), again]

    first = sums()
    place = interpreter.interpreter_builder.set_grid_idx
    monkeypatch.setattr(
        interpreter.interpreter_builder,
        "set_grid_idx",
        lambda a, b, c: place(a, small[-1][0][1] - 1 - b, c),
    )
    for value, again in zip(first, sums(), strict=True):
        assert torch.equal(value, again)
    assert small[-1][0][1] > 2


@pytest.mark.parametrize("channels", [1, 3, 64, 100, 512, 2048])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_programs_fill_a_gpu(channels: int, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough of them, none without work, tiles of a bounded size; nothing is run."""
    launched: list[Any] = []
    monkeypatch.setattr(host, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(
        host, "launch", lambda kernel, grid, like, *args, **c: launched.append((grid, args, c))
    )
    z = torch.empty((16, channels, 56, 56), dtype=torch.bfloat16, device="cpu").contiguous(
        memory_format=LAYOUTS[layout]
    )
    vector = torch.empty(channels)
    kernels.bn_stats(z)
    kernels.bn_fwd(z, vector, vector, None, None, None, True, False)
    (sums_grid, sums_args, sums), (grid, _, constants) = launched
    assert sums["BLOCK_R"] * sums["BLOCK_L"] <= batch_norm_host.SUMS_TILE
    assert constants["BLOCK_R"] * constants["BLOCK_L"] <= host.TILE
    tiles, chunk = sums_args[-2:]
    assert (sums_grid[1] - 1) * chunk < tiles <= sums_grid[1] * chunk
    assert math.prod(grid) >= min(4 * 132, z.numel() // 1024)
    work = sums_grid[0] * tiles
    assert math.prod(sums_grid) >= min(132, work)
    assert sums_grid[1] <= 2 * 132


# ---- relu ----


@pytest.mark.usefixtures("poisoned_allocations")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("number", [1, 7, 8, 1023, 5000])
def test_relu(number: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(number)
    u, grad = (torch.randn(number, generator=generator).to(dtype).to(DEVICE) for _ in range(2))
    u[number // 2] = math.nan
    u[number // 3] = 0
    expected, expected_mask = relu_reference.relu_fwd(u.cpu(), False, True)
    plain, nothing = relu_kernels.relu_fwd(u, False, False)
    own = u.clone()
    v, mask = relu_kernels.relu_fwd(own, True, True)
    assert v is own
    assert nothing.numel() == 0
    assert torch.equal(mask.cpu(), expected_mask)
    for value in (plain, v):
        torch.testing.assert_close(value.cpu(), expected, rtol=0, atol=0, equal_nan=True)
    for guided in (False, True):
        truth = relu_reference.relu_bwd(grad.cpu(), expected, guided)
        for kept in (v, mask):
            assert torch.equal(relu_kernels.relu_bwd(grad, kept, guided).cpu(), truth)


def test_relu_walks_memory() -> None:
    u = torch.randn(2, 3, 4, 5, device=DEVICE).permute(3, 0, 2, 1)
    v, mask = relu_kernels.relu_fwd(u, False, True)
    assert v.stride() == u.stride()
    assert torch.equal(v, u.relu())
    grad = torch.randn(2, 3, 4, 5, device=DEVICE).permute(3, 0, 2, 1)
    found = relu_kernels.relu_bwd(grad, mask, True)
    assert found.stride() == u.stride()
    assert torch.equal(found, torch.where(u > 0, grad.clamp(min=0), 0.0))


# ---- addresses beyond 2^31 elements ----


@interpreted
def test_offsets_are_64_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last tile of 2^32 elements alone is run; memory that is not touched costs nothing."""
    from triton.runtime import interpreter

    # The interpreter works in place on CPU tensors, and then copies the storage onto itself.
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)
    monkeypatch.setattr(host, "pixel_block", lambda length, largest: 16)
    launch = host.launch

    def last_alone(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        place = interpreter.interpreter_builder.set_grid_idx
        last = [size - 1 for size in (*grid, 1)[:2]]
        with monkeypatch.context() as patch:
            patch.setattr(
                interpreter.interpreter_builder, "set_grid_idx", lambda *_: place(*last, 0)
            )
            patch.setattr(interpreter.interpreter_builder, "set_grid_dim", lambda *_: None)
            interpreter.interpreter_builder.grid_dim = (*grid, 1, 1)[:3]
            launch(kernel, (1,), *args, **constants)

    monkeypatch.setattr(host, "launch", last_alone)
    shape = (2**14 + 1, 16, 2**7, 2**7)
    z = torch.empty(shape, dtype=torch.float16)
    z[-1] = torch.randn(shape[1:]).half()
    v, mask = relu_kernels.relu_fwd(z, False, True)
    assert torch.equal(v.view(-1)[-16:], z.view(-1)[-16:].relu())
    bits = relu_reference.relu_fwd(z.view(-1)[-16:].clone(), False, True)[1]
    assert torch.equal(mask[-2:], bits)
    vector = torch.ones(shape[1])
    out, mask = kernels.bn_fwd(z, vector, vector, None, None, None, True, True)
    tail = z[-1:]
    expected, expected_mask = reference.bn_fwd(tail, vector, vector, None, None, None, True, True)
    assert torch.equal(out.view(-1)[-16:], expected.view(-1)[-16:])
    assert torch.equal(mask[-1, -2:], expected_mask[-1, -2:])
