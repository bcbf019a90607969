"""What nvcc made of the CUDA kernels, read from the module: registers, spills, widths of loads."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

WARPS = 8
"""kThreads of csrc/common/launch.cuh."""
# Dynamic shared memory of a launch, in bytes: the sizes in the sources, which a test compares.
SHARED = {
    "cam_fwd_kernel": 9472,
    "cam_bwd_kernel": 18688,
    "cam_statistics_fwd_kernel": 9472,
    "cam_statistics_bwd_kernel": 18688,
    "map_statistics_fwd_kernel": 128,
    "map_statistics_bwd_kernel": 0,
    "relu_fwd_kernel": 0,
    "relu_bwd_kernel": 0,
    "ssim_fwd_kernel": 24640,
    "ssim_bwd_kernel": 24640,
    "warped_ssim_fwd_kernel": 28736,
    "warped_ssim_bwd_kernel": 28736,
}
NARROW = {
    "ssim": "Reads a pixel at a time: spans begin at any pixel (a tile less its padding), seldom "
    "at 16 bytes, and the lanes of a warp read 32 neighbours as it is.",
    "warped_ssim": "Reads a pixel at a time: the taps of a resampling lie anywhere in a map.",
}
"""Ops whose kernels read no 16 bytes at once, and why."""
PROBE = "nothing_kernel"
_OPS = "cam_statistics|map_statistics|cam|relu|warped_ssim|ssim"
_TYPES = {"If": "float32", "I6__half": "float16", "I13__nv_bfloat16": "bfloat16"}
_WIDTHS = {"128": 16, "64": 8, "": 4, "U16": 2, "U8": 1}


def tool() -> Path | None:
    """cuobjdump, which Triton brings along."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Kernel(NamedTuple):
    """Of one architecture; ``loads`` and ``stores``: instructions by their suffix (128: 16 bytes,
    none: 4)."""

    arch: str
    name: str
    registers: int
    stack: int
    local: int
    loads: Counter[str]
    stores: Counter[str]
    spills: int
    """Instructions that reach into local memory."""


def dump(module: Path, *arguments: str) -> str:
    """What cuobjdump says."""
    run = subprocess.run(
        [str(tool()), *arguments, str(module)], capture_output=True, text=True, check=True
    )
    return run.stdout


def archs(module: Path) -> list[int]:
    """Capabilities that the module has kernels for: nvcc links an empty cubin for its default."""
    named = {int(n) for n in re.findall(r"\.sm_(\d+)\.cubin", dump(module, "--list-elf"))}
    usage = {n: dump(module, "-res-usage", "-arch", f"sm_{n}") for n in sorted(named)}
    return [n for n, text in usage.items() if "Function" in text]


def readable(mangled: str) -> str:
    """``cam_fwd_kernel<float32>`` of a mangled name."""
    found = re.search(rf"((?:{_OPS})_(?:fwd|bwd)_kernel|{PROBE})(.*)", mangled)
    assert found is not None, mangled
    kind = next((t for key, t in _TYPES.items() if found[2].startswith(key)), "")
    flags = "".join(re.findall(r"Lb(\d)", found[2]))
    return f"{found[1]}<{kind}{',' + flags if flags else ''}>"


def kernels(module: Path, arch: str) -> list[Kernel]:
    """All of ``arch``, such as ``sm_90``."""
    text = dump(module, "-res-usage", "-arch", arch)
    usage = re.findall(r"Function (\w+):\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    code: dict[str, str] = {}
    for part in dump(module, "-sass", "-arch", arch).split("Function : ")[1:]:
        code[part.split()[0]] = part
    found = []
    for name, registers, stack, local in usage:
        loads = Counter(re.findall(r"\bLDG\.E(?:\.STRONG\.GPU)?(?:\.(128|64|U16|U8))?", code[name]))
        stores = Counter(re.findall(r"\bSTG\.E(?:\.(128|64|U16|U8))?", code[name]))
        sizes = int(registers), int(stack), int(local)
        spills = len(re.findall(r"\b(?:LDL|STL)\b", code[name]))
        found.append(Kernel(arch, readable(name), *sizes, loads, stores, spills))
    return found


def widths(counts: Counter[str]) -> dict[str, int]:
    """Instructions by bytes, widest first."""
    return {str(w): counts[key] for key, w in _WIDTHS.items() if counts[key]}


def records(module: Path, capability: int) -> list[dict[str, Any]]:
    """Of every kernel but the probe, in the form of those of Triton."""
    out = []
    for kernel in kernels(module, f"sm_{capability}"):
        name, _, options = kernel.name.partition("<")
        if name == PROBE:
            continue
        dtype, _, flags = options.rstrip(">").partition(",")
        out.append({
            "kernel": name,
            "case": {"op": re.sub(r"_(fwd|bwd)_kernel", "", name), "dtype": dtype or "any"},
            "capability": capability,
            "constants": {"flags": flags} if flags else {},
            "missing": [],
            "shared_bytes": SHARED[name],
            "warps": WARPS,
            "registers": kernel.registers,
            "local_bytes": kernel.stack + kernel.local,
            "load_widths": widths(kernel.loads),
            "store_widths": widths(kernel.stores),
        })  # fmt: skip
    return out
