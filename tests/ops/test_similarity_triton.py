"""The Triton kernels of warp, ssim and warped_ssim against the reference in float64.

Run in the interpreter (``TRITON_INTERPRET=1 pytest tests/ops``), or on a GPU.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from camkernels import backends

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from camkernels.ops import _triton_launch as host
from camkernels.ops.ssim import reference as ssim_reference
from camkernels.ops.ssim import triton as ssim
from camkernels.ops.warp import reference as warp_reference
from camkernels.ops.warp import triton as warp
from camkernels.ops.warped_ssim import reference as warped_reference
from camkernels.ops.warped_ssim import triton as warped

INTERPRETED = backends.triton_interpreted()
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(
    backends.unavailable_reason("triton") is not None,
    reason=f"backend triton: {backends.unavailable_reason('triton')}",
)
interpreted = pytest.mark.skipif(not INTERPRETED, reason="looks into Triton's interpreter")
poisoned = pytest.mark.usefixtures("poisoned_allocations")
SLOW = pytest.mark.slow
# Of a value, in its dtype (the interpreter truncates bfloat16), besides what sums are off by.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
OF_THE_LARGEST = 4e-6
# Mixed dtypes are slow ones: a call takes seconds in the interpreter.
DTYPE_PAIRS = [
    pytest.param((d, e), marks=[] if d == e else SLOW, id=f"{d}-{e}")
    for d in ROUNDING
    for e in ROUNDING
]
BAD_BOXES = [
    (-1, 0, 2, 2), (0, -1, 2, 2), (0, 0, 0, 2), (0, 0, 2, 0), (0, 0, -3, 2), (19, 0, 2, 2),
    (0, 29, 2, 2), (0, 0, 21, 2), (0, 0, 2, 31), (2**40, 0, 2, 2), (0, 2**32, 2, 2),
    (1, 1, 2**63 - 1, 2), (0, 1, 2, 2**63 - 1), (-(2**63), 0, 2, 2),
]  # fmt: skip


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def laid(tensor: Tensor, layout: str) -> Tensor:
    """The same values (``expanded``: of the first sample and column) with other strides."""
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return tensor.mT.contiguous().mT
    if layout == "expanded":
        return tensor[:1, ..., :1].expand_as(tensor)
    if layout == "sliced":  # what lies between is NaN, and must not be read
        wide = tensor.new_full(
            (*tensor.shape[:-2], *(2 * s + 1 for s in tensor.shape[-2:])), math.nan
        )
        wide[..., 1::2, 1::2] = tensor
        return wide[..., 1::2, 1::2]
    return tensor


def close(found: Tensor, truth: Tensor, name: str = "", eager: Tensor | None = None) -> None:
    """Within the rounding of the dtype and a few units of the sample's largest value (of 1 for
    values of SSIM), and twice what the formula is off by in float32: variances cancel."""
    assert found.shape == truth.shape, name
    assert found.is_contiguous(), name
    if not truth.numel():
        return
    found, rounding, truth = found.cpu().double(), ROUNDING[found.dtype], truth.cpu()
    dims = tuple(range(1, truth.dim()))
    largest = truth.abs().nan_to_num().amax(dims, keepdim=True) if dims else 1.0
    allowed = OF_THE_LARGEST * largest + rounding * truth.abs() + (rounding > 0) * 1e-7
    if eager is not None:
        off = (eager.cpu().double() - truth).abs().nan_to_num()
        allowed = allowed + 2 * (off.amax(dims, keepdim=True) if dims else off)
    wrong = (found - truth).abs() > allowed
    wrong |= found.isnan() != truth.isnan()
    excess = ((found - truth).abs() / largest).nan_to_num().max()
    assert not bool(wrong.any()), f"{name}: {int(wrong.sum())} wrong, by {float(excess):.2e}"


def random_boxes(via: Sequence[int], batch: int, seed: int) -> tuple[Tensor, Tensor]:
    """The whole, a pixel in the last corner, a pixel in the first, then any that fit; and flips."""
    generator = torch.Generator().manual_seed(seed)

    def up_to(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    boxes = [[0, 0, *via], [via[0] - 1, via[1] - 1, 1, 1], [0, 0, 1, 1]]
    while len(boxes) < batch:
        height, width = (1 + up_to(v) for v in via)
        boxes.append([up_to(via[0] - height + 1), up_to(via[1] - width + 1), height, width])
    flips = torch.rand(batch, generator=generator) < 0.5
    chosen = torch.tensor(boxes[-batch:] if batch else []).view(batch, 4)
    return chosen.to(DEVICE), flips.to(DEVICE)


def refuse_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(kernel: Any, *args: Any, **constants: Any) -> None:
        raise AssertionError("launched for an empty batch")

    monkeypatch.setattr(host, "launch", launch)


# ---- warp ----

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


def with_bad_boxes() -> tuple[Tensor, Tensor, list[int]]:
    """Bad boxes between good ones, and the numbers of the good ones."""
    good = list(range(0, 3 * len(BAD_BOXES) // 2, 3))
    boxes, flips = random_boxes((20, 30), 3 * len(BAD_BOXES) // 2, 4)
    bad = [i for i in range(len(boxes)) if i not in good]
    boxes[bad] = torch.tensor(BAD_BOXES, device=DEVICE)
    return boxes, flips, good


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


# ---- ssim ----

C1, C2 = 1e-2, 9e-2


def windows(size: Sequence[int], kind: str, length: int) -> tuple[list[float], list[float]]:
    """``lopsided`` is no window of SSIM: it shows a filter that runs backwards."""
    if kind == "lopsided":
        both = [[1.0 + i for i in range(min(length, side))] for side in size]
        rows, columns = ([w / sum(weights) for w in weights] for weights in both)
        return rows, columns
    rows, columns = (ssim_reference.window(kind, length, 1.5, side) for side in size)
    return rows, columns


def compare_ssim(
    x: Tensor, y: Tensor, rows: Any, columns: Any, same: bool,
    want: tuple[bool, bool] = (True, True), grad: Tensor | None = None,
) -> None:  # fmt: skip
    options = (rows, columns, C1, C2, same)
    grad = random(len(x), seed=7) if grad is None else grad
    found = ssim.ssim_fwd(x, y, *options)
    assert found.dtype == torch.float32
    wide, narrow = ((x.to(d), y.to(d), *options) for d in (torch.float64, torch.float32))
    eager = ssim_reference.ssim_fwd(*narrow)
    close(found, ssim_reference.ssim_fwd(*wide), "values", eager)
    found_both = ssim.ssim_bwd(grad, x, y, *options, *want)
    truths = ssim_reference.ssim_bwd(grad.double(), *wide, *want)
    eagers = ssim_reference.ssim_bwd(grad, *narrow, *want)
    assert [t.dtype for t in found_both] == [x.dtype, y.dtype]
    for name, found, truth, eager in zip("xy", found_both, truths, eagers, strict=True):
        close(found, truth, f"cotangent of {name}", eager)


SSIMS = [
    ((40, 21), "gaussian", 11),
    ((19, 34), "lopsided", 11),
    ((17, 17), "uniform", 7),
    ((5, 12), "gaussian", 11),  # a window of 5 by 11
    ((1, 1), "gaussian", 11),
    ((2, 40), "uniform", 3),
    ((35, 38), "lopsided", 17),
]


@poisoned
@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize(("size", "kind", "length"), SSIMS)
def test_ssim(size: Any, kind: str, length: int, same: bool) -> None:
    x, y = random(2, 2, *size), random(2, 2, *size, seed=1)
    compare_ssim(x, x + 0.5 * y, *windows(size, kind, length), same)


@poisoned
@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("length", [19, pytest.param(33, marks=SLOW), pytest.param(49, marks=SLOW)])
def test_ssim_of_long_windows(length: int, same: bool) -> None:
    x, y = random(1, 1, 67, 50), random(1, 1, 67, 50, seed=1)
    compare_ssim(x, x + y, *windows((67, 50), "lopsided", length), same)


@poisoned
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS)
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "expanded", "sliced"])
def test_ssim_strides_dtypes_and_wants(layout: str, dtypes: Any) -> None:
    x = laid(random(2, 3, 13, 19, dtype=dtypes[0]), layout)
    y = random(2, 3, 13, 19, seed=1, dtype=dtypes[1])
    index = list(ROUNDING).index(dtypes[0])
    want = ((True, True), (True, False), (False, True))[index]
    grad = torch.tensor([-0.7], device=DEVICE).expand(2)
    rows, columns = windows((13, 19), "gaussian", 5)
    compare_ssim(x, y, rows, columns, index == 0, want, grad)
    compare_ssim(y, x, rows, columns, index != 0, want[::-1], grad)


@hypothesis.settings(max_examples=12, deadline=None)
@hypothesis.given(
    batch=st.integers(1, 2), channels=st.integers(1, 2), height=st.integers(1, 20),
    width=st.integers(1, 20), kind=st.sampled_from(["gaussian", "uniform", "lopsided"]),
    length=st.sampled_from([1, 3, 7, 11]), same=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_ssim_of_any_sizes(
    batch: int, channels: int, height: int, width: int, kind: str, length: int, same: bool,
    seed: int,
) -> None:  # fmt: skip
    shape = (batch, channels, height, width)
    rows, columns = windows((height, width), kind, length)
    if same:  # of odd size, or there are more windows than pixels
        rows, columns = windows((height, width), "uniform" if kind == "lopsided" else kind, length)
    x, y = random(*shape, seed=seed), random(*shape, seed=seed + 1)
    compare_ssim(x, y, rows, columns, same)


def test_ssim_nan_stays_in_its_sample() -> None:
    x, y = random(3, 2, 20, 20), random(3, 2, 20, 20, seed=1)
    options: Any = (*windows((20, 20), "gaussian", 5), C1, C2, True)
    clean = ssim.ssim_fwd(x, y, *options), *ssim.ssim_bwd(x[:, 0, 0, 0], x, y, *options, True, True)
    for place in (x, y):
        spoilt = place.clone()
        spoilt[1, 1, 19, 3] = math.nan
        pair = (spoilt, y) if place is x else (x, spoilt)
        found = (
            ssim.ssim_fwd(*pair, *options),
            *ssim.ssim_bwd(x[:, 0, 0, 0], *pair, *options, True, True),
        )
        for value, expected in zip(found, clean, strict=True):
            assert torch.equal(value[[0, 2]], expected[[0, 2]])
            assert bool(value[1].isnan().any())
    # Constants of 0, and windows that do not exist: 0 / 0 there is no one's.
    options = (*windows((20, 20), "gaussian", 5), 0.0, 0.0, False)
    assert bool(ssim.ssim_fwd(x, y, *options).isfinite().all())
    for value in ssim.ssim_bwd(x[:, 0, 0, 0], x, y, *options, True, True):
        assert bool(value.isfinite().all())


# ---- warped_ssim ----


def compare_warped(
    maps: Tensor, others: Tensor, boxes: Tensor, flips: Tensor, via: Any, size: Any,
    rows: Any, columns: Any, same: bool, want: tuple[bool, bool] = (True, True),
    grad: Tensor | None = None,
) -> None:  # fmt: skip
    options = (boxes, flips, via, size, rows, columns, C1, C2, same)
    grad = random(len(maps), seed=7) if grad is None else grad
    found = warped.warped_ssim_fwd(maps, others, *options)
    assert found.dtype == torch.float32
    wide, narrow = ((maps.to(d), others.to(d), *options) for d in (torch.float64, torch.float32))
    eager = warped_reference.warped_ssim_fwd(*narrow)
    close(found, warped_reference.warped_ssim_fwd(*wide), "values", eager)
    found_both = warped.warped_ssim_bwd(grad, maps, others, *options, *want)
    truths = warped_reference.warped_ssim_bwd(grad.double(), *wide, *want)
    eagers = warped_reference.warped_ssim_bwd(grad, *narrow, *want)
    assert [t.dtype for t in found_both] == [maps.dtype, others.dtype]
    names = ("maps", "others")
    for name, found, truth, eager in zip(names, found_both, truths, eagers, strict=True):
        close(found, truth, f"cotangent of {name}", eager)


# Maps, others, via, size, window.
WARPED = [
    ((7, 7), (7, 7), (40, 40), (40, 36), "gaussian", 11),
    ((5, 20), (17, 3), (33, 47), (21, 35), "lopsided", 5),
    ((9, 8), (4, 4), (9, 8), (30, 17), "uniform", 7),
    ((1, 1), (1, 1), (12, 9), (18, 5), "gaussian", 11),
    ((3, 4), (1, 6), (2, 5), (1, 1), "gaussian", 11),
    ((64, 33), (40, 64), (50, 30), (20, 20), "gaussian", 3),
    ((6, 6), (5, 5), (40, 40), (67, 40), "uniform", 33),
]


@poisoned
@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize(("shape", "other", "via", "size", "kind", "length"), WARPED)
def test_warped_ssim(
    shape: Any, other: Any, via: Any, size: Any, kind: str, length: int, same: bool
) -> None:
    boxes, flips = random_boxes(via, 3 if max(*shape, *other) > 16 or length > 17 else 5, sum(size))
    maps, others = random(len(boxes), *shape), random(len(boxes), *other, seed=1)
    compare_warped(maps, others, boxes, flips, via, size, *windows(size, kind, length), same)


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
    compare_warped(maps, others, boxes, flips, (30, 30), (50, 35), rows, columns, True)


@poisoned
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS)
@pytest.mark.parametrize("layout", ["transposed", "expanded", "sliced"])
def test_warped_ssim_strides_dtypes_and_wants(layout: str, dtypes: Any) -> None:
    boxes, flips = random_boxes((20, 30), 3, 5)
    boxes, flips = boxes.t().contiguous().t(), flips.repeat_interleave(2)[::2]
    maps = laid(random(3, 6, 5, dtype=dtypes[0]), layout)
    others = laid(random(3, 5, 4, seed=1, dtype=dtypes[1]), layout)
    index = list(ROUNDING).index(dtypes[1])
    want = ((True, True), (True, False), (False, True))[index]
    grad = torch.tensor([-0.7], device=DEVICE).expand(3)
    rows, columns = windows((13, 19), "gaussian", 5)
    compare_warped(
        maps, others, boxes, flips, (20, 30), (13, 19), rows, columns, index == 0, want, grad
    )


@hypothesis.settings(max_examples=12, deadline=None)
@hypothesis.given(data=st.data())
def test_warped_ssim_of_any_sizes(data: Any) -> None:
    def sides(most: int) -> Any:
        return data.draw(st.tuples(st.integers(1, most), st.integers(1, most)))

    shape, other, size = sides(9), sides(9), sides(20)
    via = sides(30) if data.draw(st.booleans()) else shape
    batch, seed = data.draw(st.integers(1, 2)), data.draw(st.integers(0, 2**31))
    boxes, flips = (t[-batch:] for t in random_boxes(via, 4, seed))
    maps, others = random(batch, *shape, seed=seed), random(batch, *other, seed=seed + 1)
    kind = data.draw(st.sampled_from(["gaussian", "uniform"]))
    length = data.draw(st.sampled_from([1, 3, 11]))
    rows, columns = windows(size, kind, length)
    compare_warped(maps, others, boxes, flips, via, size, rows, columns, data.draw(st.booleans()))


@poisoned
def test_warped_ssim_of_bad_boxes() -> None:
    boxes, flips, good = with_bad_boxes()
    maps, others = random(len(boxes), 4, 5), random(len(boxes), 3, 3, seed=1)
    rows, columns = windows((12, 10), "gaussian", 5)
    options: Any = (boxes, flips, (20, 30), (12, 10), rows, columns, C1, C2, True)
    for found in (
        warped.warped_ssim_fwd(maps, others, *options),
        *warped.warped_ssim_bwd(maps[:, 0, 0], maps, others, *options, True, True),
    ):
        assert [i for i, v in enumerate(found) if v.isfinite().all()] == good
        assert [i for i, v in enumerate(found) if not v.isnan().all()] == good
    compare_warped(
        maps[good], others[good], boxes[good], flips[good], (20, 30), (12, 10), rows, columns, True
    )


def test_warped_ssim_nan_stays_in_its_sample() -> None:
    boxes, flips = random_boxes((20, 30), 4, 5)
    boxes[:] = boxes[0]
    maps, others = random(4, 4, 5), random(4, 3, 3, seed=1)
    rows, columns = windows((12, 10), "gaussian", 5)
    options: Any = (boxes, flips, (20, 30), (12, 10), rows, columns, C1, C2, True)

    def results(maps: Tensor, others: Tensor) -> list[Tensor]:
        back = warped.warped_ssim_bwd(random(4), maps, others, *options, True, True)
        return [warped.warped_ssim_fwd(maps, others, *options), *back]

    clean = results(maps, others)
    for i in range(2):
        pair = [maps.clone(), others.clone()]
        pair[i][1, 1, 1] = math.nan
        for value, expected in zip(results(*pair), clean, strict=True):
            assert torch.equal(value[[0, 2, 3]], expected[[0, 2, 3]])
            assert bool(value[1].isnan().all())


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
