"""Memory of a step: peaks at the allocator, bytes saved for backward, kernel launches.

glibc's malloc must be set, and it reads its settings when a process starts, so measurements run
in processes of their own:

- timing: thresholds so large that freed memory stays in the heap. Otherwise every tensor beyond
  the threshold is mapped and faulted in anew, and page faults dominate. Measured with glibc 2.36:
  the environment is honoured beyond the 32 MiB that ``mallopt`` allows, and warm repetitions of
  400 MiB allocations make 0 page faults with the values below, 205 000 with a 256 MiB threshold.
- peak: thresholds so small that freed memory goes back to the system at once, so that resident
  memory is what is allocated. A dispatch mode would not see what C++ allocates inside an op.
"""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Side

TIMING_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}
PEAK_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def process_environment(malloc: dict[str, str], python_path: str = "") -> dict[str, str]:
    """Environment of a measuring process: ours, with the malloc settings in place of any set."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    environment.pop("GLIBC_TUNABLES", None)  # it would override the settings
    environment.update(malloc)
    if python_path:
        earlier = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = python_path + (os.pathsep + earlier if earlier else "")
    return environment


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def host_peak(step: Callable[[], Any], warm_up: int = 2) -> int:
    """Bytes by which resident memory rises above its level before a warmed-up step.

    Raises:
        RuntimeError: the process was not started with :data:`PEAK_MALLOC`.
    """
    for key, value in PEAK_MALLOC.items():
        if os.environ.get(key) != value:
            raise RuntimeError(f"peak memory needs {key}={value} from the start of the process")
    for _ in range(warm_up):
        step()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
    before = _resident("VmRSS")
    step()
    return max(0, _resident("VmHWM") - before)


def cuda_peak(step: Callable[[], Any], warm_up: int = 2) -> int:
    """Bytes allocated by torch's CUDA allocator above the level before a warmed-up step."""
    for _ in range(warm_up):
        step()
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated()) - before


def peak(step: Callable[[], Any], device: str) -> int:
    return cuda_peak(step) if device == "cuda" else host_peak(step)


class _Saved:
    """What a node of the graph holds instead of the tensor it saved; dies with the node."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(side: Side) -> int:
    """Bytes that autograd holds between forward and backward, each storage once.

    Storages of the side's parameters are not counted; inputs of the step are. What a Function
    keeps on its context behind autograd's back is not seen here, only in the peak.
    """
    alive: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        alive.add(saved)
        return saved

    excluded = {p.untyped_storage().data_ptr() for p in side.parameters}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        outputs = side.forward()
    storages = {}
    for saved in alive:
        storage = saved.tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            storages[storage.data_ptr()] = storage.nbytes()
    if side.backward is not None:
        side.backward(outputs)
    return sum(storages.values())


def launches(step: Callable[[], Any], device: str) -> int | None:
    """Kernels (and copies) that a warmed-up step puts on the GPU; None on the CPU."""
    if device != "cuda":
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == on_device for event in profile.events())
