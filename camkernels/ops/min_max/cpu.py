"""min_max by the C++ kernels of csrc/min_max. Signatures: reference.py."""

from __future__ import annotations

from torch import Tensor

from camkernels import _cpu
from camkernels.ops import _cpu_view, _layout, _native


def min_max_fwd(maps: Tensor) -> tuple[Tensor, Tensor]:
    maps = _native.resolved(maps)
    dtype = _layout.accumulate_dtype(maps.dtype)
    out = maps.new_empty(maps.shape, dtype=dtype)
    extremes = maps.new_empty((len(maps), 2), dtype=dtype)
    _cpu.min_max_fwd(
        tuple(maps.shape), maps.data_ptr(), _native.DTYPE_CODES[maps.dtype], maps.stride(),
        0, (0, 0, 0), extremes.data_ptr(), out.data_ptr(), _cpu_view.threads(maps.numel()),
    )  # fmt: skip
    return out, extremes


def min_max_bwd(grad: Tensor, maps: Tensor, extremes: Tensor) -> Tensor:
    maps = _native.resolved(maps)
    dtype = _layout.accumulate_dtype(maps.dtype)
    grad = _native.resolved(grad.to(dtype))
    extremes = _native.dense(extremes, dtype)
    out = maps.new_empty(maps.shape)
    _cpu.min_max_bwd(
        tuple(maps.shape), maps.data_ptr(), _native.DTYPE_CODES[maps.dtype], maps.stride(),
        grad.data_ptr(), grad.stride(), extremes.data_ptr(), out.data_ptr(),
        _cpu_view.threads(maps.numel()),
    )  # fmt: skip
    return out
