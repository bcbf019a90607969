"""The stages of ``make gpu``; see gpu.py."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 480
"""Seconds that no stage may go beyond."""
OUTPUT = "{output}"
"""In a command: the folder whose files are the stage's results."""
GIGABYTES = (11, 24)
CUDA_MEMBERS: dict[str, tuple[str, ...]] = {
    "relu": (),
    "cam": (),
    "map_statistics": (),
    "cam_statistics": (),
    "consistency": (),
    "map_ops": ("ssim",),
}
"""Benchmarks of the ops that have CUDA kernels; of their cases those named, or all."""
PYTHON = sys.executable


@dataclass(frozen=True)
class Stage:
    """A command; ``missing``: why it cannot run here; ``always``: it runs at every call, and
    without it nothing else does."""

    name: str
    about: str
    words: Sequence[str]
    seconds: float = LIMIT
    environment: Mapping[str, str] = field(default_factory=dict)
    missing: str | None = None
    always: bool = False

    def command(self, output: Path) -> list[str]:
        return [str(output) if word == OUTPUT else word for word in self.words]


def _pytest(*words: str, workers: int = 4) -> list[str]:
    shared = ["-n", str(workers)] if workers > 1 and importlib.util.find_spec("xdist") else []
    return [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", *shared, *words]


def _architecture() -> dict[str, str]:
    """nvcc need not build for any other GPU than this one."""
    try:
        import torch
    except ImportError:
        return {}
    if not torch.cuda.is_available():
        return {}
    major, minor = torch.cuda.get_device_capability()
    return {"CAMKERNELS_CUDA_ARCHS": f"{major}{minor}"}


def _set_up() -> list[Stage]:
    # Editable: `python -m` and pytest import the working tree, where the modules must lie.
    install = [PYTHON, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index",
               "--editable", "."]  # fmt: skip
    return [
        Stage("build", "the C++ and CUDA kernels, without a network", install,
              environment=_architecture(), always=True),
        Stage("doctor", "which backends work", [PYTHON, "-m", "camkernels.doctor"], 240),
    ]  # fmt: skip


def _tests() -> list[Stage]:
    """One file a stage. Of the ops' tests what runs on a GPU: backends triton and cuda."""
    tests = ROOT / "tests"
    found = []
    for path in sorted([*tests.glob("gpu/test_*.py"), tests / "viz" / "test_overlays.py"]):
        # One process: some of these measure or limit the memory of the GPU.
        words = _pytest(str(path.relative_to(ROOT)), "-m", "gpu", workers=1)
        found.append(Stage(f"gpu-{path.stem[5:]}", f"tests marked gpu of {path.name}", words))
    cuda = _pytest("tests/cuda_host/test_cuda_kernels.py", "-m", "not slow")
    found.append(Stage("cuda-kernels", "the CUDA kernels' own tests", cuda))
    for path in sorted(tests.glob("ops/test_*.py")):
        if path.stem in ("test_triton_compile", "test_mutations"):
            continue  # compile for GPUs that are not here; break kernels on the CPU
        words = _pytest(str(path.relative_to(ROOT)), "-m", "not slow", "-k", "triton or cuda")
        # pytest gives 5 where a file has no such test
        quiet = ["sh", "-c", '"$@"; code=$?; [ $code -eq 5 ] && exit 0; exit $code', "sh"]
        found.append(Stage(f"ops-{path.stem[5:]}", f"{path.name} on the GPU", [*quiet, *words]))
    return found


def _sanitizers() -> list[Stage]:
    """memcheck and racecheck over every kernel."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    places = ["compute-sanitizer", *(f"{home}/bin/compute-sanitizer" for home in homes if home)]
    tool = next((found for p in places if (found := shutil.which(p))), None)
    missing = None if tool else "compute-sanitizer is not to be found (PATH, CUDA_HOME)"
    out = []
    for check in ("memcheck", "racecheck"):
        for backend in ("cuda", "triton"):
            words = [tool or "compute-sanitizer", "--tool", check, "--error-exitcode", "9",
                     "--target-processes", "application-only", PYTHON, "tests/gpu/exercise.py",
                     "--device", "cuda", "--backend", backend, "--small"]  # fmt: skip
            # else an access beyond a tensor falls into the same block of PyTorch's
            settings = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            about = f"compute-sanitizer {check} over every kernel of {backend}"
            out.append(Stage(f"{check}-{backend}", about, words, LIMIT, settings, missing))
    return out


def _benchmarks() -> list[Stage]:
    from benchmarks.members import MEMBERS

    out = []
    for name, member in MEMBERS.items():
        words = [PYTHON, "-m", "benchmarks", "run", name, "--device", "cuda", "--output", OUTPUT]
        if member.isolate:  # many cases and sides, each measured in two processes
            words += ["--seconds", "5"]
        out.append(Stage(f"bench-{name}", member.about, words))
        if name in CUDA_MEMBERS:  # auto takes Triton
            named = [word for case in CUDA_MEMBERS[name] for word in ("--case", case)]
            settings = {"CAMKERNELS_BACKEND": "cuda"}
            about = f"{member.about}, by the CUDA C++ kernels"
            out.append(Stage(f"bench-{name}-cuda", about, [*words, *named], LIMIT, settings))
    for size in GIGABYTES:
        words = [PYTHON, "-m", "benchmarks.largest", "--gigabytes", str(size), "--output", OUTPUT]
        out.append(Stage(f"largest-{size}", f"largest batches really run within {size} GB", words))
    return out


def stages() -> list[Stage]:
    """All, what is quick and what others build upon first."""
    tests = _tests()
    own = [s for s in tests if not s.name.startswith("ops-")]
    ops = [s for s in tests if s.name.startswith("ops-")]
    return [*_set_up(), *own, *_benchmarks(), *_sanitizers(), *ops]
