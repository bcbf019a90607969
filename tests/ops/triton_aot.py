"""Compile what the Triton backend would launch, for a GPU that need not be present.

``python triton_aot.py CAPABILITY GROUP`` runs the host functions on CPU tensors with the launch
replaced by a compilation, so the variants (specialised strides, alignments, None pointers, block
sizes) are those of real calls, and prints one JSON record per kernel. GROUP: default, slow, or
spill (one kernel squeezed into too few registers). Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton_calls import CAM, TABLES, Case, call, cases  # beside this file, which runs as a script

import camkernels.ops
from camkernels.ops import _triton_launch as host

# 16 bytes: four words, two double words.
WIDE = r"\b{}\.global[\w.:]*\.(?:v4\.\w32|v2\.\w64)"
ACCESS = r"\b{}\.global[\w.:]*?(?:\.v([248]))?\.[bfsu](8|16|32|64|128)\b"
# A load straight to shared memory, its bytes last.
ASYNCHRONOUS = (
    r"\bcp\.async\.c[ag]\.shared\.global[\w.:]* *\[[^]]*\], *\[[^]]*\], *(0x[0-9a-f]+|\d+)"
)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class AbsentGPU:
    """As much of a Triton driver as a compilation asks for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def kernels() -> list[str]:
    """Every Triton kernel of the ops, found by looking: ``*_kernel`` in the rooms' triton.py."""
    found = []
    for room in pkgutil.iter_modules(camkernels.ops.__path__, "camkernels.ops."):
        if room.ispkg and importlib.util.find_spec(f"{room.name}.triton"):
            module = importlib.import_module(f"{room.name}.triton")
            for name, value in vars(module).items():
                if isinstance(value, triton.JITFunction) and name.endswith("_kernel"):
                    found.append(name)
    return sorted(found)


def inspect(asm: Any, listing: bool) -> dict[str, int]:
    """Registers, local memory and the widths of memory instructions.

    Args:
        asm: what Triton made. listing: look for local memory in the machine code too, which takes
            as long to list as to make. A load of the PTX is one of the machine's, as wide.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run(
                [str(TOOLS / "cuobjdump"), option, file.name],
                capture_output=True, text=True, check=True,
            ).stdout
            if wanted
            else ""
            for option, wanted in (("-res-usage", True), ("-sass", listing))
        )  # fmt: skip
    fields = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", usage)}
    ptx = asm["ptx"]
    return {
        "registers": fields["REG"],
        "local_bytes": fields["STACK"] + fields["LOCAL"],
        "local_accesses": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "loads": len(re.findall(r"\bld\.global", ptx)),
        "wide_loads": len(re.findall(WIDE.format("ld"), ptx)),
        "wide_stores": len(re.findall(WIDE.format("st"), ptx)),
    }


def widths(ptx: str, kind: str) -> dict[str, int]:
    """How many global loads (``ld``) or stores (``st``) of so many bytes there are."""
    found = re.findall(ACCESS.format(kind), ptx)
    sizes = [int(vector or 1) * int(bits) // 8 for vector, bits in found]
    if kind == "ld":
        sizes += [int(size, 0) for size in re.findall(ASYNCHRONOUS, ptx)]
    return {str(size): count for size, count in sorted(Counter(sizes).items(), reverse=True)}


def variant(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> dict[str, Any]:
    """What sets one call of a kernel apart from another, besides its case."""
    missing = [n for n, a in zip(kernel.arg_names, args, strict=False) if a is None]
    flags = {k: v for k, v in constants.items() if isinstance(v, (bool, int, float, str))}
    return {"constants": flags, "missing": missing}


def reason_of(error: Exception) -> str:
    """The line of a compiler's message that says what is wrong."""
    lines = [line.strip() for line in f"{error}".splitlines() if line.strip()]
    telling = [li for li in lines if re.search(r"error|not supported|requires|fatal", li, re.I)]
    return f"{type(error).__name__}: {(telling or lines or ['no message'])[0]}"[:300]


def main(capability: int, group: str) -> None:
    driver.set_active(AbsentGPU(capability))  # type: ignore[arg-type]
    seen: dict[str, dict[str, Any]] = {}
    running: list[Case] = []
    extra = {"maxnreg": 32} if group == "spill" else {}

    def compile_only(kernel: Any, grid: Any, like: Tensor, *args: Any, **constants: Any) -> None:
        about = {
            "kernel": kernel.__name__,
            "case": running[0]._asdict(),
            "capability": capability,
            "split": bool(constants.get("SPLIT")),
            **variant(kernel, args, constants),
        }
        try:
            compiled = kernel.run(*args, grid=grid, warmup=True, **{**constants, **extra})
        except Exception as error:  # a compiler's: of Triton's, LLVM's or ptxas' own classes
            if group not in TABLES:
                raise
            seen[json.dumps(about)] = {**about, "error": reason_of(error)}
            return
        if compiled.hash not in seen:
            seen[compiled.hash] = {
                **about,
                "shared_bytes": compiled.metadata.shared,
                "warps": compiled.metadata.num_warps,
                "load_widths": widths(compiled.asm["ptx"], "ld"),
                "store_widths": widths(compiled.asm["ptx"], "st"),
                **inspect(compiled.asm, listing=group in ("slow", "spill")),
            }

    host.launch = compile_only
    host.multiprocessors = lambda device: 132
    for case in [Case("cam", *CAM[0])] if group == "spill" else cases(group, capability):
        running[:] = [case]
        call(case)
    found = {"kernels": kernels(), "compiled": list(seen.values()), "triton": triton.__version__}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
