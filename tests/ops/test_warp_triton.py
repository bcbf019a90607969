"""The Triton kernels of warp against the reference in float64, and what is special to those of ssim
and warped_ssim (see test_ssim_kernels.py)."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from ops.gpu_views import (
    C1,
    C2,
    DEVICE,
    INTERPRETED,
    ROUNDING,
    close,
    compare_warped,
    laid,
    poisoned,
    random,
    random_boxes,
    windows,
    with_bad_boxes,
)
from torch import Tensor

from camkernels import backends

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from camkernels.ops import _triton_launch as host
from camkernels.ops.ssim import triton as ssim
from camkernels.ops.warp import reference as warp_reference
from camkernels.ops.warp import triton as warp
from camkernels.ops.warped_ssim import triton as warped

pytestmark = pytest.mark.skipif(
    backends.unavailable_reason("triton") is not None,
    reason=f"backend triton: {backends.unavailable_reason('triton')}",
)
interpreted = pytest.mark.skipif(not INTERPRETED, reason="looks into Triton's interpreter")


def refuse_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(kernel: Any, *args: Any, **constants: Any) -> None:
        raise AssertionError("launched for an empty batch")

    monkeypatch.setattr(host, "launch", launch)


# Source, via, size: enlarged and made smaller by way of larger and smaller pictures, or of none;
# more than one block; odd sizes; one pixel.
WARPS = [
    ((7, 7), (20, 30), (18, 33)),
    ((5, 9), (5, 9), (13, 4)),
    ((4, 6), (224, 160), (5, 70)),
    ((33, 70), (11, 17), (10, 8)),
    ((1, 1), (1, 1), (1, 1)),
    ((1, 1), (8, 5), (3, 4)),
    ((3, 5), (1, 1), (2, 6)),
    ((40, 1), (3, 50), (1, 1)),
    ((60, 80), (60, 80), (4, 3)),
]


def compare_warp(
    source: Tensor, boxes: Tensor, flips: Tensor, via: Any, size: Any, grad: Tensor
) -> None:
    shape = (source.shape[2], source.shape[3])
    found = warp.warp_fwd(source, boxes, flips, via, size)
    assert found.dtype == source.dtype
    close(found, warp_reference.warp_fwd(source.double(), boxes, flips, via, size), "out")
    found = warp.warp_bwd(grad, boxes, flips, shape, via)
    assert found.dtype == grad.dtype
    close(found, warp_reference.warp_bwd(grad.double(), boxes, flips, shape, via), "cotangent")


@poisoned
@pytest.mark.parametrize(("shape", "via", "size"), WARPS)
def test_warp(shape: Any, via: Any, size: Any) -> None:
    boxes, flips = random_boxes(via, 4, sum(size))
    compare_warp(random(4, 1, *shape), boxes, flips, via, size, random(4, 1, *size, seed=1))


@poisoned
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "expanded", "sliced"])
def test_warp_strides_and_dtypes(layout: str, dtype: torch.dtype) -> None:
    for via, size in (((20, 30), (5, 4)), ((6, 7), (5, 12))):
        boxes, flips = random_boxes(via, 3, 5)
        boxes, flips = boxes.t().contiguous().t(), flips.repeat_interleave(2)[::2]
        source = laid(random(3, 2, 6, 7, dtype=dtype), layout)
        grad = laid(random(3, 2, *size, seed=1, dtype=dtype), layout)
        compare_warp(source, boxes, flips, via, size, grad)


@hypothesis.settings(max_examples=12, deadline=None)
@hypothesis.given(data=st.data())
def test_warp_of_any_sizes(data: Any) -> None:
    side = st.integers(1, 12)
    shape, size = data.draw(st.tuples(side, side)), data.draw(st.tuples(side, side))
    via = data.draw(st.one_of(st.just(shape), st.tuples(st.integers(1, 40), st.integers(1, 40))))
    batch, seed = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 2**31))
    boxes, flips = random_boxes(via, max(batch, 3), seed)
    boxes, flips = boxes[:batch], flips[:batch]
    if batch:
        axes = [data.draw(st.tuples(st.integers(1, v), st.integers(0, v))) for v in via]
        (h, top), (w, left) = ((n, min(at, v - n)) for (n, at), v in zip(axes, via, strict=True))
        boxes[0] = torch.tensor([top, left, h, w])
    source, grad = random(batch, 1, *shape, seed=seed), random(batch, 1, *size, seed=seed + 1)
    compare_warp(source, boxes, flips, via, size, grad)


def test_every_output_that_touches_a_pixel_is_found() -> None:
    """``touching`` against the matrix, for all pixels, boxes and sizes of a few pixels."""
    for source, via, size in ((3, 6, 5), (7, 3, 4), (4, 4, 9), (9, 2, 1), (5, 5, 3)):
        boxes = [
            [0, begin, 1, length] for length in range(1, via + 1)
            for begin in range(via - length + 1)
        ]  # fmt: skip
        count = len(boxes)
        flips = torch.arange(count, device=DEVICE) % 2 == 1
        grad = random(count, 1, 1, size)
        compare_warp(
            random(count, 1, 1, source, seed=2), torch.tensor(boxes, device=DEVICE), flips,
            (1, via), (1, size), grad,
        )  # fmt: skip
        turned = torch.tensor(boxes, device=DEVICE)[:, [1, 0, 3, 2]]
        compare_warp(
            random(count, 1, source, 1, seed=3), turned, flips, (via, 1), (size, 1), grad.mT
        )


@poisoned
def test_warp_of_bad_boxes() -> None:
    boxes, flips, good = with_bad_boxes()
    source, grad = random(len(boxes), 1, 4, 5), random(len(boxes), 1, 6, 3, seed=1)
    out = warp.warp_fwd(source, boxes, flips, (20, 30), (6, 3))
    back = warp.warp_bwd(grad, boxes, flips, (4, 5), (20, 30))
    for found in (out, back):
        assert [i for i, v in enumerate(found) if v.isfinite().all()] == good
        assert [i for i, v in enumerate(found) if not v.isnan().all()] == good
    compare_warp(source[good], boxes[good], flips[good], (20, 30), (6, 3), grad[good])


def test_warp_nan_stays_in_its_sample() -> None:
    boxes, flips = random_boxes((20, 30), 5, 4)
    source, grad = random(5, 2, 4, 5), random(5, 2, 6, 3, seed=1)
    source[0, 1, 2, 3] = grad[0, 1, 2, 2] = math.nan
    out = warp.warp_fwd(source, boxes, flips, (20, 30), (6, 3))
    back = warp.warp_bwd(grad, boxes, flips, (4, 5), (20, 30))
    for found in (out, back):
        assert bool(found[0, 1].isnan().any())
        assert bool(found[0, 0].isfinite().all())
        assert bool(found[1:].isfinite().all())


def test_warp_refuses_what_32_bit_do_not_number() -> None:
    boxes, flips = random_boxes((4, 4), 3, 4)
    with pytest.raises(ValueError, match=r"via, size: .* got 4 by way of 65536 to 32768"):
        warp.warp_fwd(random(3, 1, 4, 4), boxes, flips, (65536, 4), (32768, 4))
    with pytest.raises(ValueError, match="via, size"):
        warp.warp_bwd(random(3, 1, 4, 4), boxes, flips, (4, 2**27), (4, 8))


# ---- warped_ssim ----


@poisoned
@pytest.mark.parametrize("programs", [1, 4, 100])
def test_warped_ssim_over_few_and_many_programs(
    programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "multiprocessors", lambda device: programs)
    monkeypatch.setattr(host, "PROGRAMS_PER_MULTIPROCESSOR", 1)
    boxes, flips = random_boxes((30, 30), 2, 5)
    maps, others = random(2, 5, 5), random(2, 5, 5, seed=1)
    rows, columns = windows((50, 35), "gaussian", 11)
    compare_warped("triton", maps, others, boxes, flips, (30, 30), (50, 35), rows, columns, True)


def test_warped_ssim_refuses_large_maps() -> None:
    boxes, flips = random_boxes((20, 30), 3, 5)
    rows, columns = windows((12, 10), "gaussian", 5)
    options: Any = (boxes, flips, (20, 30), (12, 10), rows, columns, C1, C2, True)
    large, small = random(3, 65, 3), random(3, 4, 4)
    message = r"{}: the Triton kernels take maps up to 64 x 64, got 65 x 3; ck\.warp .* ck\.ssim"
    for name, pair in (("maps", (large, small)), ("others", (small, large))):
        with pytest.raises(ValueError, match=message.format(name)):
            warped.warped_ssim_fwd(*pair, *options)
        with pytest.raises(ValueError, match=message.format(name)):
            warped.warped_ssim_bwd(small[:, 0, 0], *pair, *options, True, True)


# ---- all three ----


def test_an_empty_batch_launches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_launches(monkeypatch)
    boxes, flips = random_boxes((20, 30), 0, 5)
    x, maps, grad = random(0, 2, 5, 6), random(0, 5, 6), random(0)
    weights: Any = (*windows((5, 6), "gaussian", 5), C1, C2, True)
    assert warp.warp_fwd(x, boxes, flips, (20, 30), (3, 4)).shape == (0, 2, 3, 4)
    assert warp.warp_bwd(x, boxes, flips, (3, 4), (20, 30)).shape == (0, 2, 3, 4)
    assert ssim.ssim_fwd(x, x, *weights).shape == (0,)
    assert [t.shape for t in ssim.ssim_bwd(grad, x, x, *weights, True, False)] == [x.shape, (0,)]
    options: Any = (boxes, flips, (20, 30), (5, 6), *weights)
    assert warped.warped_ssim_fwd(maps, maps, *options).shape == (0,)
    found = warped.warped_ssim_bwd(grad, maps, maps, *options, False, True)
    assert [t.shape for t in found] == [(0,), maps.shape]


@poisoned
def test_inputs_stay_as_they_were() -> None:
    boxes, flips = random_boxes((20, 30), 3, 5)
    x, y, maps, grad = random(3, 2, 5, 6), random(3, 2, 5, 6, seed=1), random(3, 5, 6), random(3)
    given = [boxes, flips, x, y, maps, grad]
    kept = [t.clone() for t in given]
    weights: Any = (*windows((5, 6), "gaussian", 5), C1, C2, True)
    calls: list[Callable[[], Any]] = [
        lambda: warp.warp_fwd(x, boxes, flips, (20, 30), (3, 4)),
        lambda: warp.warp_bwd(x, boxes, flips, (3, 4), (20, 30)),
        lambda: ssim.ssim_bwd(grad, x, y, *weights, True, True),
        lambda: warped.warped_ssim_bwd(
            grad, maps, maps, boxes, flips, (20, 30), (5, 6), *weights, True, True
        ),
    ]
    for call in calls:
        call()
    assert all(torch.equal(t, k) for t, k in zip(given, kept, strict=True))


@interpreted
@pytest.mark.parametrize("dimension", [0, 1, 2, 3])
def test_offsets_are_64_bit(dimension: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strides that fit 32 bit with products that do not; the memory between is never touched."""
    from triton.runtime import interpreter

    # The interpreter works in place on CPU tensors, and then copies the storage onto itself.
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)
    strides = [27, 9, 3, 1]
    strides[dimension] = 2**30 + 16
    storage = torch.empty(2 * sum(strides) + 1, dtype=torch.float16)
    far = storage.as_strided((3, 3, 3, 3), strides)
    near = random(3, 3, 3, 3, dtype=torch.float16)
    far.copy_(near)
    boxes, flips = random_boxes((7, 5), 3, 5)
    window: Any = ([0.25, 0.5, 0.25], [0.25, 0.5, 0.25], C1, C2, True)
    warped_options: Any = (boxes, flips, (7, 5), (6, 5), *window)

    def results(x: Tensor) -> list[Tensor]:
        grad = near[:, 0, 0, 0].float()
        # Two of the four dimensions at a time, each in its turn.
        maps = x[:, 0] if dimension != 1 else x[0]
        return [
            warp.warp_fwd(x, boxes, flips, (7, 5), (4, 4)),
            warp.warp_bwd(x, boxes, flips, (4, 5), (7, 5)),
            ssim.ssim_fwd(x, x * 2, *window),
            *ssim.ssim_bwd(grad, x, near, *window, True, True),
            *ssim.ssim_bwd(grad, near, x, *window, True, True),
            warped.warped_ssim_fwd(maps, maps, *warped_options),
            *warped.warped_ssim_bwd(grad, maps, maps, *warped_options, True, True),
        ]

    for found, expected in zip(results(far), results(near), strict=True):
        assert torch.equal(found, expected)
