"""Host side that the Triton kernels share: tiles, splits, scratch counters, the launch itself.

Imported only when the Triton backend runs.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from camkernels.ops._gpu import arrival_counters as arrival_counters
from camkernels.ops._gpu import multiprocessors as multiprocessors

# Elements of one tile. With 4 warps a thread holds 32 of them: enough bytes in flight to hide the
# latency of memory, few enough registers (below 128) for several programs per multiprocessor.
TILE = 4096
NUM_WARPS = 4
# Programs wanted per multiprocessor when a forward is split over the channels: about what one
# multiprocessor can hold at once, so that a small batch fills the GPU with one wave.
PROGRAMS_PER_MULTIPROCESSOR = 4
# What PROGRAMS_PER_MULTIPROCESSOR programs of NUM_WARPS warps can have each. Said to the compiler,
# since left to itself it once (sm_80, half types) spilled two registers to get down to 80.
MAX_REGISTERS = 128
MAX_PIXELS = 2**31 - 1  # pixel numbers within a map are 32 bit, offsets are 64 bit


class Tile(NamedTuple):
    """Block sizes of the kernels that read activations (B, K, h, w)."""

    BLOCK_K: int
    BLOCK_P: int


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, *args: Any, **constants: Any) -> None:
    """Run ``kernel`` once on the device of ``like``. Every launch of this package comes here."""
    if like.is_cuda and like.device.index != torch.cuda.current_device():
        with torch.cuda.device(like.device):
            kernel[grid](*args, **constants)
    else:
        kernel[grid](*args, **constants)


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def pixel_block(pixels: int, largest: int) -> int:
    """The largest block whose padding wastes little over the best one.

    A 28x28 map fills 7 blocks of 128 to 88 %, but one of 1024 to 77 %: masked lanes cost slots.
    """
    smallest = min(64, largest)
    if pixels <= smallest:
        return max(16, power_of_two(pixels))
    blocks = [2**i for i in range(smallest.bit_length() - 1, largest.bit_length())]
    padded = {block: -(-pixels // block) * block for block in blocks}
    return max(block for block in blocks if padded[block] <= 1.15 * min(padded.values()))


def tile(channels: int, pixels: int, channels_last: bool, wide: bool) -> Tile:
    """Blocks for activations of K channels and P pixels: long along what lies side by side.

    ``wide``: a load takes several elements. If not, each element has a 64-bit address of its own
    in registers, and a whole tile of them takes 160 to 200 registers a thread, or spills.
    """
    elements = TILE if wide else TILE // 2
    if channels_last:
        block_k = min(max(16, power_of_two(channels)), 128)
        return Tile(block_k, max(16, min(power_of_two(pixels), elements // block_k)))
    block_p = pixel_block(pixels, 512)
    return Tile(max(1, min(power_of_two(channels), elements // block_p)), block_p)


def is_wide(channels: int, align: int, strides: PixelStrides, channels_last: bool) -> bool:
    """Whether a load takes several elements: of neighbouring channels, or of pixels."""
    if channels_last:
        return channels % 16 == 0
    return align >= 4 and strides.flat and strides.stride_x == 1


def channel_chunk(batch: int, channels: int, block_k: int, device: torch.device) -> int:
    """Channels of one program of a forward: all, or fewer where the batch alone is too small.

    Depends on the shape and the GPU only, and partial sums are added in a fixed order, so equal
    inputs give equal bits.
    """
    blocks = -(-channels // block_k)
    wanted = -(-PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(device) // batch)
    return -(-blocks // min(wanted, blocks)) * block_k


class PixelStrides(NamedTuple):
    """How pixel p = y w + x of a tensor (..., h, w) is found: p stride_x where ``flat``."""

    stride_y: int
    stride_x: int
    flat: bool


def pixel_strides(tensor: Tensor) -> PixelStrides:
    height, width = tensor.shape[-2:]
    stride_y, stride_x = tensor.stride()[-2:]
    if width == 1:
        return PixelStrides(0, stride_y, True)
    if height == 1 or stride_y == width * stride_x:
        return PixelStrides(0, stride_x, True)
    return PixelStrides(stride_y, stride_x, False)


def alignment(pixels: int, *tensors: Tensor | None) -> int:
    """The largest power of two up to 16 that divides P and the outer strides.

    Triton sees by itself only that an argument is a multiple of 16; a 14x14 map would be read
    one element at a time. So the kernels take these numbers divided by the alignment.
    """
    outer = [s for t in tensors if t is not None for s in t.stride()[:2]]
    return math.gcd(16, pixels, *outer)


def check_pixels(tensor: Tensor, name: str) -> int:
    pixels = tensor.shape[-2] * tensor.shape[-1]
    if pixels > MAX_PIXELS:
        raise ValueError(
            f"{name}: the Triton kernels take maps up to 2^31 - 1 pixels, got {pixels}"
        )
    return pixels


def cdiv(a: int, b: int) -> int:
    return int(triton.cdiv(a, b))
