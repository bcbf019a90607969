"""Studies: the grid, what is skipped, and what is kept when one is cut short."""

from __future__ import annotations

import csv
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from camtrain import cli, study
from camtrain.fit import InterruptedRunError
from camtrain.study import Grid, Setting, markdown, tabulate
from camtrain.training import ConsistencyClassifier
from picture_files import TinyCUB


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    root = TinyCUB(tmp_path / "data").root
    return ["study", "consistency", "--data", "cub", "--data-root", str(root), "--model",
            "smallresnet", "--image-size", "32", "--epochs", "1", "--batch-size", "3", "--workers",
            "0", "--insertion-steps", "2", "--accelerator", "cpu", "--alphas", "0", "0.1",
            "--betas", "0", "1e-6", "--norms", "1", "2", "--out",
            str(tmp_path / "study")]  # fmt: skip


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "study"


def test_the_norm_is_not_varied_where_beta_is_zero() -> None:
    grid = Grid([0.0, 1.0], [0.0, 1e-6], [1.0, 2.0], [4, 5, 4])
    settings = grid.settings()
    assert settings == [
        Setting(0.0, 0.0, 1.0),
        Setting(0.0, 1e-6, 1.0),
        Setting(0.0, 1e-6, 2.0),
        Setting(1.0, 0.0, 1.0),
        Setting(1.0, 1e-6, 1.0),
        Setting(1.0, 1e-6, 2.0),
    ]
    assert [seed for _, seed in grid.runs()] == [4] * 6 + [5] * 6
    assert settings[1].name == "alpha0_beta1e-06_p1"


def test_a_study_makes_a_table_and_is_skipped_when_done(
    command: list[str], out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    assert cli.main(command) == 0
    told = capsys.readouterr().out
    assert "[6/6] alpha = 0.1, beta = 1e-06, p = 2, seed 0" in told
    with open(out / "table.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["alpha"], row["beta"], row["norm"]) for row in rows] == [
        ("0.0", "0.0", "1.0"), ("0.0", "1e-06", "1.0"), ("0.0", "1e-06", "2.0"),
        ("0.1", "0.0", "1.0"), ("0.1", "1e-06", "1.0"), ("0.1", "1e-06", "2.0"),
    ]  # fmt: skip
    for row in rows:
        assert 0 <= float(row["accuracy"]) <= 1
        assert -1 <= float(row["consistency_mean"]) <= 1
        assert 0 <= float(row["insertion_auc_mean"]) <= 1
    text = (out / "table.md").read_text()
    assert "| alpha | beta | p | Top-1 Acc (%) | Consistency (%) | IAUC |" in text
    assert "| 0 | 0 | - |" in text
    place = out / "alpha0.1_beta1e-06_p1_seed0"
    assert (place / "model.pt").is_file()
    assert not (place / "checkpoints").exists()  # of a run that is done
    before = (out / "table.csv").read_bytes()

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(study, "fit", never)
    assert cli.main(command) == 0
    assert capsys.readouterr().out.count("done before") == 6
    assert (out / "table.csv").read_bytes() == before
    assert cli.main([*command, "--lr", "0.5"]) == 1
    assert "lr: the study in" in capsys.readouterr().err


def test_an_interrupted_study_goes_on(
    command: list[str], out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    step = ConsistencyClassifier.training_step

    def interrupted(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.config.alpha == 0.1 and self.current_epoch == 1:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    two = [*command, "--epochs", "2", "--norms", "1", "--betas", "0"]
    with monkeypatch.context() as patch:
        patch.setattr(ConsistencyClassifier, "training_step", interrupted)
        assert cli.main(two) == 130
    assert "1 of 2 runs are done and kept" in capsys.readouterr().err
    assert len(list(out.glob("*/result.json"))) == 1
    assert len((out / "table.md").read_text().splitlines()) == 5
    assert cli.main(two) == 0
    told = capsys.readouterr().out
    assert "done before" in told
    assert "resuming after epoch 1" in told
    assert len((out / "table.md").read_text().splitlines()) == 6


def test_a_full_disk_keeps_what_is_done(
    command: list[str], out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to see which file is written")
    synced = os.fsync

    def full(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if "alpha0.1" in path and "result.json" in path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        synced(descriptor)

    short = [*command, "--norms", "1", "--betas", "0"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert cli.main(short) == 1
    told = capsys.readouterr().err
    assert "no room for" in told
    assert "1 of 2 runs are done and kept" in told
    assert cli.main(short) == 0
    assert len(list(out.glob("*/result.json"))) == 2


def test_a_setting_that_diverges_is_a_line_of_the_table(
    command: list[str], out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = [*command, "--norms", "1", "--betas", "0", "--alphas", "0", "--lr", "1e30"]
    assert cli.main(short) == 0
    assert "the training diverged" in capsys.readouterr().out
    assert "| 0 | 0 | - | 1 diverged | - | - |" in (out / "table.md").read_text()
    assert cli.main(short) == 0
    assert "done before" in capsys.readouterr().out


def test_the_closest_method_is_a_study_as_well(
    command: list[str], out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = [*command, "--norms", "1", "--betas", "0", "--alphas", "0.1"]
    closest = [*short, "--distance", "contrastive", "--temperature", "0.2", "--views", "joint"]
    assert cli.main(closest) == 0
    text = (out / "table.md").read_text()
    assert "32 x 32, contrastive, T = 0.2\n" in text
    assert "All-zero maps (%)" in text
    stored = (out / "alpha0.1_beta0_p1_seed0" / "config.yaml").read_text()
    assert "distance: contrastive\ntemperature: 0.2\nviews: joint\n" in stored
    assert cli.main(short) == 1
    assert "distance: the study in" in capsys.readouterr().err


def test_a_broken_result_is_named(
    command: list[str], out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = [*command, "--norms", "1", "--betas", "0", "--alphas", "0"]
    assert cli.main(short) == 0
    (out / "alpha0_beta0_p1_seed0" / "result.json").write_text("{")
    capsys.readouterr()
    assert cli.main(short) == 1
    assert "is no result of a run" in capsys.readouterr().err
    assert cli.main([*short, "--overwrite"]) == 0


def test_the_grid_is_not_taken_from_the_file(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "study.yaml"
    file.write_text("alpha: 3\nlr: 0.01\n")
    assert cli.main([*command, "--config", str(file)]) == 1
    assert "the grid of a study sets alpha" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*command, "--alpha", "3"])


def test_seeds_are_averaged() -> None:
    grid = Grid([0.0], [0.0], [1.0], [0, 1])
    results = [
        {"alpha": 0.0, "beta": 0.0, "norm": 1.0, "seed": seed, "accuracy": 0.5 + 0.1 * seed,
         "consistency_mean": 0.7, "insertion_auc_mean": value, "test/sparsity": 1.0,
         "test/dead": 0.0, "test/uniform": 0.0}
        for seed, value in ((0, 0.25), (1, None))
    ]  # fmt: skip
    (row,) = tabulate(grid, results)
    assert row["accuracy"] == pytest.approx(0.55)
    assert row["accuracy/sd"] == pytest.approx(0.05)
    assert row["insertion_auc_mean"] is None
    text = markdown([row])
    assert "| 0 | 0 | - | 2 | 55.00 ± 5.00 | 70.00 ± 0.00 | - | 1 ± 0 |" in text
    (single,) = tabulate(grid, results[:1])
    assert "accuracy/sd" not in single
    assert json.dumps(single)
    assert issubclass(InterruptedRunError, Exception)
