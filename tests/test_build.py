"""The C++ module: how it was built, which width runs, whose threads it uses."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

import pytest
import torch

import camkernels
from camkernels.ops import _cpu_view

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("camkernels._cpu") is None,
    reason="installed without camkernels._cpu (CAMKERNELS_CPU=1 pip install . shows why)",
)

# Prints the outputs of all three ops, forward and backward, as JSON.
PROGRAM = """
import json, sys, torch, camkernels as ck
from camkernels import _cpu
ck.backend("cpu")
torch.manual_seed(0)
values = []
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for memory_format in (torch.contiguous_format, torch.channels_last):
        a = torch.rand(3, 70, 5, 7).to(dtype).contiguous(memory_format=memory_format)
        g = torch.randn(3, 70, 5, 7).to(dtype).requires_grad_()
        a.requires_grad_()
        statistics, maps = ck.cam_statistics(a, g, return_maps=True)
        loss = maps.square().mean() + sum(s.square().mean() for s in statistics)
        values += [x.double().flatten().tolist() for x in (maps, *statistics)]
        values += [x.double().flatten().tolist() for x in torch.autograd.grad(loss, (a, g))]
json.dump({"level": _cpu.simd_level(), "values": values}, sys.stdout)
"""


def run_python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def available_levels() -> list[str]:
    from camkernels import _cpu

    levels = ["baseline", "avx2", "avx512"]
    if os.environ.get("CAMKERNELS_SIMD"):
        return [_cpu.simd_level()]
    return levels[: levels.index(_cpu.simd_level()) + 1]


def test_version_is_read_as_text() -> None:
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert "import camkernels" not in text
    source = (ROOT / "camkernels" / "__init__.py").read_text(encoding="utf-8")
    assert re.findall(r'^__version__ = "([^"]+)"$', source, re.M) == [camkernels.__version__]


def test_extension_needs_no_torch() -> None:
    from camkernels import _cpu

    program = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('camkernels._cpu', {_cpu.__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert 'torch' not in sys.modules\n"
        "print(module.simd_level())\n"
    )
    done = run_python(program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == _cpu.simd_level()


def test_every_width_gives_the_same() -> None:
    results = {}
    for level in available_levels():
        done = run_python(PROGRAM, CAMKERNELS_SIMD=level)
        assert done.returncode == 0, done.stderr
        results[level] = json.loads(done.stdout)
        assert results[level]["level"] == level
    expected = results["baseline"]["values"] if "baseline" in results else None
    for result in results.values():
        for got, wanted in zip(result["values"], expected or result["values"], strict=True):
            wanted_tensor = torch.tensor(wanted, dtype=torch.float64)
            # The width changes the order of a float32 sum, and so the rounding to 16 bits.
            scale = float(wanted_tensor.abs().max())
            torch.testing.assert_close(
                torch.tensor(got, dtype=torch.float64), wanted_tensor, rtol=1e-2, atol=1e-4 * scale
            )
            assert scale > 0


def test_unknown_width_raises() -> None:
    done = run_python("from camkernels import _cpu", CAMKERNELS_SIMD="sse9")
    assert done.returncode != 0
    assert "unknown level 'sse9', allowed are baseline, avx2, avx512" in done.stderr


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps")
def test_one_openmp_runtime() -> None:
    program = (
        "import torch, camkernels as ck\n"
        "with ck.backend('cpu'):\n"
        "    ck.grad_cam(torch.rand(8, 64, 14, 14), torch.rand(8, 64, 14, 14))\n"
        "for line in open('/proc/self/maps'):\n"
        "    print(line.split()[-1])\n"
    )
    done = run_python(program)
    assert done.returncode == 0, done.stderr
    mapped = {Path(line).name for line in done.stdout.splitlines() if line.startswith("/")}
    runtimes = {name for name in mapped if re.match(r"lib(gomp|omp|iomp5)[-.]", name)}
    assert any(name.startswith("_cpu.") for name in mapped)
    if {name for name in runtimes if re.match(r"libgomp-[0-9a-f]+", name)}:
        pytest.skip("this torch bundles its OpenMP runtime under a name of its own")
    assert len(runtimes) == 1, runtimes


@pytest.mark.slow
def test_set_num_threads_governs() -> None:
    """Counts the threads that exist after large calls under torch.set_num_threads."""
    program = (
        "import os, torch, camkernels as ck\n"
        "torch.set_num_threads({threads})\n"
        "a, weights = torch.empty(64, 64, 14, 14), torch.empty(64, 64)  # filling starts a team\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "with ck.backend('cpu'):\n"
        "    maps = ck.class_activation_map(a, weights)\n"
        "print(len(os.listdir('/proc/self/task')) - before)\n"
    )
    if not Path("/proc/self/task").exists():
        pytest.skip("needs /proc/self/task")
    from camkernels import _cpu

    if not _cpu.openmp():
        pytest.skip("built without OpenMP")
    for threads in (1, 3):
        done = run_python(program.format(threads=threads))
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) == threads - 1


def test_little_work_stays_on_one_thread() -> None:
    assert _cpu_view.threads(100) == 1
    assert _cpu_view.threads(1 << 24) == torch.get_num_threads()


def test_kernels_release_the_gil() -> None:
    a = torch.zeros(1).expand(64, 1 << 15, 32, 32)  # no memory, much work
    weights = torch.zeros(1).expand(64, 1 << 15)
    previous = torch.get_num_threads()
    torch.set_num_threads(1)
    ticks, done = [], threading.Event()

    def tick() -> None:
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    try:
        thread.start()
        with camkernels.backend("cpu"):
            begin = time.perf_counter()
            camkernels.class_activation_map(a, weights)
            end = time.perf_counter()
    finally:
        done.set()
        thread.join()
        torch.set_num_threads(previous)
    inside = [t for t in ticks if begin < t < end]
    assert end - begin > 0.05
    # With the GIL held the other thread would stand still but for the edges of the call.
    assert inside, "no tick while the kernel ran"
    assert max(inside) - min(inside) > (end - begin) / 2


@pytest.mark.parametrize("batch", [1, 2, 20, 64, 1000])
@pytest.mark.parametrize("channels", [1, 63, 64, 130, 512, 2048, 5000])
def test_blocks_cover_all_channels(batch: int, channels: int) -> None:
    block = _cpu_view.channel_block(batch, channels)
    blocks = -(-channels // block)
    assert (blocks - 1) * block < channels <= blocks * block
    assert block % 16 == 0
    assert blocks == 1 or block >= 64 or channels // blocks >= 32


def setup_program(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``code`` after setup.py's definitions, whose last statement is left out."""
    program = (
        f"path, code = {str(ROOT / 'setup.py')!r}, {code!r}\n"
        "text = open(path, encoding='utf-8').read()\n"
        "names = {'__file__': path, '__name__': 'setup'}\n"
        "exec(compile(text[: text.index('\\nsetup(\\n')], path, 'exec'), names)\n"
        "exec(code, names)\n"
    )
    return run_python(program, **environment)


def test_without_nvcc_the_reason_is_told(tmp_path: Path) -> None:
    code = "try: find_nvcc()\nexcept CannotBuildError as error: print(error)"
    run = setup_program(code, NVCC=str(tmp_path / "nvcc"))
    assert "is not to be found" in run.stdout, run.stderr
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\necho no host compiler >&2\nexit 1\n")
    broken.chmod(0o755)
    run = setup_program(code, NVCC=str(broken))
    assert "does not compile a small program: no host compiler" in run.stdout, run.stderr


def test_architectures_are_those_that_nvcc_knows(tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\nprintf 'compute_75\\ncompute_80\\ncompute_90\\n'\n")
    nvcc.chmod(0o755)
    code = f"print(cuda_archs([{str(nvcc)!r}]))"
    assert "['75', '80', '90']" in setup_program(code, CAMKERNELS_CUDA_ARCHS="").stdout
    assert "['80', '90']" in setup_program(code, CAMKERNELS_CUDA_ARCHS="8.0;9.0").stdout
    assert "does not know 61" in setup_program(code, CAMKERNELS_CUDA_ARCHS="61").stderr


def test_the_cuda_build_has_code_for_every_architecture_and_ptx(tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    known = "".join(f"compute_{n}\\n" for n in (75, 80, 86, 90, 100, 110, 120))
    nvcc.write_text(f'#!/bin/sh\n[ "$1" != --list-gpu-arch ] || printf "{known}"\n')
    nvcc.chmod(0o755)
    settings = {"NVCC": str(nvcc), "CAMKERNELS_CUDA_ARCHS": ""}
    run = setup_program("print(cuda_build_file('module.so'))", **settings)
    assert run.returncode == 0, run.stderr
    rules = dict(re.findall(r"rule (\w+)\n  command = (.*)", run.stdout))
    codes = re.findall(r"-gencode=arch=compute_(\d+),code=(\w+)", rules["device"])
    machine = ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120"]
    assert sorted(code for _, code in codes) == sorted([*machine, "compute_75", "compute_120"])
    assert all(code.endswith(f"_{arch}") for arch, code in codes)
    assert "-cudart=static" in rules["link"]
    kernels = {p.stem for p in (ROOT / "csrc").glob("*/*_cuda.cu")}
    assert set(re.findall(r"build device/\w+/(\w+)\.o: device ", run.stdout)) == kernels


@pytest.mark.parametrize("asked", ["1", "0", ""])
def test_without_nvcc_the_build_fails_only_where_it_is_told_to(tmp_path: Path, asked: str) -> None:
    """What an earlier build left is taken away; otherwise it would pass for that of this one."""
    left = tmp_path / "camkernels" / ("_cuda" + sysconfig.get_config_var("EXT_SUFFIX"))
    left.parent.mkdir()
    left.touch()
    missing = str(tmp_path / "nvcc")
    run = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path)],
        env={**os.environ, "CAMKERNELS_CPU": "0", "CAMKERNELS_CUDA": asked, "NVCC": missing},
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    told = run.stdout + run.stderr
    assert (run.returncode != 0) == (asked == "1"), told
    if asked == "1":
        assert f"CAMKERNELS_CUDA=1, but NVCC={missing} is not to be found" in told
        return
    why = "CAMKERNELS_CUDA=0" if asked else f"NVCC={missing} is not to be found"
    assert f"without camkernels._cuda, the CUDA C++ kernels: {why}" in told
    assert not left.exists()


@pytest.mark.parametrize(("given", "expected"), [(None, "1"), ("1", "1"), ("0", "0")])
def test_ci_wants_the_cuda_kernels_unless_told_otherwise(
    tmp_path: Path, given: str | None, expected: str
) -> None:
    make = tmp_path / "make"
    make.write_text('#!/bin/sh\necho "$@ $CAMKERNELS_CUDA"\n')
    nvcc = tmp_path / "nvcc"
    nvcc.touch()
    for tool in (make, nvcc):
        tool.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k != "CAMKERNELS_CUDA"}
    environment["PATH"] = f"{tmp_path}{os.pathsep}{environment['PATH']}"
    if given is not None:
        environment["CAMKERNELS_CUDA"] = given
    run = subprocess.run(
        ["bash", str(ROOT / ".ci" / "run")], env=environment, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert run.stdout == f"test {expected}\n"


def test_the_cuda_module_imports_without_a_gpu_and_needs_no_torch() -> None:
    spec = importlib.util.find_spec("camkernels._cuda")
    if spec is None and os.environ.get("CAMKERNELS_CUDA") != "1":
        pytest.skip("installed without camkernels._cuda (CAMKERNELS_CUDA=1 shows why)")
    assert spec is not None, "CAMKERNELS_CUDA=1, but camkernels._cuda is not there"
    program = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('camkernels._cuda', {spec.origin!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert 'torch' not in sys.modules\n"
        "print(module.archs, module.versions()[1])\n"
    )
    run = run_python(program)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("sm_")
    needed = subprocess.run(
        ["ldd", str(spec.origin)], capture_output=True, text=True, check=True
    ).stdout
    assert "cudart" not in needed  # linked in
