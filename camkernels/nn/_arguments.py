"""Arguments of the network functions, checked and as the ops take them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from camkernels import modes
from camkernels.ops import _validate
from camkernels.ops.conv2d.op import ConvSpec

Pair = int | Sequence[int]


def pair(name: str, value: Pair, smallest: int) -> tuple[int, int]:
    both = (value, value) if isinstance(value, int) else tuple(value)
    if len(both) != 2 or not all(isinstance(v, int) and v >= smallest for v in both):
        raise ValueError(f"{name}: expected an int or a pair, each at least {smallest}: {value!r}")
    return both[0], both[1]


def conv_spec(stride: Pair, padding: Pair, dilation: Pair, groups: int) -> ConvSpec:
    return ConvSpec(
        pair("stride", stride, 1),
        pair("padding", padding, 0),
        pair("dilation", dilation, 1),
        groups,
    )


def convolution_inputs(
    input: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Checked, and in the autocast dtype where that is on."""
    x = _validate.floating_tensor("input", input, 4, "(N, C, H, W)")
    w = _validate.floating_tensor("weight", weight, 4, "(K, C / groups, kh, kw)")
    _validate.same_device("weight", w, "input", x)
    dtype = modes.autocast_dtype(x.device)
    if dtype is not None and torch.float64 not in (x.dtype, w.dtype):
        x, w = x.to(dtype), w.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if w.dtype != x.dtype:
        raise TypeError(f"weight: expected the dtype of input, {x.dtype}, got {w.dtype}")
    return x, w, bias


def check_affine(channels: int, like: Tensor, *values: Tensor | None) -> None:
    names = ("running_mean", "running_var", "weight", "bias")
    for name, value in zip(names, values, strict=True):
        if value is None:
            continue
        if value.shape != (channels,):
            raise ValueError(f"{name}: expected shape ({channels},), got {tuple(value.shape)}")
        _validate.same_device(name, value, "input", like)
    if (values[0] is None) != (values[1] is None):
        raise ValueError("running_mean, running_var: expected both or neither")
    if values[2] is None and values[3] is not None:
        raise ValueError("bias: given without weight")
