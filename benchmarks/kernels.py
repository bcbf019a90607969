"""What the compilers made of every kernel: ``python -m benchmarks.kernels``.

    python -m benchmarks.kernels [--capability 90 ...] [--no-write]

Compiles every Triton kernel for each capability (tests/ops/triton_aot.py, in processes of its own)
and reads the CUDA module; nothing needs a GPU. What a capability's compilation gave is kept in
build/kernels until the sources or Triton change, so that a run that is cut off goes on where it
was. Writes benchmarks/results/kernels.json and kernels.md.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import environment, kernels_cuda, results
from benchmarks.kernels_limits import LIMITS

ROOT = environment.ROOT
HELPER = ROOT / "tests" / "ops" / "triton_aot.py"
CACHE = ROOT / "build" / "kernels"
FILE = results.FOLDER / "kernels.json"
CAPABILITIES = tuple(LIMITS)
MAIN = 90
"""Whose kernels name the rows; compiled first."""
SCHEMA = 1
Record = dict[str, Any]


# --- compiling ----------------------------------------------------------------------------------


def compile_group(capability: int, group: str, timeout: float = 7200) -> dict[str, Any]:
    """Records of triton_aot.py, from a process that does not interpret."""
    settings = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", str(HELPER), str(capability), group]
    done = subprocess.run(
        command, env=settings, capture_output=True, text=True, timeout=timeout, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"sm_{capability}: {done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


_OF_OTHER_BACKENDS = ("cuda", "cpu", "_cuda_launch", "_cpu_view")


def _fingerprint() -> str:
    """Of what a compilation depends on."""
    digest = hashlib.sha256(str(environment._version("triton")).encode())
    sources = [*(ROOT / "camkernels" / "ops").rglob("*.py"), *HELPER.parent.glob("triton_*.py")]
    for path in sorted(sources):
        if not path.stem.endswith(_OF_OTHER_BACKENDS):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def compiled(capability: int, cache: Path = CACHE) -> dict[str, Any]:
    """All kernels of one capability, compiled now unless an earlier run did."""
    path, fingerprint = cache / f"sm_{capability}.json", _fingerprint()
    if path.exists():
        kept: dict[str, Any] = json.loads(path.read_text())
        if kept["fingerprint"] == fingerprint:
            return kept
    found = {**compile_group(capability, "table"), "fingerprint": fingerprint}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found))
    return found


def module_path() -> Path | None:
    """The built CUDA module."""
    spec = importlib.util.find_spec("camkernels._cuda")
    return None if spec is None or spec.origin is None else Path(spec.origin)


# --- one table ----------------------------------------------------------------------------------


def describe_case(case: Record) -> str:
    """``cam 2x512x28x28 channels_last``, and which of the case's options are set."""
    if "shape" not in case:
        return str(case["op"])
    words = [case["op"], "x".join(map(str, case["shape"])), case["layout"]]
    words += [] if case["pooled"] else ["other form"]
    words += [] if case["wanted"] == "both" else [f"to {case['wanted']}"]
    words += [] if case["relu"] else ["no ReLU"]
    return " ".join(words)


def describe_variant(record: Record) -> str:
    """Compile-time constants, and the arguments that are not there."""
    words = []
    for name, value in record["constants"].items():
        if isinstance(value, bool):
            words += [name] if value else []
        else:
            words.append(f"{name}={value}")
    return " ".join([*words, *(f"no {name}" for name in record["missing"])])


def identified(records: Iterable[Record]) -> Iterator[tuple[str, Record]]:
    """Records with a name that is the same for every capability; a number tells apart what differs
    in alignment alone."""
    seen: dict[str, int] = {}
    for record in records:
        words = (record["kernel"], record["case"]["dtype"], describe_case(record["case"]),
                 describe_variant(record))  # fmt: skip
        name = " | ".join(words)
        seen[name] = seen.get(name, 0) + 1
        yield name if seen[name] == 1 else f"{name} #{seen[name]}", record


FIGURES = ("registers", "shared_bytes", "local_bytes", "warps", "load_widths", "store_widths")


def merged(found: dict[int, list[Record]]) -> dict[str, Record]:
    """Rows by name, each with its figures (or ``error``) per capability."""
    rows: dict[str, Record] = {}
    order = sorted(found, key=lambda capability: (capability != MAIN, capability))
    for capability in order:
        failed: set[tuple[str, str]] = set()
        for name, record in identified(found[capability]):
            failing = "error" in record
            like = (record["kernel"], record["case"]["dtype"])
            if failing and name not in rows and like in failed:
                continue  # elsewhere this call shares the code of another, whose row has the error
            failed |= {like} if failing else set()
            row = rows.setdefault(name, {
                "kernel": record["kernel"],
                "op": record["case"]["op"],
                "direction": direction(record["kernel"]),
                "dtype": record["case"]["dtype"],
                "case": describe_case(record["case"]),
                "variant": describe_variant(record),
                "sm": {},
            })  # fmt: skip
            kept = ("error",) if failing else FIGURES
            row["sm"][str(capability)] = {key: record[key] for key in kept}
    return rows


def direction(kernel: str) -> str:
    """By the kernel's name."""
    if "bwd_bwd" in kernel:
        return "double backward"
    if re.search(r"bwd|scatter|bn_sums", kernel):
        return "backward"
    return "forward"


def build(
    capabilities: Iterable[int], cache: Path = CACHE, module: Path | None = None
) -> dict[str, Any]:
    """The table as it is written to JSON."""
    triton = {c: compiled(c, cache)["compiled"] for c in capabilities}
    cuda: dict[int, list[Record]] = {}
    if module is not None:
        built = kernels_cuda.archs(module)
        cuda = {c: kernels_cuda.records(module, c) for c in triton if c in built}
    return {
        "schema": SCHEMA,
        "versions": versions(module),
        "capabilities": sorted(triton),
        "cuda_capabilities": sorted(cuda),
        "triton": merged(triton),
        "cuda": merged(cuda),
    }


def versions(module: Path | None) -> dict[str, str | None]:
    """Of the compilers."""
    tools = kernels_cuda.tool()
    found: dict[str, str | None] = {"triton": environment._version("triton"), "cuda runtime": None}
    if tools is not None:
        for name in ("ptxas", "ptxas-blackwell"):
            found[name] = _release(str(tools.parent / name))
    found["nvcc"] = _release("nvcc")
    if module is not None:
        import camkernels._cuda as built

        found["cuda runtime"] = str(built.versions()[1])
    return found


def _release(command: str) -> str | None:
    said = environment._output(command, "--version") or ""
    found = re.search(r"\bV(\d+\.\d+\.\d+)", said)
    return found[1] if found else None


# --- the guard ----------------------------------------------------------------------------------

TOLERANCE = 1.1, 4
"""Registers may grow by a tenth and four: the register allocator's chance."""


def _widest(widths: dict[str, int]) -> int:
    return max(map(int, widths), default=0)


def _mean(widths: dict[str, int]) -> float:
    count = sum(widths.values())
    return sum(int(w) * n for w, n in widths.items()) / count if count else 0.0


def regressions(records: Iterable[Record], rows: dict[str, Record]) -> list[str]:
    """What is worse than the table says: spills, registers, narrower loads or stores, errors."""
    found = []
    for name, record in identified(records):
        sm = str(record["capability"])
        known = rows.get(name, {}).get("sm", {}).get(sm)
        if known is None:
            if "error" not in record:
                found.append(f"sm_{sm} {name}: not in the table, python -m benchmarks.kernels")
            continue
        if "error" in record or "error" in known:
            if "error" not in known:
                found.append(f"sm_{sm} {name}: does not compile any more: {record['error']}")
            continue
        found += [f"sm_{sm} {name}: {text}" for text in _worse(record, known)]
    return found


def _worse(record: Record, known: Record) -> Iterator[str]:
    if record["local_bytes"] > known["local_bytes"]:
        yield f"{record['local_bytes']} bytes spilled, {known['local_bytes']} in the table"
    most = known["registers"] * TOLERANCE[0] + TOLERANCE[1]
    if record["registers"] > most:
        yield f"{record['registers']} registers, {known['registers']} in the table"
    for kind in ("load_widths", "store_widths"):
        now, then = record[kind], known[kind]
        if _widest(now) < _widest(then) or _mean(now) < 0.9 * _mean(then):
            yield f"{kind} {now}, in the table {then}"


def load(path: Path = FILE) -> dict[str, Any]:
    """The committed table."""
    table: dict[str, Any] = json.loads(path.read_text())
    return table


def write(table: dict[str, Any], path: Path = FILE) -> None:
    """JSON, a row a line, and Markdown beside it."""
    from benchmarks.kernels_table import markdown

    head = {k: v for k, v in table.items() if k not in ("triton", "cuda")}
    parts = [f' "{k}": {json.dumps(v)}' for k, v in head.items()]
    for group in ("triton", "cuda"):
        lines = (f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in table[group].items())
        parts.append(f' "{group}": {{\n' + ",\n".join(lines) + "\n }")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    path.with_suffix(".md").write_text(markdown(table))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--capability", type=int, action="append", choices=CAPABILITIES)
    parser.add_argument("--no-write", action="store_true", help="compile only")
    arguments = parser.parse_args(argv)
    for capability in arguments.capability or CAPABILITIES:
        found = compiled(capability)["compiled"]
        bad = sum("error" in r for r in found)
        print(f"sm_{capability}: {len(found) - bad} compiled, {bad} not", flush=True)
    if arguments.no_write or arguments.capability:
        return 0
    write(build(CAPABILITIES, module=module_path()))
    print(f"wrote {FILE} and {FILE.with_suffix('.md').name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
