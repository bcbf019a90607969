"""ssim by the CUDA kernels of csrc/ssim: one launch each way. Signatures: reference.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from camkernels.ops import _cuda_launch as host
from camkernels.ops import _gpu, _native
from camkernels.ops._native import DTYPE_CODES
from camkernels.ops.ssim.arguments import weights_on, window_arguments

TILE = 16  # kOut of csrc/ssim/windows.cuh


def picture(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), DTYPE_CODES[tensor.dtype], tensor.stride()


def ssim_fwd(
    x: Tensor,
    y: Tensor,
    rows: Sequence[float],
    columns: Sequence[float],
    c1: float,
    c2: float,
    same: bool,
) -> Tensor:
    """(B,) float32."""
    host.check_pixels(x, "x")
    x, y = _native.resolved(x), _native.resolved(y)
    batch, channels, *size = x.shape
    (down, _), window = window_arguments(size, rows, columns, same)
    values = x.new_empty(batch, dtype=torch.float32)
    sums = values.new_empty((batch, channels * -(-down // TILE)))
    weights = weights_on(rows, columns, x.device)
    arrivals = _gpu.arrival_counters(batch, x.device)
    host.run(
        "ssim_fwd", (x, y),
        tuple(x.shape), *picture(x), *picture(y), weights.data_ptr(), window, c1, c2,
        *_native.pointers((values, sums, arrivals)),
    )  # fmt: skip
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
    """Cotangents of x and y (empty where not wanted), in their dtypes."""
    x, y = _native.resolved(x), _native.resolved(y)
    _, window = window_arguments(x.shape[2:], rows, columns, same)
    to_x, to_y = x.new_empty(x.shape if want_x else 0), y.new_empty(y.shape if want_y else 0)
    grad = _native.dense(grad, torch.float32)
    weights = weights_on(rows, columns, x.device)
    host.run(
        "ssim_bwd", (x, y, grad),
        tuple(x.shape), *picture(x), *picture(y), weights.data_ptr(), window, c1, c2,
        *_native.pointers((grad, to_x if want_x else None, to_y if want_y else None)),
    )  # fmt: skip
    return to_x, to_y
