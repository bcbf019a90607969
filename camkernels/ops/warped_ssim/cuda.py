"""warped_ssim by the CUDA kernels of csrc/warped_ssim: one launch each way.

Signatures: reference.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from camkernels.ops import _cuda_launch as host
from camkernels.ops import _gpu, _native
from camkernels.ops._native import DTYPE_CODES
from camkernels.ops.ssim.arguments import weights_on, window_arguments
from camkernels.ops.ssim.cuda import TILE
from camkernels.ops.warped_ssim.reference import Size


def _check(maps: Tensor, others: Tensor, via: Size, size: Size) -> None:
    for axis in (0, 1):
        _gpu.check_axis(maps.shape[1 + axis], via[axis], size[axis])
        _gpu.check_axis(others.shape[1 + axis], size[axis], size[axis])
    host.check_pixels(maps, "maps")  # two long axes, each of them taken, may be too many together
    host.check_pixels(others, "others")


def _map(tensor: Tensor) -> tuple[Any, ...]:
    stride_b, stride_h, stride_w = tensor.stride()
    return tensor.data_ptr(), DTYPE_CODES[tensor.dtype], (stride_b, 0, stride_h, stride_w)


def warped_ssim_fwd(
    maps: Tensor,
    others: Tensor,
    boxes: Tensor,
    flips: Tensor,
    via: Size,
    size: Size,
    rows: Sequence[float],
    columns: Sequence[float],
    c1: float,
    c2: float,
    same: bool,
) -> Tensor:
    """(B,) float32."""
    _check(maps, others, via, size)
    (down, _), window = window_arguments(size, rows, columns, same)
    values = maps.new_empty(len(maps), dtype=torch.float32)
    sums = values.new_empty((len(maps), -(-down // TILE)))
    kept = _sources(maps, others, boxes, flips)
    _run(
        "warped_ssim_fwd", kept, via, size, rows, columns, window, c1, c2,
        (sums, values, None, None, None, None, None),
    )  # fmt: skip
    return values


def warped_ssim_bwd(
    grad: Tensor,
    maps: Tensor,
    others: Tensor,
    boxes: Tensor,
    flips: Tensor,
    via: Size,
    size: Size,
    rows: Sequence[float],
    columns: Sequence[float],
    c1: float,
    c2: float,
    same: bool,
    want_maps: bool,
    want_others: bool,
) -> tuple[Tensor, Tensor]:
    """Cotangents of maps and others (empty where not wanted), in their dtypes."""
    _, window = window_arguments(size, rows, columns, same)
    bands = -(-size[0] // TILE)
    found: list[Tensor] = []
    written: list[Tensor | None] = []
    sums: list[Tensor | None] = []
    for tensor, wanted in ((maps, want_maps), (others, want_others)):
        found.append(tensor.new_empty(tensor.shape if wanted else 0))
        written.append(found[-1] if wanted else None)
        shape = (len(tensor), bands, *tensor.shape[1:])
        sums.append(tensor.new_empty(shape, dtype=torch.float32) if wanted else None)
    kept = _sources(maps, others, boxes, flips)
    _run(
        "warped_ssim_bwd", kept, via, size, rows, columns, window, c1, c2,
        (None, None, _native.dense(grad, torch.float32), *sums, *written),
    )  # fmt: skip
    return found[0], found[1]


def _sources(maps: Tensor, others: Tensor, boxes: Tensor, flips: Tensor) -> tuple[Tensor, ...]:
    return (
        _native.resolved(maps),
        _native.resolved(others),
        boxes.contiguous(),
        flips.contiguous(),
    )


def _run(
    kernel: str,
    sources: tuple[Tensor, ...],
    via: Size,
    size: Size,
    rows: Sequence[float],
    columns: Sequence[float],
    window: tuple[int, ...],
    c1: float,
    c2: float,
    outputs: Sequence[Tensor | None],
) -> None:
    """``outputs``: sums, values, grad, sums of both maps, cotangents of both."""
    maps, others, boxes, flips = sources
    weights = weights_on(rows, columns, maps.device)
    arrivals = _gpu.arrival_counters(len(maps), maps.device)
    sizes = [*maps.shape[1:], *via, *size, *others.shape[1:]]
    host.run(
        kernel, (*sources, outputs[2]),  # which is the cotangent
        len(maps), sizes, boxes.data_ptr(), flips.data_ptr(), *_map(maps), *_map(others),
        weights.data_ptr(), window, c1, c2, arrivals.data_ptr(), _native.pointers(outputs),
    )  # fmt: skip
