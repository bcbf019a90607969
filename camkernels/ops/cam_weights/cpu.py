"""cam_weights by the C++ kernel of csrc/cam_methods. Signatures: reference.py."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from camkernels import _cpu
from camkernels.ops import _cpu_view, _layout, _native
from camkernels.ops.cam_weights.op import empty_as
from camkernels.ops.cam_weights.reference import METHODS


def pair(activations: Tensor, gradients: Tensor) -> tuple[Any, ...]:
    """Shape, and what the kernels are told of both tensors, which have one dtype."""
    return (
        tuple(activations.shape),
        activations.data_ptr(),
        _native.DTYPE_CODES[activations.dtype],
        activations.stride(),
        gradients.data_ptr(),
        gradients.stride(),
    )


def targets(outputs: tuple[Tensor, ...], like: tuple[Tensor, ...]) -> list[Any]:
    """Address and layout of each cotangent; 0 where it is empty."""
    found: list[Any] = []
    for output, given in zip(outputs, like, strict=True):
        found += [output.data_ptr() if output.dim() == 4 else 0, _layout.is_channels_last(given)]
    return found


def cam_weights_fwd(activations: Tensor, gradients: Tensor, method: str, eps: float) -> Tensor:
    activations, gradients = _native.resolved(activations), _native.resolved(gradients)
    dtype = _layout.accumulate_dtype(activations.dtype)
    weights = activations.new_empty(activations.shape[:2], dtype=dtype)
    _cpu.cam_weights(
        *pair(activations, gradients), METHODS.index(method), eps, weights.data_ptr(), 0,
        0, False, 0, False, _cpu_view.threads(activations.numel()),
    )  # fmt: skip
    return weights


def cam_weights_bwd(
    grad: Tensor,
    activations: Tensor,
    gradients: Tensor,
    method: str,
    eps: float,
    want_activations: bool,
    want_gradients: bool,
) -> tuple[Tensor, Tensor]:
    activations, gradients = _native.resolved(activations), _native.resolved(gradients)
    outputs = empty_as(activations, want_activations), empty_as(gradients, want_gradients)
    if grad.numel() and activations.numel():
        dense = _native.dense(grad, _layout.accumulate_dtype(activations.dtype))
        _cpu.cam_weights(
            *pair(activations, gradients), METHODS.index(method), eps, 0, dense.data_ptr(),
            *targets(outputs, (activations, gradients)), _cpu_view.threads(activations.numel()),
        )  # fmt: skip
    return outputs
