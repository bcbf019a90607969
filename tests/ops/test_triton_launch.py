"""What is special to the Triton backend: how often it launches, how it splits, what it addresses.

Kernels run in the interpreter here (``TRITON_INTERPRET=1 pytest tests/ops``), or on a GPU.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import camkernels as ck
from camkernels import backends

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from camkernels.ops import _gpu
from camkernels.ops import _triton_launch as host
from camkernels.ops.cam import reference as cam_reference
from camkernels.ops.cam_statistics import reference as cam_statistics_reference

INTERPRETED = backends.triton_interpreted()
DEVICE = "cpu" if INTERPRETED else "cuda"
runs_kernels = pytest.mark.skipif(
    backends.unavailable_reason("triton") is not None,
    reason=f"backend triton: {backends.unavailable_reason('triton')}",
)
interpreted = pytest.mark.skipif(not INTERPRETED, reason="looks into Triton's interpreter")
CPU = torch.device("cpu")


def tensors(*shape: int, layout: str = "nchw") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    a, g = (torch.randn(shape, generator=generator) for _ in range(2))
    if layout == "channels_last":
        a = a.contiguous(memory_format=torch.channels_last)
    return a.to(DEVICE), g.to(DEVICE)


# ---- launches ----


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels launched, seen where Triton runs them and not in our wrapper."""
    from triton.runtime import interpreter, jit

    kind: Any
    kind, method = (
        (interpreter.GridExecutor, "__call__") if INTERPRETED else (jit.JITFunction, "run")
    )
    run, names = getattr(kind, method), []

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(kind, method, counted)
    return names


def calls() -> Iterator[tuple[str, Callable[[Tensor, Tensor], Sequence[Tensor]]]]:
    yield "cam", lambda a, g: (ck.grad_cam(a, g),)
    yield "cam", lambda a, g: (ck.class_activation_map(a, g[:, :, 0, 0], relu=False),)
    yield "map_statistics", lambda a, g: ck.map_statistics(a.sum(1), clamp=True)
    yield "cam_statistics", lambda a, g: ck.cam_statistics(a, g)
    yield "cam_statistics", lambda a, g: ck.cam_statistics(a, g)[:1]
    yield "cam_statistics", lambda a, g: ck.cam_statistics(a, weights=g[:, :, 0, 0])[1:3]


@runs_kernels
@pytest.mark.parametrize("batch", [1, 64])
def test_one_launch_forward_and_one_backward(batch: int, launches: list[str]) -> None:
    for op, call in calls():
        a, g = tensors(batch, 70, 3, 5)
        leaves = a.requires_grad_(), g.requires_grad_()
        launches.clear()
        with ck.backend("triton"):
            outputs = call(*leaves)
            assert launches == [f"{op}_fwd_kernel"]
            launches.clear()
            sum(o.sum() for o in outputs).backward()  # type: ignore[union-attr]
        assert launches == [f"{op}_bwd_kernel"]


@runs_kernels
def test_an_empty_batch_launches_nothing(launches: list[str]) -> None:
    a, g = tensors(0, 4, 3, 5)
    with ck.backend("triton"):
        assert ck.cam_statistics(a, g).entropy.shape == (0,)
        assert ck.map_statistics(a.sum(1)).covariance.shape == (0, 2, 2)
    assert launches == []


# ---- splits over the channels, loops over the pixels ----


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Tiles of 4 channels by 16 pixels, so that small inputs split and loop; the grids launched."""
    grids: list[tuple[int, ...]] = []
    launch = host.launch

    def recorded(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        if "BLOCK_K" in constants and "BLOCK_R" in constants:
            grids.append(grid)
            constants["BLOCK_R"], constants["BLOCK_S"] = 16, 4
        launch(kernel, grid, *args, **constants)

    monkeypatch.setattr(host, "launch", recorded)
    monkeypatch.setattr(host, "tile", lambda *args: host.Tile(4, 16))
    return grids


@runs_kernels
@pytest.mark.usefixtures("poisoned_allocations")
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("programs", [1, 3, 100])
@pytest.mark.parametrize("channels", [4, 23])
def test_split_forwards_and_pixel_loops(
    channels: int, programs: int, layout: str,
    small_tiles: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(host, "multiprocessors", lambda device: programs)
    monkeypatch.setattr(host, "PROGRAMS_PER_MULTIPROCESSOR", 1)
    a, g = tensors(2, channels, 7, 9, layout=layout)
    for seed in (g, g[:, :, 0, 0]):
        with ck.backend("triton"):
            leaves = [t.detach().requires_grad_() for t in (a, seed)]
            named = {"gradients": leaves[1]} if seed.dim() == 4 else {"weights": leaves[1]}
            statistics, maps = ck.cam_statistics(leaves[0], **named, return_maps=True)
            found = torch.autograd.grad(
                statistics.entropy.sum() + statistics.area.sum() + (maps * maps).sum(), leaves
            )
            plain = ck.grad_cam(a, g) if seed.dim() == 4 else ck.class_activation_map(a, seed)
        expected = cam_statistics_reference.cam_statistics_fwd(a.cpu(), seed.cpu(), True)
        torch.testing.assert_close(maps.detach().cpu(), expected[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(plain.cpu(), expected[0], rtol=1e-5, atol=1e-6)
        for value, truth in zip(statistics, expected[3:], strict=True):
            torch.testing.assert_close(value.detach().cpu(), truth, rtol=1e-5, atol=1e-5)
        with ck.backend("reference"):
            statistics, maps = ck.cam_statistics(leaves[0], **named, return_maps=True)
            truths = torch.autograd.grad(
                statistics.entropy.sum() + statistics.area.sum() + (maps * maps).sum(), leaves
            )
        for value, truth in zip(found, truths, strict=True):
            torch.testing.assert_close(value, truth, rtol=1e-4, atol=1e-5)
    blocks = -(-channels // 4)
    wanted = min(blocks, -(-programs // 2))
    splits = {grid[1] for grid in small_tiles}
    assert splits == {-(-blocks // -(-blocks // wanted))}
    assert all(not bool(counter.any()) for counter in _gpu._counters.values()), "left a count"


@interpreted
def test_the_bits_do_not_depend_on_which_program_comes_last(
    small_tiles: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime import interpreter

    a, g = tensors(1, 40, 5, 6)
    with ck.backend("triton"):
        first = ck.grad_cam(a, g)
        assert small_tiles[-1][1] > 2
        place = interpreter.interpreter_builder.set_grid_idx
        monkeypatch.setattr(
            interpreter.interpreter_builder,
            "set_grid_idx",
            lambda x, y, z: place(x, small_tiles[-1][1] - 1 - y, z),
        )
        assert torch.equal(ck.grad_cam(a, g), first)


# ---- addresses beyond 2^31 elements ----


@interpreted
@pytest.mark.parametrize("dimension", [0, 1, 2, 3, "pixels"])
def test_offsets_are_64_bit(dimension: int | str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strides that fit 32 bit with products that do not; the memory between is never touched."""
    from triton.runtime import interpreter

    # The interpreter works in place on CPU tensors, and then copies the storage onto itself.
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)
    strides = [27, 9, 3, 1]
    if isinstance(dimension, int):
        strides[dimension] = 2**30 + 16
    else:  # rows without a gap, so one stride for all pixels
        strides = [3, 1, 3 * (2**28 + 16), 2**28 + 16]
    storage = torch.empty(2 * sum(strides) + 1, dtype=torch.float16)
    far = storage.as_strided((3, 3, 3, 3), strides)
    values = torch.randn(3, 3, 3, 3).half()
    far.copy_(values)
    weights = torch.rand(3, 3) + 0.5
    with ck.backend("triton"):
        maps = ck.grad_cam(far, far, relu=False)
        leaf = weights.clone().requires_grad_()
        ck.class_activation_map(far, leaf, relu=False).sum().backward()
        means = ck.map_statistics(far[:, 0], clamp=True).mean
    expected, _ = cam_reference.cam_fwd(values, values, False)
    torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(leaf.grad, values.float().sum((2, 3)), rtol=1e-4, atol=1e-4)
    clamped = values[:, 0].float().relu().mean((1, 2))
    torch.testing.assert_close(means, clamped, rtol=1e-4, atol=1e-5)


def test_maps_beyond_32_bit_pixels_are_refused() -> None:
    huge = torch.empty(1).expand(1, 2**16, 2**16)
    with pytest.raises(ValueError, match=r"maps: .* 2\^31 - 1 pixels, got 4294967296"):
        host.check_pixels(huge, "maps")


# ---- choices of the host ----


def test_pixel_blocks_waste_little() -> None:
    assert [host.pixel_block(p, 512) for p in (1, 36, 49, 196, 784, 3136, 50176)] == [
        16, 64, 64, 256, 128, 512, 512,
    ]  # fmt: skip
    for pixels in range(1, 4000, 7):
        block = host.pixel_block(pixels, 512)
        assert block == host.power_of_two(block)
        assert -(-pixels // block) * block <= max(16, 2 * pixels, 1.15 * (pixels + 63))


@pytest.mark.parametrize("channels_last", [False, True])
def test_tiles_stay_within_their_size(channels_last: bool) -> None:
    for channels in (1, 3, 64, 100, 2048):
        for pixels in (1, 36, 49, 784, 50176):
            for wide in (True, False):
                blocks = host.tile(channels, pixels, channels_last, wide)
                largest = host.TILE if wide else host.TILE // 2
                assert math.prod(blocks) <= largest
                assert all(b == host.power_of_two(b) for b in blocks)
    longest = host.tile(2048, 784, channels_last, True)
    assert (longest.BLOCK_K > longest.BLOCK_P) == channels_last


def test_small_batches_are_split_and_large_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "multiprocessors", lambda device: 132)
    assert host.channel_chunk(1000, 512, 32, CPU) == 512
    for batch in (1, 3, 20, 64, 300):
        for channels in (1, 31, 512, 2048):
            chunk = host.channel_chunk(batch, channels, 32, CPU)
            splits = host.cdiv(channels, chunk)
            assert chunk % 32 == 0
            assert (splits - 1) * chunk < channels  # none is empty
            assert batch * (splits - 1) < 528
    assert host.cdiv(2048, host.channel_chunk(1, 2048, 32, CPU)) == 64


def test_strides_of_pixels() -> None:
    x = torch.empty(2, 3, 4, 5)
    assert host.pixel_strides(x) == (0, 1, True)
    assert host.pixel_strides(x.contiguous(memory_format=torch.channels_last)) == (0, 3, True)
    assert host.pixel_strides(x[..., ::2]) == (5, 2, False)
    assert host.pixel_strides(x.mT) == (1, 5, False)
    assert host.pixel_strides(x[..., :1]) == (0, 5, True)
    assert host.pixel_strides(x[..., :1, ::2]) == (0, 2, True)
    assert host.pixel_strides(x[..., :1, :1].expand(2, 3, 4, 5)) == (0, 0, True)


def test_alignment_divides_all() -> None:
    assert host.alignment(784, torch.empty(2, 8, 28, 28)) == 16
    assert host.alignment(196, torch.empty(2, 8, 14, 14), None) == 4
    assert host.alignment(49, torch.empty(2, 8, 7, 7)) == 1
    assert host.alignment(784, torch.empty(2, 8, 28, 29)[..., :28]) == 4
    assert host.alignment(16, torch.empty(1, 1, 1, 1).expand(2, 8, 4, 4)) == 16
