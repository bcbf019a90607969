"""Under what a figure was measured: versions, machine, commit."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The processor's name, from /proc/cpuinfo where there is one."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def host_kind(device: str) -> str:
    """Folder of results that are comparable: ``cpu-<model>-<n>core-<vectors>`` or ``cuda-<GPU>``.

    Machines of one name may offer different vector instructions, and so run different kernels.
    """
    import torch

    if device == "cuda":
        return "cuda-" + slug(torch.cuda.get_device_name())
    capability = slug(torch.backends.cpu.get_cpu_capability())
    return f"cpu-{slug(cpu_model())}-{cores()}core-{capability}"


def _cpu_module() -> dict[str, Any] | str:
    """What camkernels' C++ module says of its build; a sentence where it does not import."""
    try:
        module = importlib.import_module("camkernels._cpu")
    except ImportError as error:
        return f"does not import ({error})"
    names = ("compiler", "simd_level", "openmp")
    facts = {n: getattr(module, n) for n in names if hasattr(module, n)}
    return {n: str(v() if callable(v) else v) for n, v in facts.items()}


def describe(device: str) -> dict[str, Any]:
    """Versions and conditions, read in the measuring process."""
    import torch

    import camkernels
    from camkernels import backends

    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    out: dict[str, Any] = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "triton": _version("triton"),
        "torchvision": _version("torchvision"),
        "numpy": _version("numpy"),
        "camkernels": camkernels.__version__,
        "camkernels_cpu": _cpu_module(),
        "backend": backends.resolve(torch.device(device), torch.float32),
        "commit": _output("git", "rev-parse", "HEAD"),
        "uncommitted_changes": None if changed is None else bool(changed),
        "compiler": (_output("c++", "--version") or "none").splitlines()[0],
        "libc": " ".join(platform.libc_ver()),
        "kernel": platform.release(),
        "cpu": cpu_model(),
        "cores": cores(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load_average_before": os.getloadavg()[0],
        "malloc": {k: v for k, v in os.environ.items() if k.startswith("MALLOC_")},
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties("cuda")
        out["gpu"] = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return out
