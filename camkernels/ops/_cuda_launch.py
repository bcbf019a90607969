"""Host side that the CUDA kernels share: the launch, its errors, how channels are split.

Imported only when the CUDA backend runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from camkernels.ops import _gpu
from camkernels.ops.cam.arguments import Work

# As kThreads and kLargestChunk of csrc: channels of a block in multiples of _CHUNK, which keeps
# every chunk on a boundary of 16 bytes whatever the number of pixels.
_CHUNK, _LARGEST_CHUNK = 16, 256
# Blocks wanted per multiprocessor: about what one can hold, so that a small batch fills the GPU.
_BLOCKS_PER_MULTIPROCESSOR = 4
MAX_PIXELS = 2**30  # pixel numbers within a map, and steps past the last one, are 32 bit


def module() -> Any:
    """camkernels._cuda."""
    return importlib.import_module("camkernels._cuda")


def on_host() -> bool:
    """Whether this is the tests' build of the kernels for the host, which takes CPU tensors."""
    return bool(module().archs == "host")


def run(kernel: str, operands: Sequence[Tensor | None], *arguments: Any) -> None:
    """Launch ``kernel`` on the device of the first of ``operands`` and its current stream.

    Args:
        operands: the tensors that the op was given, for the device and for errors.
        arguments: what the kernel takes behind the stream.

    Raises:
        RuntimeError: what CUDA says of the launch, or of a kernel that failed before it.
    """
    function = getattr(module(), kernel)
    leader = operands[0]
    assert leader is not None
    if not leader.is_cuda:
        status = function(0, *arguments)
    else:
        with torch.cuda.device(leader.device):
            status = function(torch.cuda.current_stream().cuda_stream, *arguments)
    if status:
        name, text = module().error_name(status), module().error_text(status)
        shapes = ", ".join(
            f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}"
            for t in operands
            if t is not None
        )
        raise RuntimeError(
            f"camkernels::{kernel} on {leader.device} of {shapes}: {name} ({text}). An earlier "
            "kernel may have failed: CUDA_LAUNCH_BLOCKING=1 shows which"
        )


def check_pixels(tensor: Tensor, name: str) -> None:
    pixels = tensor.shape[-2] * tensor.shape[-1]
    if pixels > MAX_PIXELS:
        raise ValueError(f"{name}: the CUDA kernels take maps up to 2^30 pixels, got {pixels}")


def split(shape: Sequence[int], like: Tensor) -> Work:
    """Depends on the shape and the GPU only, so equal inputs give equal bits."""
    batch, channels = shape[:2]
    groups = -(-channels // _CHUNK)
    wanted = -(-_BLOCKS_PER_MULTIPROCESSOR * _gpu.multiprocessors(like.device) // max(batch, 1))
    chunk = min(-(-groups // min(wanted, groups)) * _CHUNK, _LARGEST_CHUNK)
    return Work(block=chunk, threads=1, streams=lambda out: False, masked=False)
