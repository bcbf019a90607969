"""What nvcc made of the CUDA kernels: registers, spills, the width of loads; read from the module.

``pytest tests/cuda_host/test_cuda_compile.py -s`` prints the report, for all architectures that
the module was built for.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.kernels import module_path
from benchmarks.kernels_cuda import NARROW, Kernel, archs, kernels, tool, widths
from camkernels import backends

pytestmark = [
    pytest.mark.skipif(backends.cuda_on_host(), reason="in this process the module is the host's"),
    pytest.mark.skipif(
        # where it is asked for (CI), its absence is an error
        module_path() is None and os.environ.get("CAMKERNELS_CUDA") != "1",
        reason="installed without camkernels._cuda (CAMKERNELS_CUDA=1 shows why)",
    ),
    pytest.mark.skipif(tool() is None, reason="triton, whose cuobjdump reads it, is not there"),
]
# Three blocks of 256 threads share 65536 registers; of warped_ssim two.
MOST_REGISTERS, MOST_OF_WARPED = 80, 128
# By 16 bytes where layouts allow: the activations and gradients of cam, all of relu's, and maps in
# the kernels that are launched for them.
OF_MAPS = r"map_statistics_(fwd|bwd)_kernel<\w+,1>"
READS_VECTORS = re.compile(rf"(cam|cam_statistics|relu)_(fwd|bwd)_kernel|{OF_MAPS}")
WRITES_VECTORS = re.compile(
    r"(cam|cam_statistics)_bwd_kernel|relu_(fwd|bwd)_kernel|map_statistics_bwd_kernel<\w+,1>"
)
STRIDED = re.compile(r"map_statistics_(fwd|bwd)_kernel<\w+,0>")
"""Launched where maps are strided, not aligned, or small."""


@pytest.fixture(scope="module")
def module() -> Path:
    found = module_path()
    assert found is not None, "CAMKERNELS_CUDA=1, but camkernels._cuda is not there"
    return found


@pytest.fixture(scope="module")
def compiled(module: Path) -> dict[str, list[Kernel]]:
    """By architecture."""
    return {arch: kernels(module, arch) for arch in (f"sm_{n}" for n in archs(module))}


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


def test_there_is_code_for_every_architecture_that_the_module_names(
    compiled: dict[str, list[Kernel]],
) -> None:
    import camkernels._cuda as built

    assert [*compiled] == re.findall(r"sm_\d+", built.archs)


def test_kernels_do_not_spill(compiled: dict[str, list[Kernel]]) -> None:
    everything = [k for found in compiled.values() for k in found]
    print("\n" + table(everything))
    for found in compiled.values():
        names = {k.name.split("<")[0] for k in found}
        assert len(names) == 13, names  # two each of six ops, and the probe of the device
    bad = [
        k
        for k in everything
        if k.stack
        or k.local
        or k.spills
        or k.registers > (MOST_OF_WARPED if k.name.startswith("warped") else MOST_REGISTERS)
    ]
    assert not bad, "\n" + table(bad)


def test_memory_is_read_and_written_16_bytes_at_a_time(compiled: dict[str, list[Kernel]]) -> None:
    for k in (k for found in compiled.values() for k in found):
        if READS_VECTORS.match(k.name):
            assert k.loads["128"], f"{k.arch} {k.name} reads no vectors"
        elif not STRIDED.match(k.name) and not k.name.startswith("nothing"):
            op = re.sub(r"_(fwd|bwd)_kernel.*", "", k.name)
            assert op in NARROW, f"{k.name} reads no vectors, and nothing says why"
        if WRITES_VECTORS.match(k.name):
            assert k.stores["128"], f"{k.arch} {k.name} writes no vectors"
