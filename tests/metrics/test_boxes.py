"""Best boxes at all thresholds, and MaxBoxAccV2, against scikit-image threshold by threshold."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage import measure
from torch import Tensor

import camkernels as ck
from camkernels import backends, metrics
from camkernels.ops.best_box_ious import reference
from camkernels.ops.best_box_ious.op import best_box_ious as op

_NO_CPU = backends.unavailable_reason("cpu")
BACKENDS = [
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(_NO_CPU is not None, reason=str(_NO_CPU))),
]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def iou(box: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Of top, left, bottom, right, exclusive."""
    rows = max(0.0, min(box[2], other[2]) - max(box[0], other[0]))
    columns = max(0.0, min(box[3], other[3]) - max(box[1], other[1]))
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, other)]
    return rows * columns / (sum(areas) - rows * columns)


def best(marked: np.ndarray, box: list[float]) -> float:
    """By scikit-image: the best segment of one mask."""
    top, left, height, width = box
    true = (top, left, top + height, left + width)
    regions = measure.regionprops(measure.label(marked, connectivity=2))
    return max((iou(region.bbox, true) for region in regions), default=0.0)


def cases() -> dict[str, tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(0)
    winding = torch.zeros(15, 15, dtype=torch.int32)
    winding[::2] = 3
    winding[1::4, 14] = 2
    winding[3::4, 0] = 1
    diagonal = torch.eye(9, 7, dtype=torch.int32) * 4
    return {
        "few levels": (torch.randint(0, 6, (6, 12, 9), generator=generator).int(), 5),
        "noise": (torch.randint(0, 50, (3, 20, 17), generator=generator).int(), 49),
        "winding": (torch.stack([winding, winding.flip(0), winding.T]), 3),
        "diagonal": (torch.stack([diagonal, diagonal.flip(1)]), 4),
        "nothing": (torch.zeros(2, 3, 4, dtype=torch.int32), 3),
        "everything": (torch.full((1, 3, 4), 3, dtype=torch.int32), 3),
        "one pixel": (torch.tensor([[[2]]]).int(), 3),
        "one row": (torch.randint(0, 4, (2, 1, 30), generator=generator).int(), 3),
        "one column": (torch.randint(0, 4, (2, 30, 1), generator=generator).int(), 3),
        "no picture": (torch.zeros(0, 3, 4, dtype=torch.int32), 3),
        "many": (torch.randint(0, 9, (40, 30, 31), generator=generator).int(), 8),
    }


def boxes_in(count: int, height: int, width: int) -> Tensor:
    """Of any size from a fraction of a pixel, some reaching out of the picture."""
    generator = torch.Generator().manual_seed(1)
    shares = torch.rand(count, 4, generator=generator, dtype=torch.float64)
    boxes = (shares + 0.05) * torch.tensor([height, width, height, width])
    boxes[::2] = boxes[::2].ceil()
    return boxes


@every_backend
@pytest.mark.parametrize("name", cases())
def test_the_op_is_scikit_image_at_every_threshold(backend: str, name: str) -> None:
    levels, thresholds = cases()[name]
    boxes = boxes_in(*levels.shape)
    with ck.backend(backend):  # type: ignore[arg-type]
        found = op(levels, boxes, thresholds)
    expected = [
        [best(one.numpy() > t, box) for t in range(thresholds)]
        for one, box in zip(levels, boxes.tolist(), strict=True)
    ]
    assert found.dtype == torch.float64
    wanted = torch.tensor(expected, dtype=torch.float64).view(len(levels), thresholds)
    torch.testing.assert_close(found, wanted, atol=1e-14, rtol=0)


@every_backend
def test_other_strides_threads_and_chunks(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    levels, thresholds = cases()["many"]
    boxes = boxes_in(*levels.shape)
    with ck.backend(backend):  # type: ignore[arg-type]
        found = op(levels, boxes, thresholds)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            assert torch.equal(op(levels, boxes, thresholds), found)
        finally:
            torch.set_num_threads(threads)
        strided = torch.zeros(80, 31, 30, dtype=torch.int32)[::2].transpose(1, 2).copy_(levels)
        assert torch.equal(op(strided, boxes.T.contiguous().T, thresholds), found)
        assert torch.equal(op(levels[7:8], boxes[7:8], thresholds), found[7:8])
        monkeypatch.setattr(reference, "_PIXELS", 3000)
        assert torch.equal(op(levels, boxes, thresholds), found)


def test_segments_are_numbered_apart() -> None:
    masks = torch.rand(50, 20, 23, generator=torch.Generator().manual_seed(2)) > 0.6
    for mask, labels in zip(masks, reference.segments(masks), strict=True):
        expected = measure.label(mask.numpy(), connectivity=2)
        pairs = {(int(a), int(b)) for a, b in zip(expected.flat, labels.flatten(), strict=True)}
        assert len(pairs) == len(set(expected.flat)) == len(labels.unique())


def smooth_maps(count: int) -> Tensor:
    return torch.randn(count, 6, 5, generator=torch.Generator().manual_seed(4))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_function_marks_pixels_at_thresholds(backend: str, dtype: torch.dtype) -> None:
    maps, size = smooth_maps(4).to(dtype), (24, 20)
    boxes = torch.tensor([[2, 3, 10, 8], [0, 0, 24, 20], [20, 1, 3, 3], [5, 5, 6, 14]])
    with ck.backend(backend):  # type: ignore[arg-type]
        found = metrics.best_box_ious(maps, boxes, size)
    assert (found.shape, found.dtype) == ((4, 1001), torch.float64)
    large = metrics.regions.enlarged(maps, size)
    low, high = large.amin((1, 2), keepdim=True), large.amax((1, 2), keepdim=True)
    for k in (0, 1, 100, 333, 500, 871, 999, 1000):
        marked = (large - low) / (high - low) >= k / 1000
        expected = [best(m.numpy(), b) for m, b in zip(marked, boxes.tolist(), strict=True)]
        torch.testing.assert_close(found[:, k], torch.tensor(expected).double(), atol=1e-7, rtol=0)
    assert found[1, 0] == 1  # the whole picture


def test_accuracy_takes_the_best_threshold_over_the_data_set() -> None:
    """Pictures whose boxes are right at 0 to 0.5, and at 0.25 to 1: at 0.25 to 0.5 both are."""
    size, maps = (10, 10), torch.zeros(2, 10, 10)
    maps[0, :5] = 0.5
    maps[0, 0, 0] = 1.0
    maps[1] = 0.2
    maps[1, 2:4, 2:4] = 1.0
    maps[1, 9, 9] = 0.0
    boxes = torch.tensor([[0, 0, 5, 10], [2, 2, 2, 3]])  # IoU 1, and 2/3
    metric = metrics.MaxBoxAccV2(thresholds=101)
    metric.update(maps, boxes, size)
    found = {name: float(value) for name, value in metric.compute().items()}
    assert found == pytest.approx(
        {"max_box_acc_30": 1, "max_box_acc_50": 1, "max_box_acc_70": 0.5, "max_box_acc": 2.5 / 3}
    )
    assert metric.hits[1, 21:51].tolist() == [2] * 30
    assert metric.hits[1, 51:].tolist() == [1] * 50
    one = metrics.MaxBoxAccV2(levels=[2 / 3], thresholds=101)
    one.update(maps[1:], boxes[1:], size)
    assert float(one.compute()["max_box_acc"]) == 1  # at least, not more than


def test_batches_accumulate_and_the_metric_resets() -> None:
    maps, boxes = smooth_maps(9), boxes_in(9, 24, 20)
    whole, parts = metrics.MaxBoxAccV2(), metrics.MaxBoxAccV2()
    whole.update(maps, boxes, (24, 20))
    for part in (slice(0, 4), slice(4, 4), slice(4, 9)):
        parts.update(maps[part], boxes[part], (24, 20))
    assert parts.compute() == whole.compute()
    assert 0 < float(whole.compute()["max_box_acc_30"]) < 1
    whole.reset()
    assert all(value.isnan() for value in whole.compute().values())


def test_constant_and_bad_maps_and_missing_boxes() -> None:
    maps, size = smooth_maps(5), (12, 12)
    maps[0], maps[1] = 3.0, 0.0
    maps[2, 0, 0] = math.inf
    boxes = torch.tensor([[0, 0, 12, 12], [0, 0, 6, 12], [1, 1, 3, 3], [1, 1, 0, 3], [1, 1, 9, 9]])
    found = metrics.best_box_ious(maps, boxes, size, thresholds=11)
    assert found[0].tolist() == [1] + [0] * 10
    assert found[1].tolist() == [0.5] + [0] * 10
    assert found.isnan().all(1).tolist() == [False, False, True, True, False]
    metric = metrics.MaxBoxAccV2()
    metric.update(maps[3:], boxes[3:], size)
    assert (float(metric.missing), float(metric.count)) == (1, 1)
    assert not metric.compute()["max_box_acc"].isnan()
    metric.update(maps[2:3], boxes[2:3], size)
    assert metric.compute()["max_box_acc"].isnan()


def test_what_is_refused() -> None:
    maps = smooth_maps(2)
    with pytest.raises(ValueError, match="thresholds: expected at least 2, got 1"):
        metrics.best_box_ious(maps, torch.ones(2, 4), (9, 9), thresholds=1)
    with pytest.raises(ValueError, match=r"boxes: expected \(2, 4\)"):
        metrics.best_box_ious(maps, torch.ones(3, 4), (9, 9))
    with pytest.raises(ValueError, match="maps: expected floating-point"):
        metrics.best_box_ious(maps[0], torch.ones(6, 4), (9, 9))
    with pytest.raises(ValueError, match="levels"):
        metrics.MaxBoxAccV2(levels=(0.0,))
    with pytest.raises(ValueError, match="thresholds"):
        metrics.MaxBoxAccV2(thresholds=0)


def test_without_a_kernel_the_formula_runs_unless_a_kernel_was_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    levels, thresholds = cases()["few levels"]
    boxes = boxes_in(*levels.shape)
    expected = op(levels, boxes, thresholds)
    monkeypatch.setattr(backends, "resolve", lambda device, dtype: "triton")
    monkeypatch.setattr(backends, "current_backend", lambda: "auto")
    torch.testing.assert_close(op(levels, boxes, thresholds), expected, atol=1e-14, rtol=0)
    monkeypatch.setattr(backends, "current_backend", lambda: "triton")
    with pytest.raises(backends.BackendUnavailableError, match="no kernel best_box_ious"):
        op(levels, boxes, thresholds)
