"""What launches on a GPU share, whoever compiled the kernel."""

from __future__ import annotations

import torch
from torch import Tensor


def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors share the programs (on a CPU, for tests: a small number)."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


_counters: dict[tuple[torch.device, int], Tensor] = {}


def arrival_counters(batch: int, device: torch.device) -> Tensor:
    """Zeroed int32 counters (at least B), one per sample; kernels leave them at zero.

    Kept per stream: launches of one stream never overlap, so they can share them. A CUDA graph
    may be replayed on any stream and gets its own, zeroed inside the graph.
    """
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return torch.zeros(batch, dtype=torch.int32, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
    held = _counters.get((device, stream))
    if held is None or held.numel() < batch:
        size = max(1024, 1 << max(batch - 1, 0).bit_length())
        held = torch.zeros(size, dtype=torch.int32, device=device)
        _counters[device, stream] = held
    return held


def check_axis(source: int, via: int, size: int) -> None:
    """Twice the products of two sizes must fit 32 bit."""
    if 2 * (via + 2) * (max(source, size) + 2) >= 2**31:
        raise ValueError(
            "via, size: along an axis the kernels for GPUs take pictures whose size times that of "
            f"the source, and of the output, is below 2^30, got {source} by way of {via} to {size}"
        )
