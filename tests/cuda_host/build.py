"""Builds camkernels._cuda for the host: the .cu files by g++ and this folder's headers.

``load()`` compiles what changed (under build/cuda_host) and imports it under the name of the real
module, so that backend ``cuda`` takes CPU tensors in this process.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
FOLDER = ROOT / "build" / "cuda_host"
FLAGS = (
    "-std=c++17 -O2 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-unknown-pragmas "
    # a longjmp between stacks is what the fibres are
    "-U_FORTIFY_SOURCE -DCAMKERNELS_HOST -DCAMKERNELS_ISA=cuda -x c++"
)


def unavailable_reason() -> str | None:
    """Why the host build cannot be made here."""
    for tool in ("g++", "ninja"):
        if shutil.which(tool, path=_path()) is None:
            return f"{tool} is not to be found"
    return None


def _path() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def _ninja() -> str:
    found = shutil.which("ninja", path=_path())
    assert found is not None
    return found


def sources() -> list[Path]:
    own = [HERE / name for name in ("host.cpp", "host_bindings.cpp", "probe.cu")]
    return [CSRC / "bindings_cuda.cpp", *sorted(CSRC.glob("*/*_cuda.cu")), *own]


def unchanged(csrc: Path) -> dict[Path, Path]:
    """Sources of which no file differs in the copy ``csrc``, and their objects under FOLDER."""
    run = subprocess.run(
        [_ninja(), "-C", str(FOLDER), "-t", "deps"], capture_output=True, text=True, check=True
    )
    found = {}
    for part in run.stdout.split("\n\n"):
        head, *lines = part.splitlines() or [""]
        files = [Path(line.strip()) for line in lines]
        own = [f for f in files if f.is_relative_to(CSRC)]
        if files and all((csrc / f.relative_to(CSRC)).read_bytes() == f.read_bytes() for f in own):
            found[files[0]] = FOLDER / head.partition(":")[0]
    return found


def build(folder: Path = FOLDER, csrc: Path = CSRC) -> Path:
    """The compiled module; ``csrc`` may be a copy with a fault in it: what does not see the fault
    is taken from the build without it."""
    import pybind11

    ready = {}
    if csrc != CSRC:
        build()
        ready = unchanged(csrc)

    folder.mkdir(parents=True, exist_ok=True)
    target = folder / ("_cuda" + sysconfig.get_config_var("EXT_SUFFIX"))
    includes = [HERE, csrc, pybind11.get_include(), sysconfig.get_path("include")]
    lines = [
        f"flags = {FLAGS} {' '.join(f'-I{path}' for path in includes)}",
        "rule compile",
        "  command = g++ $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = g++ -shared $in -o $out",
    ]
    objects = []
    for source in sources():
        if source in ready:
            objects.append(str(ready[source]))
            continue
        if source.is_relative_to(CSRC):
            source = csrc / source.relative_to(CSRC)
        objects.append(f"{source.parent.name}_{source.stem}.o")
        lines.append(f"build {objects[-1]}: compile {source}")
    lines.append(f"build {target.name}: link {' '.join(objects)}")
    text = "\n".join(lines) + "\n"
    file = folder / "build.ninja"
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
    run = subprocess.run([_ninja(), "-C", str(folder)], capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise RuntimeError(f"the host build of the CUDA kernels failed:\n{run.stdout[-6000:]}")
    return target


def load(path: Path | None = None) -> ModuleType:
    """The host build (made now where no path is given) as ``camkernels._cuda`` of this process."""
    import camkernels

    name = "camkernels._cuda"
    spec = importlib.util.spec_from_file_location(name, path or build())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    camkernels._cuda = module  # type: ignore[attr-defined]
    return module


if __name__ == "__main__":
    print(build())
