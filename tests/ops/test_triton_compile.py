"""Every Triton kernel compiles for GPUs that need not be present, without spilling registers.

Compiled in processes without TRITON_INTERPRET, from the calls that the host code makes; what the
kernels compute is tested elsewhere, in the interpreter (and on a GPU where there is one).
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from camkernels import backends

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed"
    ),
    pytest.mark.skipif(
        backends.triton_interpreted(), reason="compiles in processes without TRITON_INTERPRET"
    ),
]

CAPABILITIES = (80, 90, 120)
MAIN = 90  # compiled in full, see triton_calls.py
HELPER = Path(__file__).with_name("triton_aot.py")
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
Record = dict[str, Any]


def compile_group(capability: int, group: str) -> Any:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(HELPER), str(capability), group],
        env=environment, capture_output=True, text=True, timeout=3000,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


def known_to_spill(record: Record) -> bool:
    """8 bytes of ptxas' own making (Triton 3.9, sm_120), for activations of three channels.

    It keeps to 96 registers of a possible 128. A register limit like the forward's would lift that,
    but for every backward, and what that does to occupancy is for a GPU to say.
    """
    case = record["case"]
    return (
        record["kernel"] == "cam_statistics_bwd_kernel"
        and record["capability"] == 120
        and (case["layout"], case["shape"][1]) == ("channels_last", 3)
        and record["local_bytes"] <= 8
    )


def spilling(records: list[Record]) -> list[Record]:
    spills = [r for r in records if r["local_bytes"] or r["local_accesses"]]
    return [r for r in spills if not known_to_spill(r)]


def table(records: list[Record]) -> str:
    lines = [f"{'kernel':28}{'sm':>4} {'dtype':9}{'layout':14}{'split':>6}{'regs':>6}{'shared':>8}"]
    for r in records:
        case = r["case"]
        lines.append(
            f"{r['kernel']:28}{r['capability']:>4} {case['dtype']:9}{case['layout']:14}"
            f"{r['split']!s:>6}{r['registers']:>6}{r['shared_bytes']:>8}"
            f"{'  SPILLS' if spilling([r]) else ''}"
        )
    return "\n".join(lines)


def check(result: Any) -> None:
    records = result["compiled"]
    print(table(records))
    assert not spilling(records), "kernels use local memory:\n" + table(spilling(records))
    missing = set(result["kernels"]) - {r["kernel"] for r in records}
    assert not missing, f"no case compiles {sorted(missing)}: add one to triton_calls.py"


def check_splits(records: list[Record]) -> None:
    """Forwards whole and split."""
    splits = {(r["kernel"], r["split"]) for r in records}
    for op in ("cam", "cam_statistics"):
        assert {(f"{op}_fwd_kernel", True), (f"{op}_fwd_kernel", False)} <= splits


def check_widths_of_maps(records: list[Record]) -> int:
    """16 bytes at a time where rows of pixels, or of channels, are whole multiples of that."""
    checked = 0
    for record in records:
        case, kernel = record["case"], record["kernel"]
        if not kernel.startswith("cam_"):
            continue
        _, channels, height, width = case["shape"]
        row = channels if case["layout"] == "channels_last" else height * width
        if row * ITEM_BYTES[case["dtype"]] % 16:
            continue
        # The elements of a tile over 128 threads, 16 bytes each time; these take half a tile.
        elements = 2048 if kernel.startswith(("cam_weights_", "cam_pixels_")) else 4096
        tile = elements * ITEM_BYTES[case["dtype"]] // 128 // 16
        if "_fwd_" in kernel:
            assert record["wide_loads"] >= tile * (2 if case["pooled"] else 1), record
        else:
            assert record["wide_loads"] >= tile, record
            assert record["wide_stores"] >= tile, record
        checked += 1
    return checked


def check_widths_of_network(records: list[Record]) -> int:
    """The same of every load of z, of gradients, of results."""
    checked = 0
    for record in records:
        case, kernel = record["case"], record["kernel"]
        if not kernel.startswith(("bn_", "relu_")) or case["shape"][2:] == [7, 7]:
            continue
        assert record["wide_loads"] >= 1, record
        if not kernel.startswith(("bn_stats", "bn_sums")):
            assert record["wide_stores"] >= 2, record
        # What is left are per-channel numbers and bytes of the mask.
        assert record["loads"] - record["wide_loads"] <= 80, record
        checked += 1
    return checked


# One test of all, since it is the compilation that takes the time; processes share the three.
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_compile_without_spilling(capability: int) -> None:
    result = compile_group(capability, "default")
    check(result)
    records = result["compiled"]
    check_splits(records)
    full = capability == MAIN
    assert check_widths_of_maps(records) >= (16 if full else 4)
    assert check_widths_of_network(records) >= (12 if full else 4)


def test_the_guard_sees_spills() -> None:
    """The same parser over a kernel squeezed into 32 registers."""
    result = compile_group(90, "spill")
    assert spilling(result["compiled"])
    with pytest.raises(AssertionError, match="kernels use local memory"):
        check(result)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_whole_cross_product_compiles_without_spilling(capability: int) -> None:
    check(compile_group(capability, "slow"))
