"""Predictions of memory, and the report of a plan."""

from __future__ import annotations

import copy
import gc
import json
import subprocess
from pathlib import Path

import pytest
import torch
from nn.swapping import small_network
from torch import nn

import camkernels as ck
from benchmarks.memory import PEAK_MALLOC, process_environment
from camkernels.engine.ledger import Ledger

PROCESS = Path(__file__).with_name("engine_peak_process.py")


@pytest.mark.parametrize(
    "side",
    [
        "fast interpretable",
        pytest.param("plain cross-entropy", marks=pytest.mark.slow),
        pytest.param("lean interpretable", marks=pytest.mark.slow),
        pytest.param("fast cross-entropy", marks=pytest.mark.slow),
        pytest.param("lean-bf16 interpretable", marks=pytest.mark.slow),
    ],
)
def test_the_predicted_peak_is_the_measured_one(
    side: str, python: str, subprocess_environment: dict[str, str]
) -> None:
    pytest.importorskip("torchvision")
    path = subprocess_environment["PYTHONPATH"]
    done = subprocess.run(
        [python, str(PROCESS), side],
        env={**process_environment(PEAK_MALLOC), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    measured, predicted = json.loads(done.stdout)
    print(f"{side}: measured {measured / 2**20:.1f} MiB, predicted {predicted / 2**20:.1f} MiB")
    assert abs(predicted / measured - 1) < 0.03


def test_a_ledger_counts_what_is_held_and_what_was() -> None:
    there = torch.empty(1000, device="meta")
    ledger = Ledger()
    with ledger.running():
        a = there + 1
        view = a[10:]
        b = a.detach().mul_(2) + there
        assert ledger.now == 8000
        del a, b
        gc.collect()
        assert ledger.now == 4000  # the view holds it
        del view
        gc.collect()
        assert ledger.now == 0
    assert ledger.peak == 8000


def test_a_ledger_counts_what_the_kernels_of_network_ops_allocate() -> None:
    """Not the temporaries of their formulas, which run where other dispatch modes trace."""
    x = torch.empty(2, 3, 16, 16, device="meta", requires_grad=True)
    ledger = Ledger()
    with ledger.running():
        ck.nn.functional.relu(x).sum().backward()
    assert ledger.peak < 2 * x.nbytes + x.nbytes // 8
    ledger = Ledger()
    with ledger.running():
        y = ck.nn.functional.max_pool2d(x, 2)
    assert ledger.peak == y.nbytes + y.numel()


def test_the_report_says_what_is_kept_and_changes_nothing() -> None:
    model = small_network()
    before = copy.deepcopy(model.state_dict())
    kinds = [type(m) for m in model.modules()]
    report = ck.plan_report(model, (2, 3, 24, 24), "fast")
    assert [type(m) for m in model.modules()] == kinds
    assert "forward" not in model.__dict__
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    fates = {name: fate for name, _, fate, _ in report.rows}
    assert fates["0.0"] == "kept"
    assert fates["0.1"] == "made again"
    sizes = [size for _, _, fate, size in report.rows if fate == "kept"]
    assert report.kept_bytes == sum(sizes) > 0
    assert report.predicted_peak > report.plain_peak > report.kept_bytes
    assert "kept by the forward" in str(report)
    lean = ck.plan_report(model, (2, 3, 24, 24), "lean")
    assert lean.kept_bytes < report.kept_bytes
    assert "convolved again" in {fate for _, _, fate, _ in lean.rows}


def test_the_prediction_is_linear_in_the_batch() -> None:
    model = small_network()
    peaks = [ck.plan_report(model, (b, 3, 64, 64), "fast").predicted_peak for b in (4, 8, 16)]
    assert (peaks[2] - peaks[1]) / (peaks[1] - peaks[0]) == pytest.approx(2, rel=0.02)


def test_a_budget_is_kept_or_refused() -> None:
    model = small_network()
    shape = (8, 3, 48, 48)
    fast = ck.plan_report(model, shape, "fast").predicted_peak
    with pytest.raises(ck.BudgetError, match=r"needs at least \d+ bytes"):
        ck.plan_report(model, shape, 1000)
    assert ck.plan_report(model, shape, 10 * fast).kept_bytes > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"memory": "small"}, "memory: expected one of fast, lean, lean-bf16 or a positive"),
        ({"memory": 0}, "memory: expected"),
        ({"memory": True}, "memory: expected"),
        ({"device": "tpu"}, "device: expected one of cpu, cuda"),
        ({"shape": (3, 8, 8)}, r"shape: expected \(B, C, H, W\)"),
    ],
)
def test_refusals(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ck.plan_report(small_network(), **{"shape": (2, 3, 24, 24), **arguments})  # type: ignore[arg-type]


def test_a_network_that_cannot_be_planned_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Conv2d(4, 4, 3))
    with pytest.raises(ck.EngineError, match=r"engine: 1 \(GELU\) cannot be planned"):
        ck.plan_report(model, (2, 3, 24, 24))
