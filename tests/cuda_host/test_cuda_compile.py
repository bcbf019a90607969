"""What nvcc made of the CUDA kernels: registers, spills, the width of loads; read from the module.

``pytest tests/cuda_host/test_cuda_compile.py -s`` prints the report.
"""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.kernels_cuda import Kernel, kernels, tool, widths
from camkernels import backends

_spec = None if backends.cuda_on_host() else importlib.util.find_spec("camkernels._cuda")
pytestmark = [
    pytest.mark.skipif(
        _spec is None, reason="installed without camkernels._cuda (CAMKERNELS_CUDA=1 shows why)"
    ),
    pytest.mark.skipif(tool() is None, reason="triton, whose cuobjdump reads it, is not there"),
]
ARCHS = ("sm_80", "sm_90", "sm_120")
# Three blocks of 256 threads share 65536 registers; of warped_ssim two.
MOST_REGISTERS, MOST_OF_WARPED = 80, 128
# By 16 bytes where layouts allow: the activations and gradients of cam, and all of relu's.
READS_VECTORS = re.compile(r"(cam|cam_statistics|relu)_(fwd|bwd)_kernel")
WRITES_VECTORS = re.compile(r"(cam|cam_statistics)_bwd_kernel|relu_(fwd|bwd)_kernel")


@pytest.fixture(scope="module")
def compiled() -> list[Kernel]:
    assert _spec is not None
    return [kernel for arch in ARCHS for kernel in kernels(Path(str(_spec.origin)), arch)]


def table(found: list[Kernel]) -> str:
    """The report: widths in bytes x how many instructions."""

    def row(counts: Counter[str]) -> str:
        return " ".join(f"{w}x{n}" for w, n in widths(counts).items())

    lines = [f"{'kernel':44}{'arch':8}{'regs':>5}{'stack':>6}  {'loads':34}stores"]
    for k in found:
        lines.append(
            f"{k.name:44}{k.arch:8}{k.registers:>5}{k.stack:>6}  {row(k.loads):34}{row(k.stores)}"
        )
    return "\n".join(lines)


def test_kernels_do_not_spill(compiled: list[Kernel]) -> None:
    print("\n" + table(compiled))
    for arch in ARCHS:
        names = {k.name.split("<")[0] for k in compiled if k.arch == arch}
        assert len(names) == 13, names  # two each of six ops, and the probe of the device
    bad = [
        k
        for k in compiled
        if k.stack
        or k.local
        or k.spills
        or k.registers > (MOST_OF_WARPED if k.name.startswith("warped") else MOST_REGISTERS)
    ]
    assert not bad, "\n" + table(bad)


def test_memory_is_read_and_written_16_bytes_at_a_time(compiled: list[Kernel]) -> None:
    for k in compiled:
        if READS_VECTORS.match(k.name):
            assert k.loads["128"], f"{k.arch} {k.name} reads no vectors"
        if WRITES_VECTORS.match(k.name):
            assert k.stores["128"], f"{k.arch} {k.name} writes no vectors"
