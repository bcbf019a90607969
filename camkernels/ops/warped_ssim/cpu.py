"""warped_ssim by the C++ kernel of csrc/warped_ssim. Signatures: reference.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from camkernels import _cpu
from camkernels.ops import _cpu_view, _layout, _native
from camkernels.ops.ssim.cpu import scratch_elements
from camkernels.ops.warp.cpu import taps_bytes
from camkernels.ops.warped_ssim.reference import Size


def _run(
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
    grad: Tensor | None,
    outputs: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> None:
    maps, others = _native.resolved(maps), _native.resolved(others)
    boxes, flips = boxes.contiguous(), flips.contiguous()
    wide = _layout.accumulate_dtype(maps.dtype)
    numbers = scratch_elements(*size, len(rows), len(columns), same, grad is not None)
    for source in (maps, others):  # Stretched in csrc/warped_ssim
        numbers += source.shape[1] * (2 * size[1] + source.shape[2])
    each = -(-(2 * taps_bytes(size[1], wide) + numbers * wide.itemsize) // 64) * 64
    threads = _cpu_view.threads(len(maps) * size[0] * size[1])
    scratch = maps.new_empty(each * threads, dtype=torch.uint8)
    grad = None if grad is None else _native.dense(grad, wide)
    code = _native.DTYPE_CODES
    values, to_maps, to_others = _native.pointers(outputs)
    _cpu.warped_ssim(
        len(maps),
        *((maps.shape[1 + i], via[i], size[i]) for i in (0, 1)),
        *((others.shape[1 + i], size[i], size[i]) for i in (0, 1)),
        boxes.data_ptr(), flips.data_ptr(), maps.data_ptr(), code[maps.dtype], maps.stride(),
        others.data_ptr(), code[others.dtype], others.stride(), list(rows), list(columns), c1, c2,
        same, *_native.pointers([grad]), values, to_maps, to_others, scratch.data_ptr(), each,
        threads,
    )  # fmt: skip


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
    values = maps.new_empty(len(maps), dtype=_layout.accumulate_dtype(maps.dtype))
    outputs = (values, None, None)
    _run(maps, others, boxes, flips, via, size, rows, columns, c1, c2, same, None, outputs)
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
    wide = _layout.accumulate_dtype(maps.dtype)
    to_maps = maps.new_empty(maps.shape if want_maps else 0, dtype=wide)
    to_others = others.new_empty(others.shape if want_others else 0, dtype=wide)
    wanted = (None, to_maps if want_maps else None, to_others if want_others else None)
    _run(maps, others, boxes, flips, via, size, rows, columns, c1, c2, same, grad, wanted)
    return to_maps.to(maps.dtype), to_others.to(others.dtype)
