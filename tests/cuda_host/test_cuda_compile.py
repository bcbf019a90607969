"""What nvcc made of the CUDA kernels: registers, spills, the width of loads; read from the module.

``pytest tests/cuda_host/test_cuda_compile.py -s`` prints the report.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from camkernels import backends


def _tool() -> Path | None:
    """cuobjdump, which Triton brings along."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


_spec = None if backends.cuda_on_host() else importlib.util.find_spec("camkernels._cuda")
pytestmark = [
    pytest.mark.skipif(
        _spec is None, reason="installed without camkernels._cuda (CAMKERNELS_CUDA=1 shows why)"
    ),
    pytest.mark.skipif(_tool() is None, reason="triton, whose cuobjdump reads it, is not there"),
]
ARCHS = ("sm_80", "sm_90", "sm_120")
# Three blocks of 256 threads share 65536 registers; of warped_ssim two.
MOST_REGISTERS, MOST_OF_WARPED = 80, 128
# By 16 bytes where layouts allow: the activations and gradients of cam, and all of relu's.
READS_VECTORS = re.compile(r"(cam|cam_statistics|relu)_(fwd|bwd)_kernel")
WRITES_VECTORS = re.compile(r"(cam|cam_statistics)_bwd_kernel|relu_(fwd|bwd)_kernel")


class Kernel(NamedTuple):
    arch: str
    name: str
    registers: int
    stack: int
    local: int
    loads: Counter[str]
    stores: Counter[str]


def dump(*arguments: str) -> str:
    assert _spec is not None
    run = subprocess.run(
        [str(_tool()), *arguments, str(_spec.origin)], capture_output=True, text=True, check=True
    )
    return run.stdout


def readable(mangled: str) -> str:
    """``cam_fwd_kernel<float>`` of a mangled name."""
    ops = "cam_statistics|map_statistics|cam|relu|warped_ssim|ssim"
    found = re.search(rf"((?:{ops})_(?:fwd|bwd)_kernel|nothing_kernel)(.*)", mangled)
    assert found is not None, mangled
    types = {"If": "float32", "I6__half": "float16", "I13__nv_bfloat16": "bfloat16"}
    kind = next((t for key, t in types.items() if found[2].startswith(key)), "")
    flags = "".join(re.findall(r"Lb(\d)", found[2]))
    return f"{found[1]}<{kind}{',' + flags if flags else ''}>"


def kernels(arch: str) -> list[Kernel]:
    text = dump("-res-usage", "-arch", arch)
    usage = re.findall(r"Function (\w+):\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    code: dict[str, str] = {}
    for part in dump("-sass", "-arch", arch).split("Function : ")[1:]:
        code[part.split()[0]] = part
    found = []
    for name, registers, stack, local in usage:
        loads = Counter(re.findall(r"\bLDG\.E(?:\.STRONG\.GPU)?(?:\.(128|64|U16|U8))?", code[name]))
        stores = Counter(re.findall(r"\bSTG\.E(?:\.(128|64|U16|U8))?", code[name]))
        assert not re.search(r"\b(LDL|STL)\b", code[name]), f"{arch} {name}: local memory"
        sizes = int(registers), int(stack), int(local)
        found.append(Kernel(arch, readable(name), *sizes, loads, stores))
    return found


@pytest.fixture(scope="module")
def compiled() -> list[Kernel]:
    return [kernel for arch in ARCHS for kernel in kernels(arch)]


def table(found: list[Kernel]) -> str:
    """The report: widths in bytes x how many instructions."""
    widths = {"128": 16, "64": 8, "": 4, "U16": 2, "U8": 1}

    def row(counts: Counter[str]) -> str:
        return " ".join(f"{w}x{counts[key]}" for key, w in widths.items() if counts[key])

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
        or k.registers > (MOST_OF_WARPED if k.name.startswith("warped") else MOST_REGISTERS)
    ]
    assert not bad, "\n" + table(bad)


def test_memory_is_read_and_written_16_bytes_at_a_time(compiled: list[Kernel]) -> None:
    for k in compiled:
        if READS_VECTORS.match(k.name):
            assert k.loads["128"], f"{k.arch} {k.name} reads no vectors"
        if WRITES_VECTORS.match(k.name):
            assert k.stores["128"], f"{k.arch} {k.name} writes no vectors"
