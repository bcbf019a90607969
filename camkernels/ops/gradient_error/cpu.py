"""gradient_error by the C++ kernels of csrc/gradient_error. Signatures: reference.py."""

from __future__ import annotations

import torch
from torch import Tensor

from camkernels import _cpu
from camkernels.ops import _cpu_view, _layout, _native
from camkernels.ops._native import DTYPE_CODES
from camkernels.ops.gradient_error import flat
from camkernels.ops.gradient_error.reference import ERRORS, STATISTICS


def _rows(tensor: Tensor) -> tuple[int, int, int]:
    return tensor.data_ptr(), DTYPE_CODES[tensor.dtype], tensor.stride(0)


def gradient_error_fwd(delta: Tensor, guided: Tensor, error: str) -> tuple[Tensor, Tensor]:
    delta, guided = flat.in_one_order(delta, guided)
    dtype = _layout.accumulate_dtype(delta.dtype)
    batch, entries = delta.shape[0], delta.shape[1:].numel()
    errors = delta.new_empty(batch, dtype=dtype)
    statistics = delta.new_empty((batch, STATISTICS), dtype=dtype)
    blocks = -(-entries // _cpu.GRADIENT_ERROR_BLOCK)
    partial = delta.new_empty((batch, blocks, STATISTICS), dtype=torch.float64)
    _cpu.gradient_error_fwd(
        *_rows(delta),
        *_rows(guided),
        batch,
        entries,
        ERRORS.index(error),
        errors.data_ptr(),
        statistics.data_ptr(),
        partial.data_ptr(),
        _cpu_view.threads(2 * delta.numel()),
    )
    return errors, statistics


def gradient_error_bwd(
    grad_errors: Tensor, delta: Tensor, guided: Tensor, statistics: Tensor, error: str
) -> Tensor:
    delta, guided = flat.in_one_order(delta, guided)
    dtype = _layout.accumulate_dtype(delta.dtype)
    grad_delta = flat.like_samples_of(delta, delta.dtype)
    to_errors, known = _native.dense(grad_errors, dtype), _native.dense(statistics, dtype)
    _cpu.gradient_error_bwd(
        to_errors.data_ptr(),
        *_rows(delta),
        *_rows(guided),
        known.data_ptr(),
        grad_delta.data_ptr(),
        delta.shape[0],
        delta.shape[1:].numel(),
        ERRORS.index(error),
        _cpu_view.streams(delta.numel(), delta.dtype),
        _cpu_view.threads(2 * delta.numel()),
    )
    return grad_delta
