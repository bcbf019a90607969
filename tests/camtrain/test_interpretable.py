"""The recipe ``interpretable``: defaults, a run end to end, the engine, resuming."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from camtrain import cli
from camtrain.config import FitConfig
from camtrain.data.module import CamtrainData
from camtrain.errors import CamtrainError
from camtrain.fit import fit
from camtrain.models import build_model
from camtrain.trained import load_run
from camtrain.training import InterpretableClassifier

import camkernels as ck

Tiny = Callable[..., FitConfig]
BASE = {"recipe": "interpretable", "beta": 0.0}


def parse(*argv: str) -> FitConfig:
    return cli.fit_config(cli.parser().parse_args(["fit", *argv]))


def test_defaults() -> None:
    config = parse("--recipe", "interpretable")
    assert (config.error, config.gradient_weight, config.every) == ("cosine", 1e-2, 1)
    assert (config.engine, config.warmup_epochs, config.beta) == ("off", 0, 0.0)
    assert parse("--recipe", "interpretable", "--error", "histogram").error == "histogram"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--error", "sigmoid"), "error: recipe 'entropy' does not read it, got 'sigmoid'"),
        (
            ("--recipe", "stanford-dogs", "--data", "digits", "--engine", "lean"),
            "engine: recipe .stanford-dogs. does not read it",
        ),
        (("--recipe", "interpretable", "--beta", "1"), "take recipe 'entropy' or 'consistency'"),
        (("--recipe", "interpretable", "--alpha", "1"), "alpha: .*take recipe 'consistency'"),
        (("--recipe", "interpretable", "--every", "0"), "every: must be at least 1, got 0"),
        (("--recipe", "consistency", "--gradient-weight", "1"), "gradient_weight: recipe"),
    ],
)
def test_mistakes_are_named(argv: tuple[str, ...], message: str) -> None:
    with pytest.raises(CamtrainError, match=message):
        parse(*argv)


def rows_of(config: FitConfig) -> list[dict[str, str]]:
    with open(Path(config.out) / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_end_to_end(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    without = tiny(**BASE, epochs=4, gradient_weight=0.0, out=str(tmp_path / "without"))
    fit(without, quiet=True)
    config = tiny(**BASE, epochs=4, error="cosine", gradient_weight=5.0)
    run = fit(config)
    assert "error -" in capsys.readouterr().out
    first, *_, last = rows_of(config)
    # the cosine rises where it is paid for
    lower = float(rows_of(without)[-1]["train/gradient_error"])
    assert float(last["train/gradient_error"]) < lower - 0.05
    assert "test/gradient_error" not in first
    assert float(first["train/gradient_norm"]) > 0
    assert run.head == "input gradient, engine off"
    summary = json.loads((Path(config.out) / "summary.json").read_text())
    assert summary["head"] == run.head
    for name in ("curves.png", "overlays.png", "model.pt", "classes.json"):
        assert (Path(config.out) / name).is_file()
    # the weights are those of a plain network
    network = load_run(Path(config.out), torch.device("cpu"))
    kinds = {type(module).__module__ for module in network.model.modules()}
    assert not any(kind.startswith("camkernels") for kind in kinds)
    ck.GradCAM(network.model, network.layer).explain(torch.rand(2, 3, 32, 32))


def test_the_step_is_the_criterions(tiny: Tiny) -> None:
    config = tiny(**BASE, gradient_weight=0.3, error="histogram", warmup_epochs=1)
    data = CamtrainData(config)
    torch.manual_seed(0)
    model = build_model(config, len(data.classes))
    module = InterpretableClassifier(model, config, len(data.classes))
    assert module.criterion.error == "histogram"
    assert module.criterion.weight == 0.3
    images, targets = torch.rand(4, 3, 32, 32), torch.tensor([1, 2, 3, 4])
    loss = module._step({"images": images, "targets": targets}, "train")
    terms = module.criterion.terms
    expected = terms["cross_entropy"] + 0.3 * terms["gradient_error"]
    torch.testing.assert_close(loss.detach(), expected)
    values = module.split("train").compute()
    assert values["gradient_error"] == pytest.approx(float(terms["gradient_error"]))
    module.close()


def states(config: FitConfig) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(Path(config.out) / "model.pt", weights_only=True)
    return state


def test_engine_and_modules_train_alike(tiny: Tiny, tmp_path: Path) -> None:
    found = {}
    for engine in ("off", "fast", "lean"):
        config = tiny(**BASE, gradient_weight=0.1, engine=engine, precision="64-true",
                      out=str(tmp_path / engine))  # fmt: skip
        fit(config, quiet=True)
        found[engine] = states(config)
    for engine in ("fast", "lean"):
        for name, value in found["off"].items():
            torch.testing.assert_close(found[engine][name], value, rtol=1e-6, atol=1e-8)


def test_a_resumed_run_ends_alike(tiny: Tiny, tmp_path: Path) -> None:
    """Also where the error is taken at every second step, and there are three in an epoch."""
    whole = tiny(**BASE, gradient_weight=0.2, every=2, epochs=2, out=str(tmp_path / "whole"))
    fit(whole, quiet=True)
    parts = tiny(**BASE, gradient_weight=0.2, every=2, epochs=1, out=str(tmp_path / "parts"))
    fit(parts, quiet=True)
    again = tiny(**BASE, gradient_weight=0.2, every=2, epochs=2, out=str(tmp_path / "parts"))
    fit(again, resume=True, quiet=True)
    expected = states(whole)
    assert all(torch.equal(value, expected[name]) for name, value in states(again).items())


def test_a_network_that_no_engine_can_run(tiny: Tiny) -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer3 = torch.nn.Linear(3, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer3(x.mean((2, 3)))

    with pytest.raises(CamtrainError, match="engine: the network has no 2d convolution"):
        InterpretableClassifier(Odd(), tiny(**BASE, engine="lean"), 10)
