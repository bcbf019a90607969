"""A step that does not fit the memory leaves nothing behind that spoils the next one."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from gpu.steps import BY_CUDA, BY_TRITON, ON_GPU, STEPS, Step, batch, close, every_step_at, using
from torch import Tensor

pytestmark = ON_GPU
MIB = 1 << 20


@contextmanager
def capped(more: int) -> Iterator[None]:
    """``more`` bytes above what PyTorch holds now."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties("cuda").total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + more) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def allocated() -> int:
    gc.collect()
    torch.cuda.synchronize()
    return int(torch.cuda.memory_allocated())


@every_step_at(BY_TRITON, BY_CUDA)
def test_the_next_step_is_as_if_nothing_had_been(kind: str, device: str, backend: str) -> None:
    with using(backend):
        run_out(STEPS[kind](device), *batch(device))


def run_out(step: Step, images: Tensor, targets: Tensor) -> None:
    """Steps that fit, that do not, and that fit again."""
    step(images, targets)
    expected = step(images, targets)
    before = allocated()
    failed = 0
    with capped(64 * MIB):
        for count in (16, 24, 32, 48, 64):  # short of memory at several points of a step
            many = [t.to("cuda") for t in batch("cpu", count, 224)]
            try:
                step(*many)
            except torch.OutOfMemoryError:
                failed += 1
            step.clear()
            del many
    assert failed, "nothing ran out of memory: the cap does not hold"
    close(step(images, targets), expected)
    assert allocated() <= before + MIB
