"""The table of compiled kernels: how it is made, and that kernels are no worse than it says."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import kernels, kernels_cuda, kernels_table
from benchmarks.kernels_limits import LIMITS, occupancy
from camkernels import backends

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not to be found")


# ---- occupancy ----


def test_known_occupancies() -> None:
    full = occupancy(90, 32, 0, 8)
    assert (full.warps, full.share, full.bound) == (64, 1.0, "warps")
    assert occupancy(90, 128, 0, 4).warps == 16
    # three blocks of 256 threads share 65536 registers: csrc/common/launch.cuh
    assert [occupancy(c, 80, 0, 8).blocks for c in LIMITS] == [3] * len(LIMITS)
    assert occupancy(75, 32, 40 * 1024, 4).bound == "shared memory"
    assert occupancy(120, 16, 0, 1).bound == "blocks"
    assert occupancy(120, 16, 200 * 1024, 4).blocks == 0


def _header() -> Path | None:
    nvcc = shutil.which("nvcc")
    places = [Path("/usr/local/cuda/include")]
    places += [Path(nvcc).resolve().parents[1] / "include"] if nvcc else []
    if (spec := importlib.util.find_spec("triton")) is not None and spec.origin is not None:
        places.append(Path(spec.origin).parent / "backends" / "nvidia" / "include")
    return next((p for p in places if (p / "cuda_occupancy.h").exists()), None)


@needs_compiler
@pytest.mark.skipif(_header() is None, reason="cuda_occupancy.h is not to be found")
def test_occupancies_are_those_of_cudas_own_header(tmp_path: Path) -> None:
    program = tmp_path / "occupancy"
    command = ["g++", f"-I{_header()}", str(HERE / "occupancy.cpp"), "-o", str(program)]
    subprocess.run(command, check=True)
    asked, expected = [], []
    sizes = (0, 100, 9472, 28736, 49000, 66000, 99 * 1024)
    for (c, limits), registers, shared, warps in itertools.product(
        LIMITS.items(), (16, 32, 40, 80, 96, 128, 200, 255), sizes, (1, 4, 8, 16)
    ):
        asked.append(
            f"{c // 10} {c % 10} {limits.warps} {limits.shared} {limits.shared_of_block} "
            f"{limits.shared_kept} {registers} {shared} {32 * warps}"
        )
        expected.append(occupancy(c, registers, shared, warps).blocks)
    run = subprocess.run(
        [str(program)], input="\n".join(asked), capture_output=True, text=True, check=True
    )
    found = list(map(int, run.stdout.split()))
    assert [(a, f, e) for a, f, e in zip(asked, found, expected, strict=True) if f != e] == []


@pytest.mark.slow
@needs_compiler
def test_shared_memory_of_cuda_kernels_is_that_of_the_sources(tmp_path: Path) -> None:
    per_file = {
        "cam/cam_cuda.cu": {"kForwardBytes": "cam_fwd", "kBackwardBytes": "cam_bwd"},
        "cam_statistics/cam_statistics_cuda.cu": {
            "kForwardBytes": "cam_statistics_fwd", "kBackwardBytes": "cam_statistics_bwd",
        },
        "map_statistics/map_statistics_cuda.cu": {
            "kStatisticsFloats * (int)sizeof(float)": "map_statistics_fwd",
        },
        "ssim/ssim_cuda.cu": {"kBytes": "ssim_fwd"},
        "warped_ssim/warped_ssim_cuda.cu": {"kBytes": "warped_ssim_fwd"},
    }  # fmt: skip
    flags = ["-std=c++17", "-fsyntax-only", "-DCAMKERNELS_HOST", "-DCAMKERNELS_ISA=cuda", "-w"]
    folders = [f"-I{ROOT / 'tests' / 'cuda_host'}", f"-I{ROOT / 'csrc'}"]
    for i, (file, sizes) in enumerate(per_file.items()):
        lines = [f'#include "{file}"', "namespace camkernels { namespace cuda {"]
        for expression, kernel in sizes.items():
            size = kernels_cuda.SHARED[f"{kernel}_kernel"]
            lines.append(f'static_assert({expression} == {size}, "{kernel}");')
        source = tmp_path / f"{i}.cpp"
        source.write_text("\n".join([*lines, "} }"]))
        done = subprocess.run(
            ["g++", *flags, *folders, str(source)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[:2000]


# ---- the parsers and the guard ----


@needs_triton
def test_widths_of_loads_and_stores_are_read_from_ptx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "ops"))
    triton_aot = importlib.import_module("triton_aot")
    ptx = """
        @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
        ld.global.L1::evict_last.v2.b64 { %rd3, %rd4 }, [ %rd5 ];
        ld.global.nc.b16 %rs1, [ %rd2 ];
        cp.async.cg.shared.global [ %r5 + 0 ], [ %rd6 + 0 ], 0x10, %r6;
        cp.async.ca.shared.global.L2::64B [ %r5 ], [ %rd6 ], 4, 4;
        st.global.v2.b32 [ %rd1 ], { %r1, %r2 };
        st.shared.v4.b32 [ %r9 ], { %r1, %r2, %r3, %r4 };
        ld.param.b64 %rd1, [p];
    """
    assert triton_aot.widths(ptx, "ld") == {"16": 3, "4": 1, "2": 1}
    assert triton_aot.widths(ptx, "st") == {"8": 1}


def record(**changes: Any) -> dict[str, Any]:
    case = {"op": "relu", "shape": [2, 3, 4, 4], "dtype": "float32", "layout": "nchw",
            "pooled": True, "wanted": "both", "relu": True}  # fmt: skip
    return {
        "kernel": "relu_fwd_kernel", "case": case, "capability": 90, "constants": {"BLOCK": 1024},
        "missing": [], "registers": 40, "shared_bytes": 0, "local_bytes": 8, "warps": 4,
        "load_widths": {"16": 4}, "store_widths": {"16": 2}, **changes,
    }  # fmt: skip


def test_the_guard_sees_what_is_worse() -> None:
    rows = kernels.merged({90: [record()]})
    assert kernels.regressions([record()], rows) == []
    assert kernels.regressions([record(registers=48, local_bytes=0)], rows) == []
    for changes, message in (
        ({"registers": 49}, "49 registers, 40 in the table"),
        ({"local_bytes": 16}, "16 bytes spilled, 8 in the table"),
        ({"load_widths": {"4": 16}}, "load_widths"),
        ({"store_widths": {"16": 1, "4": 4}}, "store_widths"),
        ({"constants": {"BLOCK": 2048}}, "not in the table"),
    ):
        (found,) = kernels.regressions([record(**changes)], rows)
        assert message in found
    broken = {k: v for k, v in record().items() if k not in kernels.FIGURES}
    (found,) = kernels.regressions([{**broken, "error": "ptxas fatal"}], rows)
    assert "does not compile any more: ptxas fatal" in found


def test_one_name_for_every_capability() -> None:
    """Twins in all but alignment are numbered; what shares its code elsewhere has no row of its
    own where it fails."""
    failing = {k: v for k, v in record(capability=75).items() if k not in kernels.FIGURES}
    failing["error"] = "no bfloat16"
    other = copy.deepcopy(failing)
    other["constants"]["BLOCK"] = 512
    rows = kernels.merged({75: [failing, other], 90: [record(), record(registers=41)]})
    assert [row["sm"].keys() for row in rows.values()] == [{"90", "75"}, {"90"}]
    assert list(rows)[1] == f"{next(iter(rows))} #2"
    table = {"versions": {"triton": "3"}, "capabilities": [75, 90], "cuda_capabilities": [],
             "triton": rows, "cuda": {}}  # fmt: skip
    text = kernels_table.markdown(table)
    assert "- sm_75: relu_fwd_kernel (float32): no bfloat16" in text
    assert "| 40 / 0 -> 48, spill 8 |" in text


def test_a_capability_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[int] = []

    def compile_group(capability: int, group: str) -> dict[str, Any]:
        compiled.append(capability)
        return {"compiled": [record(capability=capability)]}

    monkeypatch.setattr(kernels, "compile_group", compile_group)
    for _ in range(2):
        for capability in (90, 80):
            kernels.compiled(capability, tmp_path)
    assert compiled == [90, 80]
    monkeypatch.setattr(kernels, "_fingerprint", lambda: "of other sources")
    kernels.compiled(80, tmp_path)
    assert compiled == [90, 80, 80]


# ---- against the committed table ----


def committed() -> dict[str, Any]:
    return kernels.load()


def same_triton() -> None:
    written, here = committed()["versions"]["triton"], kernels.environment._version("triton")
    if written != here:
        pytest.skip(f"the table is of Triton {written}, here is {here}")


@needs_triton
def test_the_table_has_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "ops"))
    triton_aot = importlib.import_module("triton_aot")
    table = committed()
    assert table["capabilities"] == sorted(LIMITS)
    for capability in table["capabilities"]:
        rows = [row for row in table["triton"].values() if str(capability) in row["sm"]]
        assert {row["kernel"] for row in rows} == set(triton_aot.kernels())
    assert {row["kernel"] for row in table["cuda"].values()} == set(kernels_cuda.SHARED)
    assert table["cuda_capabilities"] == sorted(LIMITS)
    assert kernels.FILE.with_suffix(".md").read_text() == kernels_table.markdown(table)


@needs_triton
@pytest.mark.skipif(backends.triton_interpreted(), reason="compiles outside of the interpreter")
@pytest.mark.slow  # tests/ops/test_triton_compile.py sees spills and widths in every run
def test_a_few_kernels_are_no_worse_than_the_table() -> None:
    same_triton()
    found = kernels.compile_group(90, "few")["compiled"]
    assert len({r["kernel"] for r in found}) >= 9
    assert kernels.regressions(found, committed()["triton"]) == []


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("capability", kernels.CAPABILITIES)
def test_every_kernel_is_no_worse_than_the_table(capability: int) -> None:
    same_triton()
    found = kernels.compile_group(capability, "table")["compiled"]
    assert kernels.regressions(found, committed()["triton"]) == []


@pytest.mark.slow  # tests/cuda_host/test_cuda_compile.py has limits for every run
@pytest.mark.skipif(
    backends.cuda_on_host() or kernels.module_path() is None, reason="no CUDA module is built"
)
@pytest.mark.skipif(kernels_cuda.tool() is None, reason="triton brings cuobjdump")
def test_cuda_kernels_are_no_worse_than_the_table() -> None:
    module = kernels.module_path()
    assert module is not None
    table, here = committed(), kernels.versions(module)
    if table["versions"]["cuda runtime"] != here["cuda runtime"]:
        pytest.skip("the table is of another nvcc")
    capabilities = set(kernels_cuda.archs(module)) & set(table["cuda_capabilities"])
    assert capabilities, "the table and the module have no architecture in common"
    for capability in sorted(capabilities):
        found = kernels_cuda.records(module, capability)
        assert len(found) > 20
        assert kernels.regressions(found, table["cuda"]) == []
