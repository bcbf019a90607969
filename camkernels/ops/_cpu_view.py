"""How the C++ kernels split their work, on how many threads, what they store past the caches."""

from __future__ import annotations

import torch

# Elements read below which waking a second thread costs more than it saves.
_SERIAL_BELOW = 1 << 15
# Bytes written from which stores pass the caches by: what is larger than a last-level cache is
# gone from it before anyone reads it.
_STREAM_FROM = 1 << 25
# Blocks of channels: enough for many cores also where the batch is small, none below 64 channels
# (a partial map costs as much as a channel), none above 2048 (long float32 sums round). The shape
# alone decides, so that sums are added in the same order whatever the thread count.
_TASKS, _SMALLEST_BLOCK, _LARGEST_BLOCK = 64, 64, 2048


def channel_block(batch: int, channels: int) -> int:
    """Channels per block; blocks of one sample become partial maps that are added in order."""
    blocks = max(1, min(-(-_TASKS // max(batch, 1)), channels // _SMALLEST_BLOCK))
    blocks = max(blocks, -(-channels // _LARGEST_BLOCK))
    per_block = -(-channels // blocks)
    return -(-per_block // 16) * 16  # whole cache lines of float32 in channels_last


def threads(elements: int) -> int:
    """What ``torch.set_num_threads`` allows; 1 for little work."""
    return 1 if elements < _SERIAL_BELOW else torch.get_num_threads()


def streams(elements: int, dtype: torch.dtype) -> bool:
    """Whether an output of this size is stored past the caches."""
    return elements * dtype.itemsize >= _STREAM_FROM
