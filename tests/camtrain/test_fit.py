"""Runs: what they leave, how they resume, and what happens when they are cut short."""

from __future__ import annotations

import csv
import dataclasses
import errno
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from camtrain import cli, files
from camtrain.config import FitConfig
from camtrain.demo import demo
from camtrain.errors import CamtrainError
from camtrain.fit import InterruptedRunError, fit
from camtrain.recorder import CHECKPOINT, checkpoint_epoch
from camtrain.training import Classifier
from PIL import Image
from voc_files import TinyVOC

Tiny = Callable[..., FitConfig]
CLOCK = ("train_seconds", "test_seconds", "peak_rss_mib", "peak_cuda_mib")


def figures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]


def test_a_run_leaves_everything(tiny: Tiny) -> None:
    config = tiny()
    run = fit(config, quiet=True)
    folder = Path(config.out)
    with open(folder / "metrics.csv") as file:
        (row,) = csv.DictReader(file)
    for split in ("train", "test"):
        for name in ("accuracy", "entropy", "area", "dispersion", "dead", "pointing", "energy"):
            assert f"{split}/{name}" in row
    assert float(row["train_seconds"]) > 0
    assert float(row["peak_rss_mib"]) > 50
    for name in ("curves.png", "overlays.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 300
    assert json.loads((folder / "environment.json").read_text())["versions"]["torch"]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["head"].startswith("closed form")
    assert summary["backend"] == run.backend
    assert checkpoint_epoch(folder / CHECKPOINT) == 1
    assert "fc.weight" in torch.load(folder / "model.pt", weights_only=True)
    assert list(folder.glob("csv/*/metrics.csv"))
    assert list(folder.glob("tensorboard/events*"))
    assert not list(folder.rglob("*.partial"))
    with pytest.raises(CamtrainError, match="holds a run already"):
        fit(config, quiet=True)


def test_a_resumed_run_equals_one_that_was_not_interrupted(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = signal.getsignal(signal.SIGINT)  # ignored in a background job of a shell
    whole = fit(tiny(epochs=3, warmup_epochs=1, out=str(tmp_path / "whole")), quiet=True)
    config = tiny(epochs=3, warmup_epochs=1, out=str(tmp_path / "cut"))
    step = Classifier.training_step

    def interrupted(self: Classifier, batch: Any, batch_idx: int) -> Any:
        if self.current_epoch == 2 and batch_idx == 1:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "training_step", interrupted)
        with pytest.raises(InterruptedRunError, match=r"--out .*cut goes on after epoch 2"):
            fit(config, quiet=True)
    assert signal.getsignal(signal.SIGINT) is handler
    resumed = fit(config, resume=True, quiet=True)
    assert len(resumed.rows) == 3
    assert figures(resumed.rows) == figures(whole.rows)
    states = [
        torch.load(tmp_path / name / "model.pt", weights_only=True) for name in ("whole", "cut")
    ]
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


def test_a_killed_run_resumes(
    tmp_path: Path, python: str, subprocess_environment: dict[str, str]
) -> None:
    out = tmp_path / "run"
    root = Path(__file__).resolve().parents[2]
    search = [str(root), str(root / "python"), subprocess_environment["PYTHONPATH"]]
    environment = {**subprocess_environment, "PYTHONPATH": os.pathsep.join(search)}
    command = [python, "-m", "camtrain", "fit", "--image-size", "32", "--limit-train", "60",
               "--limit-test", "30", "--accelerator", "cpu", "--out", str(out)]  # fmt: skip
    process = subprocess.Popen(
        [*command, "--epochs", "500"], env=environment, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (out / CHECKPOINT).is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    done = checkpoint_epoch(out / CHECKPOINT)
    assert done >= 1
    assert cli.main(["fit", "--resume", "--out", str(out), "--epochs", str(done + 1)]) == 0
    with open(out / "metrics.csv") as file:
        assert [int(row["epoch"]) for row in csv.DictReader(file)] == list(range(1, done + 2))
    assert not list(out.rglob("*.partial"))


def test_a_full_disk_keeps_the_checkpoint(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(epochs=1)
    fit(config, quiet=True)
    folder = Path(config.out)
    before = (folder / CHECKPOINT).read_bytes()
    synced = os.fsync

    def full(descriptor: int) -> None:
        if "last.ckpt" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        synced(descriptor)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to see which file is written")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert cli.main(["fit", "--resume", "--out", str(folder), "--epochs", "2"]) == 1
    told = capsys.readouterr().err
    assert "disk full" in told
    assert "checkpoint of epoch 1 is intact" in told
    assert (folder / CHECKPOINT).read_bytes() == before
    assert not list(folder.rglob("*.partial"))
    run = fit(dataclasses.replace(config, epochs=2), resume=True, quiet=True)
    assert [row["epoch"] for row in run.rows] == [1, 2]


def test_writes_are_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    files.write_text(path, "old")

    def full(*args: Any) -> None:
        raise OSError(errno.EDQUOT, "quota")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(files.DiskFullError, match="the older file is intact"):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
def test_cam_entropy_lowers_the_entropy(tiny: Tiny, tmp_path: Path) -> None:
    shared = {"epochs": 3, "image_size": 48, "limit_train": 300, "limit_test": 100}
    entropy = {}
    for beta in (0.0, 0.2):
        run = fit(tiny(**shared, beta=beta, warmup_epochs=1, out=str(tmp_path / str(beta))),
                  quiet=True)  # fmt: skip
        entropy[beta] = [row["train/entropy"] for row in run.rows]
    assert entropy[0.0][0] == entropy[0.2][0]  # the warm-up is the same
    assert entropy[0.2][2] < entropy[0.0][2] - 0.3


def test_damaged_pictures_are_counted_in_the_summary(voc: TinyVOC, tiny: Tiny) -> None:
    content = voc.image("000002").read_bytes()
    voc.image("000002").write_bytes(content[: len(content) // 2])
    config = tiny(
        data="voc", root=str(voc.root), sets="2007:trainval", test_sets="2007:test",
        arch="smallresnet", head_units=7, batch_size=1, workers=1, beta=0.1,
    )  # fmt: skip
    run = fit(config, quiet=True)
    summary = json.loads((Path(config.out) / "summary.json").read_text())
    assert len(summary["damaged"]) == 1
    assert "000002.jpg" in summary["damaged"][0]
    assert "test/pointing" not in run.rows[0]
    strict = dataclasses.replace(config, damaged="error", out=config.out + "2")
    with pytest.raises(CamtrainError, match=r"000002\.jpg"):
        fit(strict, quiet=True)


def test_an_unknown_layer_is_told_with_near_names(tiny: Tiny) -> None:
    with pytest.raises(CamtrainError, match="layer3"):
        fit(tiny(layer="layer33"), quiet=True)


def test_the_demo_writes_table_and_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = demo(tmp_path, epochs=1, limit_train=50, limit_test=20, progress=False)
    told = capsys.readouterr().out
    for label in ("accuracy", "ce, entropy", "ca, ellip", "cd, disp", "dead maps", "maximum inside",
                  "energy inside", "time per epoch", "backend: ", "closed form"):  # fmt: skip
        assert label in told
    assert len(rows) == 8
    with open(tmp_path / "table.csv") as file:
        assert next(csv.reader(file)) == ["figure", "beta=0", "beta=0.1", "better"]
    for name in ("before_after.png", "curves.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 400
