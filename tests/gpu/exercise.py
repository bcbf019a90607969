"""Every GPU kernel once or more, for a memory checker to watch; results against the reference.

``python tests/gpu/exercise.py --device cuda --backend cuda triton [--small]``; exits with 1 where a
result is wrong. ``--small``: of one dtype, since a checker makes a kernel ten to a
hundred times slower.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TESTS = Path(__file__).resolve().parents[1]
for folder in (TESTS, TESTS / "ops"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import camkernels as ck  # noqa: E402

Call = Callable[[], list[Tensor]]


def public_calls(small: bool) -> Iterator[tuple[str, Call]]:
    """Ops that have CUDA kernels, with their gradients (tests/cuda_host/exercise.py)."""
    from cuda_host.exercise import calls

    for name, call in calls():
        if not small or "torch.float32" in name:
            yield name, call


def network_calls() -> Iterator[tuple[str, Call]]:
    """The second order of a block, and the criteria's steps."""
    from gpu.steps import STEPS, batch

    for kind, make in STEPS.items():

        def run(make: Any = make) -> list[Tensor]:
            # the device in force is that of the block around
            device = str(torch.empty(0).device)
            return list(make(device)(*batch(device)))

        yield f"step {kind}", run


def raw_cases() -> list[Any]:
    """A small case of every op that has Triton kernels: whole and split over blocks, both layouts,
    and the forms in which different kernels run."""
    triton_calls = importlib.import_module("triton_calls")
    case = triton_calls.Case
    activations, few = (2, 48, 7, 7), (1, 600, 6, 6)
    return [
        *(case(op, shape, "float32", layout, pooled)
          for op in ("cam", "cam_statistics", "cam_weights", "cam_pixels")
          for shape, layout, pooled in (
              (activations, "nchw", True), (activations, "channels_last", False),
              (few, "nchw", True))),
        case("map_statistics", (3, 9, 11)),
        *(case("batch_norm_relu", shape, "float32", layout, rich)
          for shape, layout, rich in (
              ((4, 20, 7, 7), "nchw", True), ((4, 32, 6, 6), "channels_last", False))),
        case("relu", (2, 3, 5, 7)),
        case("gradient_error", (2, 3, 17, 19)),
        case("max_pool", (2, 5, 14, 14)),
        case("max_pool", (2, 16, 13, 13), "float32", "channels_last", False),
        case("warp", (2, 3, 16, 16)),
        case("ssim", (2, 1, 40, 37)),
        case("warped_ssim", (2, 7, 9)),
        case("min_max", (3, 9, 11)),
        case("lp_norm", (2, 3, 17, 19), "float32", "nchw", False),
        case("lp_norm", (3, 9, 11)),
        case("lp_norm", (2, 64, 64)),
    ]  # fmt: skip


def raw_calls(device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """The kernels as the ops call them, on memory that nobody wrote: for where they read and
    write, not for what they compute."""
    with torch.device(device):
        triton_calls = importlib.import_module("triton_calls")
        # boxes within every source, so that the sums behind them are made
        triton_calls.BOXES = torch.tensor([[0, 0, 5, 6]], device=device).repeat(64, 1)
        triton_calls.FLIPS = torch.zeros(64, dtype=torch.bool, device=device)
        for case in raw_cases():
            yield f"{case.op} {case.shape} {case.layout}", lambda c=case: triton_calls.call(c)


def compare(name: str, found: list[Tensor], expected: list[Tensor]) -> str:
    """What is wrong, or nothing. Steps sum in other orders on a GPU."""
    loose = 2e-2 if name.startswith("step") or "float32" not in name else 1e-4
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        scale = float(y.double().abs().max()) + 1e-6
        error = float((x.double() - y.double()).abs().max())
        if not error <= loose * scale:
            return f"{name}: result {i} is off by {error:.3g} of {scale:.3g}"
    return ""


def exercise(device: str, backend: str, small: bool) -> list[str]:
    """Runs the calls of a backend; what is wrong."""
    torch.manual_seed(0)
    faults, ran = [], 0
    steps = network_calls() if backend != "cuda" else iter(())  # cuda has no kernels for these
    with torch.device(device):
        for group in (public_calls(small), steps):
            for name, call in group:
                with ck.backend("reference"):
                    expected = call()
                with ck.backend(backend):  # type: ignore[arg-type]
                    fault = compare(name, call(), expected)
                faults += [fault] if fault else []
                ran += 1
    if backend == "triton":
        for _, raw in raw_calls(device):
            raw()
            ran += 1
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    print(f"{backend} on {device}: {ran} calls, {len(faults)} wrong")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", nargs="+", default=["cuda", "triton"])
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    faults = []
    for backend in arguments.backend:
        faults += exercise(arguments.device, backend, arguments.small)
    print("\n".join(faults))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
