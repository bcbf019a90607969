"""``camtrain plan`` and ``camtrain fit --vram``: what is counted, chosen and refused."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from camtrain import cli, counting, planning
from camtrain import config as configuration
from camtrain.config import FitConfig
from camtrain.counting import PROBES, Peaks, Step, step_of
from camtrain.errors import CamtrainError
from camtrain.fit import fit
from torch import nn

Tiny = Callable[..., FitConfig]
MIB = 2**20


class Little(nn.Module):
    """Traced in no time; its activations outweigh its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.fc = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.second(self.first(x)).mean((2, 3)))


def little() -> nn.Module:
    return Little()


ARCH: dict[str, Any] = {"arch": f"{__name__}:little", "layer": "second"}
FLAGS = ("--arch", ARCH["arch"], "--layer", "second", "--image-size", "16")


def config_of(**given: Any) -> FitConfig:
    return configuration.resolve({"image_size": 16, **ARCH, **given})


# --- counting -----------------------------------------------------------------------------------


class Scripted(Peaks):
    """A peak that is the largest of lines, as of moments of a step."""

    def __init__(self, *lines: tuple[int, int]) -> None:
        self.lines, self.known, self.asked = lines, {}, 0

    def at(self, batch: int) -> int:
        if batch not in self.known:
            self.asked += 1
            self.known[batch] = max(constant + slope * batch for constant, slope in self.lines)
        return self.known[batch]


@pytest.mark.parametrize(
    "lines",
    [((100, 7),), ((1000, 1), (0, 9)), ((5000, 0), (400, 3), (-3000, 11)), ((0, 50), (900, 20))],
)
@pytest.mark.parametrize("budget", [5, 60, 130, 1100, 5001, 9999, 12_345])
def test_the_largest_batch_is_exact_and_soon_found(
    lines: tuple[tuple[int, int], ...], budget: int
) -> None:
    peaks = Scripted(*lines)
    found = peaks.largest(budget)
    fits = [b for b in range(1, 13_000) if max(c + s * b for c, s in lines) <= budget]
    assert found == max(fits, default=0)
    assert peaks.asked <= 16


def test_a_step_is_counted_by_hand() -> None:
    linear = nn.Linear(3 * 16 * 16, 10, bias=False, device="meta")
    config = config_of(recipe="baseline", optimizer="sgd", momentum=0.9)

    def loss(batch: dict[str, Any]) -> torch.Tensor:
        scratch = 2 * batch["images"]  # gone before the backward, so that the forward is the peak
        return linear(batch["images"].flatten(1)).sum() + scratch.new_zeros(())

    peaks = Peaks(Step(loss, linear, config, "meta"), linear, "cpu")
    weights = linear.weight.numel() * 4
    assert peaks.fixed == 2 * weights  # and a momentum as large
    pictures, logits, target = 768 * 5, 4 * 10, 8
    batch = 64
    forward = batch * (pictures + 4 * 768 + logits + target)
    assert peaks.at(batch) - peaks.fixed == pytest.approx(forward, abs=600)
    several = dataclasses.replace(config, accumulate=2)  # the gradient of the batch before stays
    kept = Peaks(Step(loss, linear, several, "meta"), linear, "cpu").at(batch) - peaks.fixed
    assert kept == pytest.approx(forward + weights, abs=600)
    adam = dataclasses.replace(config, optimizer="adam")
    assert Peaks(Step(loss, linear, adam, "meta"), linear).fixed == 3 * weights
    still = dataclasses.replace(config, momentum=0.0)
    assert Peaks(Step(loss, linear, still, "meta"), linear).fixed == weights
    # Adam's step at batch 1 needs more than the gradient of a picture: gradients and a root
    assert Peaks(Step(loss, linear, adam, "meta"), linear, "cpu").at(1) == 5 * weights


RECIPES: dict[str, dict[str, Any]] = {
    "entropy": {"beta": 0.1},
    "consistency": {},
    "interpretable": {},
    "combined": {"beta": 0.1, "alpha": 0.1, "norm_weight": 1e-6, "gradient_weight": 0.01},
    "baseline": {},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_counted(recipe: str) -> None:
    given = {"recipe": recipe, "insertion_steps": 4} if recipe == "consistency" else {
        "recipe": recipe
    }  # fmt: skip
    config = config_of(**given, **RECIPES[recipe])
    peaks = Peaks(*step_of(config, 10))
    small, large = peaks.at(8), peaks.at(24)
    assert peaks.fixed < small < large
    plain = Peaks(*step_of(planning.as_baseline(config), 10))
    assert large >= plain.at(24)
    if recipe in ("interpretable", "combined"):
        assert large > 1.2 * plain.at(24)


def test_a_lazy_regulariser_and_a_balance_have_their_peaks() -> None:
    base = {"recipe": "interpretable"}
    every, always = (Peaks(*step_of(config_of(**base, every=n), 10)).at(8) for n in (4, 1))
    assert every == always
    balanced = Peaks(*step_of(config_of(**base, balance=0.5), 10)).at(8)
    assert balanced > always


@pytest.mark.parametrize("engine", ["off", "lean"])
def test_autocast_lowers_what_a_sample_takes(engine: str) -> None:
    found = []
    for precision in ("32-true", "bf16-mixed"):
        peaks = Peaks(*step_of(config_of(recipe="interpretable", precision=precision,
                                         engine=engine), 10))  # fmt: skip
        found.append((peaks.at(24) - peaks.at(8)) / 16)
    assert found[1] < 0.85 * found[0]


def test_casts_of_autocast_keep_one_copy_of_a_weight() -> None:
    linear = nn.Linear(4, 4, device="meta")
    x = torch.zeros(2, 4, device="meta")
    with counting.autocast("bf16-mixed", torch.device("meta")) as _:
        y = linear(linear(x))
        assert y.dtype == torch.bfloat16
        assert nn.functional.cross_entropy(y, torch.zeros(2, dtype=torch.long, device="meta")).dtype
        with torch.autocast("cpu", enabled=False):
            assert linear(x).dtype == torch.float32
    assert linear(x).dtype == torch.float32
    casts = counting._Casts(torch.bfloat16)
    assert casts._low(linear.weight) is casts._low(linear.weight)


# --- plans --------------------------------------------------------------------------------------


def run(*argv: str) -> int:
    return cli.main(["plan", *argv])


def test_a_plan_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--recipe", "interpretable", "--vram", "0.02", "0.03",
             "--no-augment")  # fmt: skip
    assert run(*FLAGS, *words, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["measured_on_gpu"] is False
    assert told["classes"] == 10
    small, large = told["budgets"]
    assert [row["engine"] for row in small["rows"]] == ["off", "fast", "lean", "lean-bf16", "off"]
    assert small["rows"][-1]["recipe"] == "baseline"
    for less, more in zip(small["rows"], large["rows"], strict=True):
        assert less["peak"] <= 0.02e9 < less["peak"] + 1.01 * less["per_sample"]
        assert less["largest"] < more["largest"]
    taken = max(small["rows"][:3], key=lambda row: row["largest"])
    assert small["take"].startswith("camtrain fit --recipe interpretable --image-size 16 --no-aug")
    engine = "" if taken["engine"] == "off" else f"--engine {taken['engine']} "
    assert small["take"].endswith(f"second {engine}--batch-size {taken['largest']}")
    names = [option["name"] for option in small["options"]]
    assert names[0] == "--precision bf16-mixed"
    assert names[-1] == "--every n"
    accumulated, freed = small["options"][1:3]
    assert (accumulated["name"], accumulated["offered"]) == ("--accumulate k", True)
    assert 0 < accumulated["largest"] <= taken["largest"]
    assert freed["offered"] is False
    assert freed["largest"] >= taken["largest"]


def test_no_data_set_is_needed_where_its_classes_are_known() -> None:
    assert planning.classes_of(config_of(data="voc", root=""), None) == 20
    assert planning.classes_of(config_of(data="folder", root=""), 7) == 7
    with pytest.raises(CamtrainError, match=r"classes: .*folder.* pass --classes"):
        planning.classes_of(config_of(data="folder", root=""), None)
    with pytest.raises(CamtrainError, match="classes: must be at least 1, got 0"):
        planning.classes_of(config_of(), 0)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--vram", "0.00001", "--recipe", "baseline"), "1e-05 GB are too little .* --vram 0.0"),
        (("--vram", "-1"), "vram: must be above 0 GB, got -1"),
        (("--vram", "1", "--arch", "smallresnt"), "arch: .*near names: smallresnet"),
        (("--vram", "1", "--precision", "64-true"), "precision: .* allowed are 32-true"),
        (("--vram", "1", "--data", "folder"), "pass --classes"),
        (("--vram", "1", "--alpha", "1"), "alpha: recipe 'entropy' does not read it"),
    ],
)
def test_mistakes_are_named(
    argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*FLAGS, *argv) == 1
    assert re.search(message, capsys.readouterr().err)


class Squeezed(nn.Module):
    """The engine has no pass for its sigmoid gate."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x).relu()
        y = self.second(y * y.mean((2, 3), keepdim=True).sigmoid())
        return self.fc(y.relu().mean((2, 3)))


def squeezed() -> nn.Module:
    return Squeezed()


def test_an_engine_that_cannot_run_the_network_is_named_and_the_others_are_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ("--vram", "0.01", "--image-size", "16", "--arch", f"{__name__}:squeezed", "--layer",
            "second", "--recipe")  # fmt: skip
    assert run(*argv, "entropy", "--batch-size", "99999") == 0
    text = capsys.readouterr().out
    assert "Predicted, not measured on a GPU" in text
    assert "cuDNN" in text
    assert re.search(r"--batch-size 99999 does not fit; --batch-size \d+ --accumulate \d+ ", text)
    rows = [line.split() for line in text.splitlines() if line.startswith("entropy ")]
    assert [row[1] for row in rows] == ["off", "fast", "lean"]
    assert int(rows[0][4]) > 0
    assert rows[1][2:] == rows[2][2:] == ["-"] * 5
    assert "entropy, engine lean: engine: " in text
    assert "--engine" not in text.partition("take: ")[2]


def test_a_tie_goes_to_the_engine_that_recomputes_nothing() -> None:
    rows = [planning.Row("entropy", e, largest=n) for e, n in
            (("off", 60), ("fast", 80), ("lean", 90), ("lean-bf16", 99))]  # fmt: skip
    best = planning.best(rows)
    assert best is not None
    assert best.engine == "lean"
    best = planning.best(rows, samples=70)
    assert best is not None
    assert best.engine == "fast"
    assert planning.best([planning.Row("entropy", "off", refused="no")]) is None


# --- fit ----------------------------------------------------------------------------------------


def given(*argv: str) -> FitConfig:
    return cli.fit_config(cli.parser().parse_args(["fit", *argv]))


def test_what_vram_means_to_a_configuration(tmp_path: Path) -> None:
    assert given("--vram", "11").engine == "auto"
    assert given("--vram", "11", "--engine", "off").engine == "off"
    with pytest.raises(CamtrainError, match=r"vram: a plan for 11 GB .* batch_size 8"):
        given("--vram", "11", "--batch-size", "8")
    file = tmp_path / "given.yaml"
    file.write_text("vram: '8'\nbatch-size: 4\n")
    with pytest.raises(CamtrainError, match=r"vram: a plan for 8 GB .* batch_size 4"):
        given("--config", str(file))
    with pytest.raises(CamtrainError, match=r"engine: 'auto' .* needs --vram"):
        given("--engine", "auto")
    with pytest.raises(CamtrainError, match="vram: must be above 0 GB, got 0"):
        given("--vram", "0")


def test_fit_takes_what_is_planned_and_resume_repeats_it(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    words = ("fit", "--recipe", "entropy", "--beta", "0.1", "--vram", "0.003", *FLAGS,
             "--image-size", "32", "--limit-train", "60", "--limit-test", "10", "--epochs", "1",
             "--accelerator", "cpu", "--no-progress", "--out", str(folder))  # fmt: skip
    assert cli.main(list(words)) == 0
    told = capsys.readouterr().out
    stored = configuration.load(folder / "config.yaml")
    engine, batch = stored["engine"], stored["batch_size"]
    assert engine in ("fast", "lean")
    assert 8 < batch < 60
    assert stored["vram"] == 0.003
    assert f"plan: engine {engine}, batch size {batch}: " in told
    assert "not verified: this run is on cpu" in told
    # the plan's own word on that batch, and on one more
    config = configuration.resolve({}, stored)
    peaks = Peaks(*step_of(config, 10))
    peaks.at(PROBES[0])
    assert peaks.at(batch) <= 0.003e9 < peaks.at(batch + 1)
    monkeypatch.setattr(planning, "chosen", pytest.fail)
    again = ["fit", "--resume", "--epochs", "2", "--no-progress", "--out", str(folder)]
    assert cli.main(again) == 0
    after = configuration.load(folder / "config.yaml")
    assert (after["engine"], after["batch_size"], after["vram"]) == (engine, batch, 0.003)


def test_a_batch_is_no_larger_than_the_data_and_an_engine_that_was_asked_for_stays(
    tiny: Tiny,
) -> None:
    config = tiny(vram=1.0, engine="lean", **ARCH)
    found, told = planning.chosen(config, 10, samples=30)
    assert (found.engine, found.batch_size) == ("lean", 30)
    assert "lean, batch size 30" in told


def test_nothing_is_written_where_no_batch_fits(tiny: Tiny) -> None:
    config = tiny(vram=1e-5, engine="off", **ARCH)
    with pytest.raises(CamtrainError, match="too little"):
        fit(config)
    assert not (Path(config.out) / "config.yaml").exists()


def test_more_than_the_budget_on_a_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    check = planning.WithinBudget(1.0, told.append)
    module: Any = SimpleNamespace(device=torch.device("cuda", 0))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_idx=1))
    trainer: Any = SimpleNamespace(fit_loop=loop)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 10**9)
    check.on_train_start(trainer, module)
    check.on_train_batch_end(trainer, module)
    assert told == []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 10**9 + 1)
    with pytest.raises(CamtrainError, match="vram: a step took 954 MiB, the budget is 1 GB"):
        check.on_train_batch_end(trainer, module)


def test_a_study_shares_one_batch_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "study.yaml"
    file.write_text("vram: 11\n")
    words = ["study", "recipes", "--config", str(file), "--out", str(tmp_path / "study")]
    assert cli.main(words) == 1
    assert "vram: the runs of a study share one batch size" in capsys.readouterr().err
