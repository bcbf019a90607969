"""1 x 1 convolutions as matrix products, where the CPU's convolutions are slower than its products.

Which these are was measured once (two cores, AVX-512, oneDNN 3, float32 and bfloat16, every layer
of ResNet-50); what it brings as a whole is in ``step_engine.json``: in channels_last, where there
are few pixels, as in a network's last stage; in NCHW, where planes are large. The data gradient of
a strided one, which is zero but at the pixels that were read, is made there alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from camkernels.ops.conv2d.op import ConvSpec

# Below this many multiplications nothing is gained.
_LEAST_WORK = 1 << 21
# Pixels of a plane from which on products are faster in NCHW: towards pixels, and towards weights.
_LARGE_PLANE, _LARGE_PLANE_FOR_WEIGHTS = 24 * 24, 48 * 48

_meta_is_cpu: ContextVar[bool] = ContextVar("meta_is_cpu", default=False)


@contextmanager
def meta_as_cpu() -> Iterator[None]:
    """Tensors on the meta device take the way of the CPU's: a step is run to count its memory."""
    token = _meta_is_cpu.set(True)
    try:
        yield
    finally:
        _meta_is_cpu.reset(token)


def runs_on_cpu(tensor: Tensor) -> bool:
    kind = tensor.device.type
    return kind == "cpu" or (kind == "meta" and _meta_is_cpu.get())


def is_pointwise(like: Tensor, pixels: int, weight: Tensor, spec: ConvSpec) -> bool:
    """Whether a 1 x 1 convolution on the CPU is large enough to be looked at.

    Args:
        like: its input or output. pixels: those of its output, over the batch.
    """
    return (
        tuple(weight.shape[2:]) == (1, 1)
        and spec.groups == 1
        and spec.padding == (0, 0)
        and runs_on_cpu(like)
        and pixels * weight.numel() >= _LEAST_WORK
        # a lowered precision of products is not one that the user asked for convolutions
        and (like.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest")
    )


def _in_planes(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.shape[2] * tensor.shape[3] > 1


def _in_rows(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last)


def _suited(like: Tensor, plane: int, weight: Tensor, of_weights: bool) -> bool:
    """Whether a product is faster. ``like`` tells the layout; plane: pixels of the output's."""
    if _in_planes(like):
        return plane >= (_LARGE_PLANE_FOR_WEIGHTS if of_weights else _LARGE_PLANE)
    most = max(weight.shape[:2]) * (2 if of_weights else 1)
    return _in_rows(like) and like.shape[0] * plane <= most


def _rows(tensor: Tensor) -> Tensor:
    """(pixels, channels) of a channels_last tensor."""
    return tensor.permute(0, 2, 3, 1).reshape(-1, tensor.shape[1])


def _picture(rows: Tensor, like: Tensor) -> Tensor:
    return rows.view(like.shape[0], *like.shape[2:], rows.shape[1]).permute(0, 3, 1, 2)


def _read(x: Tensor, spec: ConvSpec) -> Tensor:
    """The pixels that the convolution reads, in the layout of x."""
    if spec.stride == (1, 1):
        return x
    layout = torch.contiguous_format if _in_planes(x) else torch.channels_last
    return x[:, :, :: spec.stride[0], :: spec.stride[1]].contiguous(memory_format=layout)


def spread(
    read: Tensor, size: tuple[int, int], stride: tuple[int, int], layout: torch.memory_format
) -> Tensor:
    """The gradient of planes of ``size`` from that of the pixels that were read."""
    shape = (*read.shape[:2], *size)
    whole = torch.empty(shape, dtype=read.dtype, device=read.device, memory_format=layout).zero_()
    whole[:, :, :: stride[0], :: stride[1]] = read
    return whole


def _times(x: Tensor, matrix: Tensor) -> Tensor:
    """matrix (K, C) times each pixel of x."""
    if _in_planes(x):
        batch = matrix.unsqueeze(0).expand(x.shape[0], -1, -1)
        return torch.bmm(batch, x.flatten(2)).view(x.shape[0], -1, *x.shape[2:])
    return _picture(_rows(x) @ matrix.t(), x)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec) -> Tensor | None:
    """The convolution, or None where the library's is faster."""
    plane = math.prod(-(-n // s) for n, s in zip(x.shape[2:], spec.stride, strict=True))
    if bias is not None or not is_pointwise(x, x.shape[0] * plane, weight, spec):
        return None
    return _times(_read(x, spec), weight.flatten(1)) if _suited(x, plane, weight, False) else None


def read_gradient(grad: Tensor, weight: Tensor, spec: ConvSpec) -> Tensor | None:
    """grad_x at the pixels that the convolution has read, or None where the library is faster."""
    plane = grad.shape[2] * grad.shape[3]
    if not is_pointwise(grad, grad.shape[0] * plane, weight, spec):
        return None
    if _suited(grad, plane, weight, False):
        return _times(grad, weight.flatten(1).t())
    if spec.stride == (1, 1) or not (_in_planes(grad) or _in_rows(grad)):
        return None
    read: Tensor = torch.ops.aten.convolution_backward(
        grad, grad.new_empty((grad.shape[0], weight.shape[1], *grad.shape[2:])), weight,
        (weight.shape[0],), (1, 1), (0, 0), (1, 1), False, (0, 0), 1, (True, False, False),
    )[0]  # fmt: skip
    return read


def data_gradient(
    grad: Tensor, size: tuple[int, int], weight: Tensor, spec: ConvSpec
) -> Tensor | None:
    """grad_x, of planes of ``size``, or None where the library's is faster."""
    read = read_gradient(grad, weight, spec)
    if read is None or spec.stride == (1, 1):
        return read
    layout = torch.contiguous_format if _in_planes(grad) else torch.channels_last
    return spread(read, size, spec.stride, layout)


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, spec: ConvSpec) -> Tensor | None:
    """grad_weight, or None where the library's is faster. Of ``weight`` only the shape is read."""
    plane = grad.shape[2] * grad.shape[3]
    if not is_pointwise(grad, grad.shape[0] * plane, weight, spec):
        return None
    planes = _in_planes(grad)
    alike = _in_planes(x) if planes else _in_rows(x)
    if not alike or not _suited(grad, plane, weight, True):
        return None
    read = _read(x, spec)
    if planes:
        product = torch.bmm(grad.flatten(2), read.flatten(2).transpose(1, 2)).sum(0)
    else:
        product = _rows(grad).t() @ _rows(read)
    return product.view(*weight.shape)
