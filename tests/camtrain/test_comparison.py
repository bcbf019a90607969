"""``camtrain study recipes``: every recipe trained, scored alike, tabulated, and gone on with."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from camtrain import cli, comparison, paper_forms, scoring
from camtrain.errors import CamtrainError
from camtrain.trained import load_run
from camtrain.training import Classifier

import camkernels as ck
from camkernels import metrics

FIT = ["--image-size", "32", "--limit-train", "40", "--limit-test", "20", "--batch-size", "20",
       "--epochs", "1", "--accelerator", "cpu", "--no-progress"]  # fmt: skip


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "study"


def command_for(out: Path) -> list[str]:
    return ["study", "recipes", "--out", str(out), "--steps", "4", "--score-limit", "8",
            "--set", "entropy.beta=0.5", "entropy.warmup_epochs=0", *FIT]  # fmt: skip


@pytest.fixture
def command(out: Path) -> list[str]:
    return command_for(out)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of all recipes."""
    out = tmp_path_factory.mktemp("finished") / "study"
    assert cli.main(command_for(out)) == 0
    return out


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_all_recipes(finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    out, command = finished, command_for(finished)
    rows = rows_of(out / "table.csv")
    assert [row["recipe"] for row in rows] == list(comparison.RECIPES)
    cells = [json.loads(path.read_text()) for path in sorted(out.glob("*/result.json"))]
    assert len(cells) == 4
    for row in rows:
        (mine,) = (cell for cell in cells if cell["recipe"] == row["recipe"])
        for title, _ in comparison.COLUMNS:
            value = mine.get(title)
            assert row[title] == ("" if value is None else str(float(value))), title
    text = (out / "table.md").read_text()
    assert "| | baseline | entropy | consistency | interpretable |" in text
    for name in ("examples.png", "report.html", "cells.csv"):
        assert (out / name).is_file()
    assert not list(out.glob("*/checkpoints"))
    assert "beta: 0.5" in (out / "entropy-seed0" / "config.yaml").read_text()

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(comparison, "fit", never)
    capsys.readouterr()
    assert cli.main(command) == 0
    assert capsys.readouterr().out.count("done before") == 4
    assert rows_of(out / "table.csv") == rows
    assert cli.main([*command, "--lr", "0.5"]) == 1
    assert "given: the study in" in capsys.readouterr().err


def test_figures_of_a_cell(command: list[str], out: Path) -> None:
    assert cli.main([*command, "--recipes", "baseline"]) == 0
    (row,) = rows_of(out / "table.csv")
    assert not [name for name in row if name.endswith(" sd")]
    place = out / "baseline-seed0"
    run = load_run(place, torch.device("cpu"))
    from camtrain.data.module import CamtrainData

    assert run.config is not None
    data = CamtrainData(run.config)
    chosen = [data.test[i] for i in range(8)]  # 20 canvases begin with the 8 that are scored
    images = run.normalise(torch.stack([item["images"] for item in chosen]))
    targets = torch.stack([item["targets"] for item in chosen])
    maps = ck.GradCAM(run.model, run.layer).explain(images, targets)
    regional = metrics.EnergyInRegion()
    regional.update(maps, torch.stack([item["boxes"] for item in chosen]), (32, 32))
    assert float(row["energy %"]) == pytest.approx(100 * float(regional.compute()), rel=1e-4)
    gradients = ck.InputGradient(run.model)(images, targets)
    variation = float(metrics.total_variation(gradients).mean())
    assert float(row["gradient TV"]) == pytest.approx(variation, rel=1e-4)
    metric = metrics.InsertionAUC(run.model, steps=4)
    metric.update(images, maps, targets)
    assert float(row["insertion"]) == pytest.approx(float(metric.compute()), rel=1e-4)


@pytest.mark.slow
def test_an_interrupted_study_goes_on(
    command: list[str], out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    step = Classifier.training_step

    def interrupted(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.config.recipe == "entropy":
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    few = [*command, "--recipes", "baseline", "entropy"]
    monkeypatch.setattr(Classifier, "training_step", interrupted)
    assert cli.main(few) == 130
    assert "1 of 2 cells are done and kept" in capsys.readouterr().err
    monkeypatch.setattr(Classifier, "training_step", step)
    assert cli.main(few) == 0
    assert capsys.readouterr().out.count("done before") == 1
    assert [row["recipe"] for row in rows_of(out / "table.csv")] == ["baseline", "entropy"]


def test_mistakes_are_named(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(text: str, *arguments: str) -> None:
        assert cli.main(["study", "recipes", "--out", str(out), *FIT, *arguments]) == 1
        assert text in capsys.readouterr().err
        assert not out.exists()

    refused("set: expected recipe.key=value", "--set", "entropy=1")
    refused("set: expected recipe.key=value", "--set", "entropie.beta=1")
    refused("unknown key 'betta'; did you mean beta", "--set", "entropy.betta=1")
    refused("in recipe 'baseline'; --set RECIPE.KEY=VALUE", "--set", "baseline.beta=1")
    refused("recipes: unknown 'entropi'", "--recipes", "entropi")
    refused("alphas: study 'recipes' does not read --alphas", "--alphas", "1")
    assert cli.main(["study", "consistency", "--set", "entropy.beta=1"]) == 1
    assert "set: study 'consistency' does not read --set" in capsys.readouterr().err


def test_means_and_deviations_over_seeds() -> None:
    options = comparison.Options(recipes=("entropy", "baseline"), seeds=(0, 1))
    cells = [
        {"recipe": recipe, "seed": seed, "accuracy %": 40.0 + 10 * seed + extra, "ce": ce}
        for recipe, extra, ce in (("baseline", 0.0, None), ("entropy", 4.0, 2.5))
        for seed in (0, 1)
    ]
    entropy, baseline = comparison.tabulate(options, cells)
    assert (entropy["recipe"], entropy["seeds"]) == ("entropy", 2)
    assert (entropy["accuracy %"], entropy["accuracy % sd"]) == (49.0, 5.0)
    assert (baseline["accuracy %"], baseline["ce"], baseline["ce sd"]) == (45.0, None, None)
    text = comparison.markdown([entropy, baseline])
    assert "| accuracy % ↑ | 49.0 ± 5.0 | 45.0 ± 5.0 |" in text
    assert "| ce ↓ | 2.500 ± 0.000 | - |" in text


def test_a_cell_that_diverged_leaves_its_recipe_without_figures() -> None:
    options = comparison.Options(recipes=("baseline",), seeds=(0, 1))
    whole = {"recipe": "baseline", "seed": 0, "accuracy %": 50.0}
    rows = comparison.tabulate(options, [whole, {"recipe": "baseline", "seed": 1, "diverged": "x"}])
    assert rows[0]["accuracy %"] is None
    assert "2 (1 diverged)" in comparison.markdown(rows)
    with pytest.raises(CamtrainError, match="recipes: unknown"):
        comparison.compare(Path("nowhere"), {}, comparison.Options(recipes=("x",)))


@pytest.mark.slow
def test_the_forms_of_the_papers(finished: Path) -> None:
    out = finished
    text = (out / "papers.md").read_text()
    (row,) = (row for row in rows_of(out / "table.csv") if row["recipe"] == "interpretable")
    found = [float(row[n]) for n in ("accuracy %", "AD %", "AG %", "AI %", "insertion", "deletion")]
    assert f"| ours | {' | '.join(paper_forms.shown(v) for v in found)} |" in text
    (row,) = (row for row in rows_of(out / "table.csv") if row["recipe"] == "consistency")
    accuracy, consistency, area = (
        float(row[n]) for n in ("accuracy %", "consistency %", "insertion")
    )
    shown = [f"{v:.3f}" if v < 10 else f"{v:.1f}" for v in (accuracy, consistency, area)]
    assert f"| smallresnet | ours | {' | '.join(shown)} |" in text
    # the sample, by other means
    network = load_run(out / "entropy-seed0", torch.device("cpu"))
    (head,) = (line for line in text.splitlines() if "Table I:" in line)
    name = head.partition("test picture ")[2].partition(",")[0]
    assert network.config is not None
    data = scoring.WholePictures(network.config, 40)
    (item,) = (data[i] for i in range(len(data)) if data[i]["name"] == name)
    logits = network.model(network.normalise(item["images"][None]))[0]
    (line,) = (line for line in text.splitlines() if line.startswith("| max logit"))
    columns = next(x for x in text.splitlines() if x.startswith("|  | β")).split("|")
    place = next(i for i, column in enumerate(columns) if "0.5" in column)
    assert float(line.split("|")[place]) == pytest.approx(logits.max().item(), abs=6e-3)
    for file in ("curves.png", "consistency.png"):
        assert (out / file).is_file()
        assert f"]({file})" in text
    report = (out / "report.html").read_text()
    assert "Table I" in report
    assert report.count("<img") >= 3
