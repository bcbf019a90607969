"""Builds ``camkernels._cpu``: C++ by pybind11 and ninja, without PyTorch.

Environment:
    CAMKERNELS_CPU   1: fail where the module cannot be built; 0: do not build it; unset: build it
                     where a C++ compiler is found, otherwise install without it and say so.
    CXX              the compiler (default: c++, g++ or clang++, whichever is found first).
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
MODULE = "camkernels._cpu"

# Only these sources, and */*_bindings.cpp, see pybind11 and the C++ library; everything else is a
# kernel and is compiled once per instruction set, each in a namespace of its own (see
# csrc/common/isa.h).
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


def build_file(compiler: list[str], target: str) -> str:
    """The text of build.ninja: one object per source and instruction set, one module."""
    import pybind11

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
    # -isystem paths change with every isolated build; only the bindings depend on them.
    includes = [pybind11.get_include(), sysconfig.get_path("include")]
    levels = [f"-DCAMKERNELS_HAS_{name.upper()}" for name in sets]
    plain = [*levels, *("-isystem" + path for path in includes)]

    def escape(path: object) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def shell(words: list[str]) -> str:
        return shlex.join(words).replace("$", "$$")

    lines = [
        f"cxx = {shell(compiler)}",
        f"flags = {shell(flags)}",
        "rule compile",
        "  command = $cxx $flags $extra -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        f"  command = $cxx $in {shell(link)} -o $out",
        "  description = link $out",
    ]
    objects = []

    def add(source: Path, folder: str, extra: list[str]) -> None:
        name = f"{folder}/{source.relative_to(CSRC).with_suffix('.o').as_posix()}"
        objects.append(name)
        lines.append(f"build {escape(name)}: compile {escape(source)}")
        lines.append(f"  extra = {shell(extra)}")

    plain_sources = [CSRC / name for name in PLAIN_SOURCES]
    for source in (*plain_sources, *sorted(CSRC.glob("*/*_bindings.cpp"))):
        add(source, "plain", plain)
    for source in sorted(CSRC.glob("*/*_cpu.cpp")):
        for name, isa in sets.items():
            add(
                source, name, [*isa, f"-DCAMKERNELS_ISA={name}", f"-DCAMKERNELS_ISA_{name.upper()}"]
            )
    lines.append(f"build {escape(target)}: link {' '.join(map(escape, objects))}")
    lines.append(f"default {escape(target)}")
    return "\n".join(lines) + "\n"


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
        wanted = os.environ.get("CAMKERNELS_CPU", "")
        if wanted not in ("", "0", "1"):
            raise SystemExit(f"CAMKERNELS_CPU: expected 0 or 1, got {wanted!r}")
        if wanted == "0":
            self._leave_out(ext, "CAMKERNELS_CPU=0")
            return
        try:
            built = self._run_ninja(find_compiler(), find_ninja())
        except CannotBuildError as reason:
            if wanted == "1":
                raise SystemExit(f"camkernels: CAMKERNELS_CPU=1, but {reason}") from None
            self._leave_out(ext, str(reason))
            return
        install_file(built, Path(self.get_ext_fullpath(ext.name)))

    def _leave_out(self, ext: Extension, reason: str) -> None:
        Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)  # of an earlier build
        self.warn(
            f"installing without {ext.name}, the C++ kernels for the CPU: {reason}. "
            "Everything works, by plain PyTorch on the CPU, only slower; "
            "`python -m camkernels.doctor` shows what is there."
        )

    def _run_ninja(self, compiler: list[str], ninja: str) -> Path:
        tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        folder = ROOT / "build" / f"ninja-{tag}"
        folder.mkdir(parents=True, exist_ok=True)
        target = MODULE.rpartition(".")[2] + sysconfig.get_config_var("EXT_SUFFIX")
        write_if_changed(folder / "build.ninja", build_file(compiler, target))
        command = [ninja, "-C", str(folder)]
        if os.environ.get("CAMKERNELS_VERBOSE") == "1":
            command.append("-v")
        if subprocess.run(command, check=False).returncode != 0:
            raise SystemExit(
                f"camkernels: {MODULE} did not compile (see above); "
                "CAMKERNELS_CPU=0 installs without the C++ kernels"
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
    ext_modules=[Extension(MODULE, sources=[], optional=True)],
    cmdclass={"build_ext": NinjaBuild},
    zip_safe=False,
)
