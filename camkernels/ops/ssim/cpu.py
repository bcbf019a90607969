"""ssim by the C++ kernel of csrc/ssim. Signatures: reference.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from camkernels import _cpu
from camkernels.ops import _cpu_view, _layout, _native

_MOMENTS, _COTANGENTS = 5, 4


def _whole_vectors(count: int) -> int:
    return -(-count // 32) * 32 + 32


def scratch_elements(
    height: int, width: int, rows: int, columns: int, same: bool, backward: bool
) -> int:
    """Per thread, of SsimPlan in csrc/ssim/ssim_loops.h."""
    padded = width + (2 * (columns // 2) if same else 0)
    row, ring = _whole_vectors(padded), _whole_vectors(padded - columns + 1)
    count = 2 * rows * row + _MOMENTS * rows * ring + rows + columns + 32
    if backward:
        count += _COTANGENTS * (ring + 2 * columns + 64 + rows * row) + 2 * row
    return -(-count // 16) * 16


def _run(
    x: Tensor,
    y: Tensor,
    rows: Sequence[float],
    columns: Sequence[float],
    c1: float,
    c2: float,
    same: bool,
    grad: Tensor | None,
    outputs: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> None:
    x, y = _native.resolved(x), _native.resolved(y)
    wide = _layout.accumulate_dtype(x.dtype)
    each = scratch_elements(x.shape[2], x.shape[3], len(rows), len(columns), same, grad is not None)
    threads = _cpu_view.threads(x.numel())
    scratch = x.new_empty(each * threads, dtype=wide)
    sums = x.new_empty(x.shape[:2], dtype=torch.float64)
    grad = None if grad is None else _native.dense(grad, wide)
    code = _native.DTYPE_CODES
    values, to_x, to_y = _native.pointers(outputs)
    _cpu.ssim(
        tuple(x.shape), x.data_ptr(), code[x.dtype], x.stride(), y.data_ptr(), code[y.dtype],
        y.stride(), list(rows), list(columns), c1, c2, same, *_native.pointers([grad]), values,
        to_x, to_y, scratch.data_ptr(), each, sums.data_ptr(), threads,
    )  # fmt: skip


def ssim_fwd(
    x: Tensor,
    y: Tensor,
    rows: Sequence[float],
    columns: Sequence[float],
    c1: float,
    c2: float,
    same: bool,
) -> Tensor:
    values = x.new_empty(x.shape[0], dtype=_layout.accumulate_dtype(x.dtype))
    _run(x, y, rows, columns, c1, c2, same, None, (values, None, None))
    return values


def ssim_bwd(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    rows: Sequence[float],
    columns: Sequence[float],
    c1: float,
    c2: float,
    same: bool,
    want_x: bool,
    want_y: bool,
) -> tuple[Tensor, Tensor]:
    to_x = x.new_empty(x.shape if want_x else 0)
    to_y = y.new_empty(y.shape if want_y else 0)
    wanted = (None, to_x if want_x else None, to_y if want_y else None)
    _run(x, y, rows, columns, c1, c2, same, grad, wanted)
    return to_x, to_y
