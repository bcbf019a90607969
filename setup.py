"""Builds ``camkernels._cpu`` and ``camkernels._cuda``: by pybind11 and ninja, without PyTorch.

Environment:
    CAMKERNELS_CPU   1: fail where the module cannot be built; 0: do not build it; unset: build it
                     where a C++ compiler is found, otherwise install without it and say so.
    CAMKERNELS_CUDA  the same of the CUDA kernels, which need nvcc (11.8 or newer), but no GPU. CI
                     sets 1; tests take it as asking for the module too.
    CAMKERNELS_CUDA_ARCHS  compute capabilities, such as "80;90" (default: those of 75, 80, 90, 100,
                     120 that nvcc knows); PTX of the first and of the last is added.
    CXX              the compiler (default: c++, g++ or clang++, whichever is found first).
    NVCC             nvcc (default: on PATH, in CUDA_HOME, or in /usr/local/cuda).
    CAMKERNELS_VERBOSE  1: show every compiler command.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
CPU, CUDA = "camkernels._cpu", "camkernels._cuda"

# Only these sources see pybind11 and the C++ library; everything else is a kernel and is compiled
# once per instruction set, each in a namespace of its own (see csrc/common/isa.h).
PLAIN_SOURCES = ("bindings_cpu.cpp", "common/simd_level.cpp")
INSTRUCTION_SETS: dict[str, tuple[str, ...]] = {"baseline": ()}
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTION_SETS["avx2"] = ("-mavx2", "-mfma", "-mf16c")
    INSTRUCTION_SETS["avx512"] = (
        *INSTRUCTION_SETS["avx2"],
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mprefer-vector-width=512",
    )
CUDA_ARCHS = ("75", "80", "90", "100", "120")
CUDA_FLAGS = (
    "-std=c++17",
    "-O3",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall",
    "-DCAMKERNELS_ISA=cuda",
)
# Whether nvcc works with the compiler it finds, and has typed launches.
CUDA_PROBE = """#include <cuda_runtime.h>
__global__ void kernel(int) {}
int main() { cudaLaunchConfig_t config = {}; return (int)cudaLaunchKernelEx(&config, kernel, 1); }
"""
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    # Neither changes a result; both are needed to vectorise square roots and selections.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
)


def read_version() -> str:
    """``__version__`` of the package, read as text: importing it would need torch."""
    text = (ROOT / "camkernels" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise RuntimeError('camkernels/__init__.py: no line __version__ = "..."')
    return found.group(1)


class CannotBuildError(Exception):
    """Something that the build needs is missing (not: the code does not compile)."""


def find_compiler() -> list[str]:
    """The C++ compiler as a command."""
    asked = os.environ.get("CXX")
    for command in [asked] if asked else ["c++", "g++", "clang++"]:
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    raise CannotBuildError(
        f"CXX={asked} is not to be found"
        if asked
        else "no C++ compiler (c++, g++, clang++) is to be found; CXX names another"
    )


def find_ninja() -> str:
    """The ninja of the build environment, or that of the system."""
    try:
        import ninja
    except ImportError:
        found = shutil.which("ninja")
    else:
        found = shutil.which("ninja", path=ninja.BIN_DIR) or shutil.which("ninja")
    if not found:
        raise CannotBuildError("ninja is not to be found (pip install ninja)")
    return found


def accepts(compiler: list[str], *flags: str) -> bool:
    """Whether a program of one line compiles and links with these flags."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("int main() { return 0; }\n", encoding="utf-8")
        command = [*compiler, *flags, str(source), "-o", str(Path(folder) / "probe")]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def escape(path: object) -> str:
    """A path as ninja reads it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def shell(words: list[str]) -> str:
    """A command as ninja and the shell read it."""
    return shlex.join(words).replace("$", "$$")


class NinjaFile:
    """The text of a build.ninja that compiles objects and links them to one module."""

    def __init__(self, link: str) -> None:
        self.lines = ["rule link", f"  command = {link}", "  description = link $out"]
        self.objects: list[str] = []

    def rule(self, name: str, command: str) -> None:
        """How a kind of source is compiled; ``command`` writes its dependencies to $out.d."""
        self.lines += [
            f"rule {name}",
            f"  command = {command}",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $out",
        ]

    def add(self, rule: str, source: Path, folder: str, extra: list[str]) -> None:
        """An object of ``source``, in a folder of its own where it is compiled several times."""
        name = f"{folder}/{source.relative_to(CSRC).with_suffix('.o').as_posix()}"
        self.objects.append(name)
        self.lines += [
            f"build {escape(name)}: {rule} {escape(source)}",
            f"  extra = {shell(extra)}",
        ]

    def text(self, target: str) -> str:
        """All of it."""
        objects = " ".join(map(escape, self.objects))
        last = [f"build {escape(target)}: link {objects}", f"default {escape(target)}"]
        return "\n".join([*self.lines, *last]) + "\n"


def binding_includes() -> list[str]:
    """-isystem paths change with every isolated build; only the bindings depend on them."""
    import pybind11

    return ["-isystem" + path for path in (pybind11.get_include(), sysconfig.get_path("include"))]


def cpu_build_file(target: str) -> str:
    """One object per source and instruction set."""
    compiler = find_compiler()
    flags = [*FLAGS, "-I" + str(CSRC)]
    link = ["-shared"]
    if accepts(compiler, "-fopenmp"):
        flags.append("-fopenmp")
        link.append("-fopenmp")
    else:
        print(f"camkernels: {compiler[0]} has no OpenMP; the kernels will use one thread")
    if sys.platform == "darwin":
        link += ["-undefined", "dynamic_lookup"]
    sets = {name: f for name, f in INSTRUCTION_SETS.items() if accepts(compiler, *f)}
    file = NinjaFile(f"{shell(compiler)} $in {shell(link)} -o $out")
    file.rule("compile", f"{shell([*compiler, *flags])} $extra -MMD -MF $out.d -c $in -o $out")
    plain = [*(f"-DCAMKERNELS_HAS_{name.upper()}" for name in sets), *binding_includes()]
    for name in PLAIN_SOURCES:
        file.add("compile", CSRC / name, "plain", plain)
    for source in sorted(CSRC.glob("*/*_cpu.cpp")):
        for name, isa in sets.items():
            defines = [f"-DCAMKERNELS_ISA={name}", f"-DCAMKERNELS_ISA_{name.upper()}"]
            file.add("compile", source, name, [*isa, *defines])
    return file.text(target)


def find_nvcc() -> list[str]:
    """nvcc as a command, one that compiles."""
    asked = os.environ.get("NVCC")
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    candidates = [asked] if asked else ["nvcc", *(f"{home}/bin/nvcc" for home in homes if home)]
    found = next((c for c in candidates if shutil.which(c)), None)
    if found is None:
        what = f"NVCC={asked}" if asked else "nvcc (CUDA's compiler; NVCC or CUDA_HOME names one)"
        raise CannotBuildError(f"{what} is not to be found")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cu"
        source.write_text(CUDA_PROBE, encoding="utf-8")
        command = [found, "-std=c++17", str(source), "-o", str(Path(folder) / "probe")]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        said = (run.stderr or run.stdout).strip().splitlines()
        raise CannotBuildError(f"{found} does not compile a small program: {(said or ['?'])[0]}")
    return [found]


def cuda_archs(nvcc: list[str]) -> list[str]:
    """Compute capabilities to build for."""
    run = subprocess.run([*nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = [word.removeprefix("compute_") for word in run.stdout.split()]
    asked = os.environ.get("CAMKERNELS_CUDA_ARCHS", "").replace(",", ";").replace(".", "")
    wanted = [arch.strip() for arch in asked.split(";") if arch.strip()]
    unknown = [arch for arch in wanted if arch not in known]
    if unknown:
        raise SystemExit(
            f"CAMKERNELS_CUDA_ARCHS: {nvcc[0]} does not know {', '.join(unknown)}; it knows "
            f"{', '.join(known)}"
        )
    return wanted or [arch for arch in CUDA_ARCHS if arch in known]


def cuda_build_file(target: str) -> str:
    """One object per source, with code for every architecture; the CUDA runtime is linked in."""
    nvcc, compiler = find_nvcc(), find_compiler()
    archs = cuda_archs(nvcc)
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    codes += [f"-gencode=arch=compute_{a},code=compute_{a}" for a in sorted({archs[0], archs[-1]})]
    file = NinjaFile(f"{shell(nvcc)} -shared -cudart=static $in -o $out")
    include = "-I" + str(CSRC)
    device = [*nvcc, *CUDA_FLAGS, *codes, include]
    file.rule("device", f"{shell(device)} $extra -MMD -MF $out.d -c $in -o $out")
    file.rule(
        "compile", f"{shell([*compiler, *FLAGS, include])} $extra -MMD -MF $out.d -c $in -o $out"
    )
    names = "sm_" + ", sm_".join(archs)
    defines = [f'-DCAMKERNELS_CUDA_ARCHS="{names} and PTX"']
    file.add("compile", CSRC / "bindings_cuda.cpp", "plain", [*defines, *binding_includes()])
    for source in sorted(CSRC.glob("*/*_cuda.cu")):
        file.add("device", source, "device", [])
    return file.text(target)


# Module: its switch in the environment, its build file, what it is, what there is without it.
MODULES = {
    CPU: (
        "CAMKERNELS_CPU",
        cpu_build_file,
        "the C++ kernels for the CPU",
        "Everything works, by plain PyTorch on the CPU, only slower",
    ),
    CUDA: (
        "CAMKERNELS_CUDA",
        cuda_build_file,
        "the CUDA C++ kernels",
        "Triton kernels run on the GPU in their place",
    ),
}


def write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def install_file(source: Path, target: Path) -> None:
    """Copy under a temporary name, then rename: a running process keeps the file it mapped."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.new")
    shutil.copy2(source, temporary)
    os.replace(temporary, target)


class NinjaBuild(build_ext):
    """Writes build.ninja under build/ and runs it; a second build compiles what changed."""

    def build_extension(self, ext: Extension) -> None:
        switch, build_file, _, _ = MODULES[ext.name]
        wanted = os.environ.get(switch, "")
        if wanted not in ("", "0", "1"):
            raise SystemExit(f"{switch}: expected 0 or 1, got {wanted!r}")
        if wanted == "0":
            self._leave_out(ext, f"{switch}=0")
            return
        target = ext.name.rpartition(".")[2] + sysconfig.get_config_var("EXT_SUFFIX")
        try:
            ninja, text = find_ninja(), build_file(target)
        except CannotBuildError as reason:
            if wanted == "1":
                raise SystemExit(f"camkernels: {switch}=1, but {reason}") from None
            self._leave_out(ext, str(reason))
            return
        install_file(
            self._run_ninja(ext, ninja, text, target), Path(self.get_ext_fullpath(ext.name))
        )

    def _leave_out(self, ext: Extension, reason: str) -> None:
        Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)  # of an earlier build
        _, _, what, without = MODULES[ext.name]
        self.warn(
            f"installing without {ext.name}, {what}: {reason}. {without}; "
            "`python -m camkernels.doctor` shows what is there."
        )

    def _run_ninja(self, ext: Extension, ninja: str, text: str, target: str) -> Path:
        tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        folder = ROOT / "build" / f"ninja{ext.name.rpartition('.')[2]}-{tag}"
        folder.mkdir(parents=True, exist_ok=True)
        write_if_changed(folder / "build.ninja", text)
        command = [ninja, "-C", str(folder)]
        if os.environ.get("CAMKERNELS_VERBOSE") == "1":
            command.append("-v")
        if subprocess.run(command, check=False).returncode != 0:
            switch, _, what, _ = MODULES[ext.name]
            raise SystemExit(
                f"camkernels: {ext.name} did not compile (see above); "
                f"{switch}=0 installs without {what}"
            )
        return folder / target

    def copy_extensions_to_source(self) -> None:
        for ext in self.extensions:
            built = Path(self.build_lib) / self.get_ext_filename(self.get_ext_fullname(ext.name))
            target = ROOT / self.get_ext_filename(ext.name)
            if built.exists():
                install_file(built, target)
            else:
                target.unlink(missing_ok=True)


setup(
    version=read_version(),
    packages=find_packages(include=["camkernels", "camkernels.*"]) + find_packages("python"),
    package_dir={"camtrain": "python/camtrain"},
    package_data={"camkernels": ["py.typed"]},
    ext_modules=[Extension(name, sources=[], optional=True) for name in MODULES],
    cmdclass={"build_ext": NinjaBuild},
    zip_safe=False,
)
