"""warp by the C++ kernels of csrc/warp. Signatures: reference.py."""

from __future__ import annotations

import torch
from torch import Tensor

from camkernels import _cpu
from camkernels.ops import _cpu_view, _layout, _native
from camkernels.ops.warp.reference import Size


def taps_bytes(columns: int, dtype: torch.dtype) -> int:
    """Of ColumnTaps in csrc/warp/taps.h."""
    return 4 * columns * (4 + _layout.accumulate_dtype(dtype).itemsize)


def _run(
    kernel: str,
    image: Tensor,
    boxes: Tensor,
    flips: Tensor,
    source: Size,
    via: Size,
    size: Size,
    out: Tensor,
    sums: int,
) -> None:
    image = _native.resolved(image)
    boxes, flips = boxes.contiguous(), flips.contiguous()
    wide = _layout.accumulate_dtype(image.dtype)
    numbers = source[1] + size[1] + sums
    each = -(-(taps_bytes(size[1], wide) + numbers * wide.itemsize) // 64) * 64
    threads = _cpu_view.threads(image.numel() + out.numel())
    scratch = image.new_empty(each * threads, dtype=torch.uint8)
    getattr(_cpu, kernel)(
        image.shape[0],
        image.shape[1],
        (source[0], via[0], size[0]),
        (source[1], via[1], size[1]),
        boxes.data_ptr(),
        flips.data_ptr(),
        image.data_ptr(),
        _native.DTYPE_CODES[image.dtype],
        image.stride(),
        out.data_ptr(),
        scratch.data_ptr(),
        each,
        threads,
    )


def warp_fwd(source: Tensor, boxes: Tensor, flips: Tensor, via: Size, size: Size) -> Tensor:
    out = source.new_empty((*source.shape[:2], *size))
    shape = (source.shape[2], source.shape[3])
    _run("warp_fwd", source, boxes, flips, shape, via, size, out, 0)
    return out


def warp_bwd(grad: Tensor, boxes: Tensor, flips: Tensor, shape: Size, via: Size) -> Tensor:
    out = grad.new_empty((*grad.shape[:2], *shape))
    size = (grad.shape[2], grad.shape[3])
    _run("warp_bwd", grad, boxes, flips, shape, via, size, out, shape[0] * shape[1])
    return out
