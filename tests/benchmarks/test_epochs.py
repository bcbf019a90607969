"""The benchmark of epochs: what it takes from the rows, its ratios, and a run of each side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import epochs, plot, results

MIB = 2**20
SETTING = epochs.Setting("voc", "elsewhere/VOC", "resnet18", 64, 4, 12, 4, 3, None)


def test_the_first_epoch_counts_for_neither_time_nor_peak() -> None:
    rows = [
        {"step": str(3 * n), "train_seconds": s, "peak_rss_mib": m}
        for n, s, m in ((1, "9.0", "990.0"), (2, "2.0", "300.5"), (3, "4.0", "280.0"))
    ]
    found = epochs._measured(rows, [100 * MIB, 120 * MIB, 60 * MIB])
    assert found["seconds"] == 3.0
    assert found["steps"] == 9
    assert found["peak_bytes"] == 200.5 * MIB  # above what was held before training
    assert found["step_bytes"] == 220 * MIB  # above the start of the same epoch
    assert "peak_bytes" not in epochs._measured(rows, None)


def made_up() -> list[dict[str, Any]]:
    """Three rounds on a machine that slows down; the second is disturbed."""
    costs = {"baseline": 1.0, "entropy": 1.04, "interpretable fast": 2.8, "interpretable lean": 3}
    peaks = {"baseline": 100, "entropy": 101, "interpretable fast": 120, "interpretable lean": 130}
    runs: list[dict[str, Any]] = []
    for number in range(3):
        for side, cost in costs.items():
            drift = 2**number * (3 if (number, side) == (1, "entropy") else 1)
            common = {"round": number, "side": side, "steps": 9, "head": "none", "threads": 2}
            runs.append({**common, "kind": "time", "seconds": cost * drift})
            peak = {"peak_bytes": peaks[side] * MIB, "step_bytes": peaks[side] * MIB // 2}
            runs.append({**common, "kind": "peak", "seconds": 99.0, **peak})
    return runs


def test_ratios_are_taken_within_a_round_and_held_against_targets(tmp_path: Path) -> None:
    pytest.importorskip(
        "matplotlib", reason="an extra: camkernels[train], which make test installs"
    )
    result = epochs.result_of(SETTING, made_up(), "the command")
    path = results.write(result, tmp_path)
    ((_, loaded),) = results.load_all(tmp_path)
    (case,) = loaded["cases"].values()
    ratio = case["sides"]["entropy"]["ratio_to"]["baseline"]
    assert ratio["q50"] == pytest.approx(1.04)
    assert ratio["q80"] > 2
    assert case["sides"]["interpretable lean"]["peak_ratio"]["q50"] == pytest.approx(1.3)
    assert loaded["options"]["root"] == "VOC"
    lines = {line.split(" | ")[0]: line for line in epochs.table(loaded).splitlines()}
    assert "target 1.05 met" in lines["| entropy"]
    assert "target 2.7 missed" in lines["| interpretable fast"]
    assert "target 1.25 met" in lines["| interpretable fast"]
    assert "target 1.1 missed" in lines["| interpretable lean"]
    for part in ("the command", "3 for time", "torch 2", "2 threads", "VmRSS"):
        assert part in epochs.table(loaded) or part in str(loaded["caveats"])
    assert "peak MiB" in results.table(loaded)  # of all results, and their plots
    assert plot.plot(loaded, path.with_suffix(".png")).is_file()


@pytest.mark.slow
def test_a_failed_run_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["--quick", "--root", str(tmp_path / "nowhere"), "--output", str(tmp_path)]
    assert epochs.main(arguments) == 1
    assert "baseline: " in (told := capsys.readouterr().err)
    assert "no folder" in told
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_quick_run(tmp_path: Path) -> None:
    pytest.importorskip("torchvision", reason="make test installs it")
    assert epochs.main(["--quick", "--data", "digits", "--output", str(tmp_path)]) == 0
    ((path, result),) = results.load_all(tmp_path)
    (case,) = result["cases"].values()
    assert list(case["sides"]) == list(epochs.SIDES)
    for side, figures in case["sides"].items():
        assert figures["peak_bytes"] > figures["step_bytes"] > 0
        assert (("engine " + side.split()[-1]) in figures["head"]) == ("interpretable" in side)
    assert len(case["runs"]) == 2 * len(epochs.SIDES)
    assert path.with_suffix(".md").read_text() == epochs.table(json.loads(path.read_text()))
