"""What the tests of the GPU kernels of warp, ssim and warped_ssim share: inputs, and comparisons
with the reference in float64.

They run in the interpreter (``TRITON_INTERPRET=1``), on the host build of the CUDA kernels
(``CAMKERNELS_CUDA_HOST=1``), or on a GPU.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from ops.base import tested_backends
from torch import Tensor

from camkernels import backends
from camkernels.ops.ssim import reference as ssim_reference
from camkernels.ops.warp import reference as warp_reference
from camkernels.ops.warped_ssim import reference as warped_reference

INTERPRETED = backends.triton_interpreted()
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
gpu_backends = pytest.mark.parametrize(
    "backend", [b for b in tested_backends() if any(name in str(b) for name in ("triton", "cuda"))]
)


def kernels(op: str, backend: str) -> Any:
    return importlib.import_module(f"camkernels.ops.{op}.{backend}")


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


def close(
    found: Tensor, truth: Tensor, name: str = "", eager: Tensor | None = None,
    terms: Tensor | None = None,
) -> None:  # fmt: skip
    """Within the rounding of the dtype and a few units of the sample's largest value (of 1 for
    values of SSIM; of ``terms`` where those are given, whose sums cancel), and twice what the
    formula is off by in float32: variances cancel."""
    assert found.shape == truth.shape, name
    assert found.is_contiguous(), name
    if not truth.numel():
        return
    found, rounding, truth = found.cpu().double(), ROUNDING[found.dtype], truth.cpu()
    dims = tuple(range(1, truth.dim()))
    sizes = truth if terms is None else terms.cpu()
    largest = sizes.abs().nan_to_num().amax(dims, keepdim=True) if dims else 1.0
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


def with_bad_boxes() -> tuple[Tensor, Tensor, list[int]]:
    """Bad boxes between good ones, and the numbers of the good ones."""
    good = list(range(0, 3 * len(BAD_BOXES) // 2, 3))
    boxes, flips = random_boxes((20, 30), 3 * len(BAD_BOXES) // 2, 4)
    bad = [i for i in range(len(boxes)) if i not in good]
    boxes[bad] = torch.tensor(BAD_BOXES, device=DEVICE)
    return boxes, flips, good


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
    backend: str, x: Tensor, y: Tensor, rows: Any, columns: Any, same: bool,
    want: tuple[bool, bool] = (True, True), grad: Tensor | None = None,
) -> None:  # fmt: skip
    ssim = kernels("ssim", backend)
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


def cotangent_terms(
    grad: Tensor, maps: Tensor, others: Tensor, boxes: Tensor, flips: Tensor, via: Any, size: Any,
    *window: Any,
) -> list[Tensor]:  # fmt: skip
    """The magnitudes that a pixel's cotangent is summed from, for both maps: it takes from the
    whole picture where a map has one pixel, and next to nothing of that may be left."""

    def warped(maps: Tensor) -> Tensor:
        return warp_reference.warp(maps[:, None], boxes, flips, via, size)

    def enlarged(others: Tensor) -> Tensor:
        return warped_reference.enlarged(others, size)

    pulls = [torch.func.vjp(f, t) for f, t in ((warped, maps), (enlarged, others))]
    pictures = ssim_reference.ssim_bwd(
        grad, *(picture for picture, _ in pulls), *window, True, True
    )
    return [pull(d.abs())[0] for (_, pull), d in zip(pulls, pictures, strict=True)]


def compare_warped(
    backend: str, maps: Tensor, others: Tensor, boxes: Tensor, flips: Tensor, via: Any, size: Any,
    rows: Any, columns: Any, same: bool, want: tuple[bool, bool] = (True, True),
    grad: Tensor | None = None,
) -> None:  # fmt: skip
    warped = kernels("warped_ssim", backend)
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
    terms = cotangent_terms(grad.double(), *wide)
    names = ("maps", "others")
    for i, (found, truth, eager) in enumerate(zip(found_both, truths, eagers, strict=True)):
        close(found, truth, f"cotangent of {names[i]}", eager, terms[i] if want[i] else None)
