"""The GPU kernels of ssim and warped_ssim, Triton and CUDA, against the reference in float64."""

from __future__ import annotations

import math
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from ops.gpu_views import (
    C1,
    C2,
    DEVICE,
    DTYPE_PAIRS,
    INTERPRETED,
    ROUNDING,
    SLOW,
    compare_ssim,
    compare_warped,
    gpu_backends,
    kernels,
    laid,
    poisoned,
    random,
    random_boxes,
    windows,
    with_bad_boxes,
)
from torch import Tensor

SSIMS = [
    ((40, 21), "gaussian", 11),
    ((19, 34), "lopsided", 11),
    ((17, 17), "uniform", 7),
    ((5, 12), "gaussian", 11),  # a window of 5 by 11
    ((1, 1), "gaussian", 11),
    ((2, 40), "uniform", 3),
    ((35, 38), "lopsided", 17),
]


@gpu_backends
@poisoned
@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize(("size", "kind", "length"), SSIMS)
def test_ssim(backend: str, size: Any, kind: str, length: int, same: bool) -> None:
    x, y = random(2, 2, *size), random(2, 2, *size, seed=1)
    compare_ssim(backend, x, x + 0.5 * y, *windows(size, kind, length), same)


@gpu_backends
@poisoned
@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("length", [19, pytest.param(33, marks=SLOW), pytest.param(49, marks=SLOW)])
def test_ssim_of_long_windows(backend: str, length: int, same: bool) -> None:
    x, y = random(1, 1, 67, 50), random(1, 1, 67, 50, seed=1)
    compare_ssim(backend, x, x + y, *windows((67, 50), "lopsided", length), same)


@gpu_backends
@poisoned
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS)
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "expanded", "sliced"])
def test_ssim_strides_dtypes_and_wants(backend: str, layout: str, dtypes: Any) -> None:
    x = laid(random(2, 3, 13, 19, dtype=dtypes[0]), layout)
    y = random(2, 3, 13, 19, seed=1, dtype=dtypes[1])
    index = list(ROUNDING).index(dtypes[0])
    want = ((True, True), (True, False), (False, True))[index]
    grad = torch.tensor([-0.7], device=DEVICE).expand(2)
    rows, columns = windows((13, 19), "gaussian", 5)
    compare_ssim(backend, x, y, rows, columns, index == 0, want, grad)
    compare_ssim(backend, y, x, rows, columns, index != 0, want[::-1], grad)


DTYPES = st.sampled_from(list(ROUNDING))
# A call takes seconds in the interpreter.
few_examples = hypothesis.settings(max_examples=8 if INTERPRETED else 12, deadline=None)


def beyond_a_block(**arguments: Any) -> Any:
    """An example of more pixels than a block of CUDA's has threads."""
    return (lambda test: test) if INTERPRETED else hypothesis.example(**arguments)


@gpu_backends
@few_examples
@hypothesis.example(
    batch=0, channels=2, height=4, width=5, kind="gaussian", length=3, same=True, seed=0,
    dtypes=(torch.float32, torch.float32),
)  # fmt: skip
@beyond_a_block(
    batch=1, channels=1, height=33, width=18, kind="lopsided", length=7, same=False, seed=0,
    dtypes=(torch.bfloat16, torch.float16),
)  # fmt: skip
@hypothesis.given(
    batch=st.integers(0, 2), channels=st.integers(1, 2), height=st.integers(1, 20),
    width=st.integers(1, 20), kind=st.sampled_from(["gaussian", "uniform", "lopsided"]),
    length=st.sampled_from([1, 3, 7, 11]), same=st.booleans(), seed=st.integers(0, 2**31),
    dtypes=st.tuples(DTYPES, DTYPES),
)  # fmt: skip
def test_ssim_of_any_sizes(
    backend: str, batch: int, channels: int, height: int, width: int, kind: str, length: int,
    same: bool, seed: int, dtypes: Any,
) -> None:  # fmt: skip
    shape = (batch, channels, height, width)
    rows, columns = windows((height, width), kind, length)
    if same:  # of odd size, or there are more windows than pixels
        rows, columns = windows((height, width), "uniform" if kind == "lopsided" else kind, length)
    x, y = (random(*shape, seed=seed + i, dtype=dtype) for i, dtype in enumerate(dtypes))
    compare_ssim(backend, x, y, rows, columns, same)


@gpu_backends
def test_ssim_nan_stays_in_its_sample(backend: str) -> None:
    ssim = kernels("ssim", backend)
    x, y = random(3, 2, 20, 20), random(3, 2, 20, 20, seed=1)
    options: Any = (*windows((20, 20), "gaussian", 5), C1, C2, True)
    clean = (
        ssim.ssim_fwd(x, y, *options),
        *ssim.ssim_bwd(x[:, 0, 0, 0], x, y, *options, True, True),
    )
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


@gpu_backends
@poisoned
@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize(("shape", "other", "via", "size", "kind", "length"), WARPED)
def test_warped_ssim(
    backend: str, shape: Any, other: Any, via: Any, size: Any, kind: str, length: int, same: bool
) -> None:
    boxes, flips = random_boxes(via, 3 if max(*shape, *other) > 16 or length > 17 else 5, sum(size))
    maps, others = random(len(boxes), *shape), random(len(boxes), *other, seed=1)
    compare_warped(
        backend, maps, others, boxes, flips, via, size, *windows(size, kind, length), same
    )


@gpu_backends
@poisoned
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS)
@pytest.mark.parametrize("layout", ["transposed", "expanded", "sliced"])
def test_warped_ssim_strides_dtypes_and_wants(backend: str, layout: str, dtypes: Any) -> None:
    boxes, flips = random_boxes((20, 30), 3, 5)
    boxes, flips = boxes.t().contiguous().t(), flips.repeat_interleave(2)[::2]
    maps = laid(random(3, 6, 5, dtype=dtypes[0]), layout)
    others = laid(random(3, 5, 4, seed=1, dtype=dtypes[1]), layout)
    index = list(ROUNDING).index(dtypes[1])
    want = ((True, True), (True, False), (False, True))[index]
    grad = torch.tensor([-0.7], device=DEVICE).expand(3)
    rows, columns = windows((13, 19), "gaussian", 5)
    compare_warped(
        backend,
        maps,
        others,
        boxes,
        flips,
        (20, 30),
        (13, 19),
        rows,
        columns,
        index == 0,
        want,
        grad,
    )


def sides(most: int) -> Any:
    return st.tuples(st.integers(1, most), st.integers(1, most))


@gpu_backends
@few_examples
@hypothesis.example(
    batch=0, shape=(3, 4), other=(5, 2), via=(20, 9), size=(12, 17), kind="gaussian", length=3,
    same=True, seed=0, dtypes=(torch.float32, torch.float32),
)  # fmt: skip
@beyond_a_block(
    batch=2, shape=(20, 17), other=(17, 18), via=(25, 23), size=(20, 19), kind="uniform", length=3,
    same=False, seed=0, dtypes=(torch.float16, torch.bfloat16),
)  # fmt: skip
@hypothesis.given(
    batch=st.integers(0, 2), shape=sides(9), other=sides(9), via=st.none() | sides(30),
    size=sides(20), kind=st.sampled_from(["gaussian", "uniform"]),
    length=st.sampled_from([1, 3, 11]), same=st.booleans(), seed=st.integers(0, 2**31),
    dtypes=st.tuples(DTYPES, DTYPES),
)  # fmt: skip
def test_warped_ssim_of_any_sizes(
    backend: str, batch: int, shape: Any, other: Any, via: Any, size: Any, kind: str, length: int,
    same: bool, seed: int, dtypes: Any,
) -> None:  # fmt: skip
    """``via`` of None: the maps as they are."""
    via = via or shape
    boxes, flips = (t[len(t) - batch :] for t in random_boxes(via, 4, seed))
    maps, others = (
        random(batch, *plane, seed=seed + i, dtype=dtypes[i])
        for i, plane in enumerate((shape, other))
    )
    rows, columns = windows(size, kind, length)
    compare_warped(backend, maps, others, boxes, flips, via, size, rows, columns, same)


@gpu_backends
@poisoned
def test_warped_ssim_of_bad_boxes(backend: str) -> None:
    warped = kernels("warped_ssim", backend)
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
        backend,
        maps[good],
        others[good],
        boxes[good],
        flips[good],
        (20, 30),
        (12, 10),
        rows,
        columns,
        True,
    )


@gpu_backends
def test_warped_ssim_nan_stays_in_its_sample(backend: str) -> None:
    warped = kernels("warped_ssim", backend)
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
