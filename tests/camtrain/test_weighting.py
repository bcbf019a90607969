"""Warm-up, ramp, balance, and several regularisers in one run."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from camtrain import cli
from camtrain.config import FitConfig
from camtrain.errors import CamtrainError
from camtrain.fit import fit
from camtrain.models import build_model
from camtrain.training import Classifier, CombinedClassifier, make_classifier
from camtrain.weighting import Balance, scheduled

Tiny = Callable[..., FitConfig]
COMBINED: dict[str, Any] = {
    "recipe": "combined",
    "alpha": 0.5,
    "beta": 0.2,
    "gradient_weight": 0.3,
    "norm_weight": 1e-4,
    "window_size": 3,
    "warmup_epochs": 0,
}


def rows_of(config: FitConfig) -> list[dict[str, str]]:
    with open(Path(config.out) / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("ramp", "expected"),
    [("linear", [0, 0, 0, 0.25, 0.5, 1, 1]), ("cosine", [0, 0, 0, 0.14645, 0.5, 1, 1])],
)
def test_the_schedule(tiny: Tiny, ramp: str, expected: list[float]) -> None:
    config = tiny(warmup_epochs=2, ramp_epochs=4, ramp=ramp)
    found = [scheduled(config, at) for at in (0.1, 1.9, 2, 3, 4, 6, 7.5)]
    assert found == pytest.approx(expected, abs=1e-5)
    at_once = tiny(warmup_epochs=1)
    assert [scheduled(at_once, at) for at in (0.5, 1, 1.01)] == [0, 0, 1]


class Spy:
    """What a criterion's weights were at each step of a run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
        self.seen: list[tuple[float, ...]] = []
        step = Classifier.training_step

        def spied(module: Classifier, batch: dict[str, Any], batch_idx: int) -> Any:
            loss = step(module, batch, batch_idx)
            self.seen.append(tuple(getattr(module.criterion, name) for name in names))
            return loss

        monkeypatch.setattr(Classifier, "training_step", spied)


@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        ("entropy", {"beta": 0.4}),
        ("consistency", {"alpha": 0.5, "beta": 0.1}),
        ("interpretable", {"weight": 0.3}),
    ],
)
def test_weights_rise_step_by_step(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, recipe: str, names: dict[str, float]
) -> None:
    spy = Spy(monkeypatch, *names)
    given = {"gradient_weight" if k == "weight" else k: v for k, v in names.items()}
    extra = {"insertion_steps": 0, "window_size": 3} if recipe == "consistency" else {}
    base = {"beta": 0.0, **given, **extra}
    config = tiny(recipe=recipe, **base, epochs=3, warmup_epochs=1, ramp_epochs=1, limit_test=10,
                  limit_train=40)  # fmt: skip
    fit(config, quiet=True)
    shares = [0, 0, 0.5, 1, 1, 1]  # two steps in an epoch
    for seen, share in zip(spy.seen, shares, strict=True):
        assert seen == pytest.approx(tuple(share * value for value in names.values()))


def test_balance_measures_norms() -> None:
    """The scale is that by which the gradient of the regulariser has its share."""
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    unused = torch.nn.Parameter(torch.ones(2))
    balance = Balance(0.5, every=10)
    assert balance.due(0)

    def measure(slope: float, step: int, share: float = 1.0) -> float:
        cross_entropy = weight.square().sum() / 2  # gradient of norm 5
        regularizer = slope * share * balance.scale * weight.sum() / math.sqrt(2)
        return balance.measure(
            (cross_entropy, regularizer), [weight, unused], share, step, lambda norms: norms
        )

    assert measure(0.1, 0) == pytest.approx(25)
    assert balance.scale == pytest.approx(25)
    assert not balance.due(9)
    assert balance.due(10)
    # half way up the ramp the scale is that of full weights; a new one is a geometric mean
    assert measure(0.4, 10, share=0.5) == pytest.approx(0.5)
    assert balance.scale == pytest.approx(12.5)
    for bad in (0.0, math.inf, math.nan):
        assert measure(bad, 20) == 1.0
        assert balance.scale == pytest.approx(12.5)
        assert not balance.due(29)  # dead maps are not measured at every step
    again = Balance(0.5, every=10)
    again.load_state_dict(balance.state_dict())
    assert (again.scale, again.known, again.last) == (balance.scale, True, 20)
    # what could not be measured at first is no value to take a mean with
    first = Balance(0.5, every=10)
    nothing = (weight.square().sum() / 2, 0.0 * weight.sum())
    assert first.measure(nothing, [weight], 1.0, 0, lambda norms: norms) == 1.0
    sound = (weight.square().sum() / 2, 0.1 * weight.sum() / math.sqrt(2))
    assert first.measure(sound, [weight], 1.0, 10, lambda norms: norms) == pytest.approx(25)
    assert weight.grad is None


@pytest.mark.parametrize("engine", ["off", "lean"])
def test_a_balanced_step(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    """The first step has the wanted share of gradients already, and leaves nothing behind."""
    monkeypatch.setattr(Classifier, "global_step", 0)
    monkeypatch.setattr(Classifier, "_mean_over_processes", lambda self, norms: norms)
    config = tiny(recipe="interpretable", beta=0.0, gradient_weight=0.01, engine=engine,
                  balance=0.25, balance_every=2, precision="64-true")  # fmt: skip
    torch.manual_seed(0)
    model = build_model(config, 10).double()
    module = make_classifier(model, config, 10)
    images, targets = torch.rand(4, 3, 32, 32), torch.tensor([1, 2, 3, 4])
    module._now = 1.0
    loss = module._step({"images": images, "targets": targets}, "train")
    assert loss is not None
    weights = list(module.model.parameters())
    assert all(weight.grad is None for weight in weights)
    found = torch.autograd.grad(loss, weights)
    module.criterion.weight = 0.0
    logits = module.model(images.double())
    plain = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, targets), weights)
    norm = torch.cat([p.flatten() for p in plain]).norm()
    rest = torch.cat([(f - p).flatten() for f, p in zip(found, plain, strict=True)]).norm()
    assert rest / norm == pytest.approx(0.25, rel=1e-6)
    module.close()


def test_a_balanced_run_resumes_alike(tiny: Tiny, tmp_path: Path) -> None:
    states = []
    for name, parts in (("whole", (3,)), ("parts", (1, 3))):
        for number, epochs in enumerate(parts):
            config = tiny(beta=0.1, balance=0.3, balance_every=2, epochs=epochs, warmup_epochs=0,
                          ramp_epochs=2, limit_test=10, out=str(tmp_path / name))  # fmt: skip
            fit(config, quiet=True, resume=number > 0)
        states.append(torch.load(tmp_path / name / "model.pt", weights_only=True))
        assert float(rows_of(config)[-1]["weight_scale"]) != 1.0
    assert all(torch.equal(value, states[0][name]) for name, value in states[1].items())


def test_a_combined_run(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny(**COMBINED, epochs=2)
    run = fit(config)
    assert run.head == "closed form: pool -> linear; entropy, gradient, consistency"
    row = rows_of(config)[-1]
    for name in ("entropy", "dead", "consistency", "sparsity", "dead_views", "gradient_error"):
        assert math.isfinite(float(row[f"train/{name}"])), name
    assert float(row["test/consistency"]) > 0
    assert "error" in capsys.readouterr().out
    for name in ("curves.png", "overlays.png", "model.pt"):
        assert (Path(config.out) / name).is_file()


def test_a_combined_step_is_the_sum(tiny: Tiny) -> None:
    config = tiny(**COMBINED)
    torch.manual_seed(0)
    module = CombinedClassifier(build_model(config, 10), config, 10)
    images, targets = torch.rand(4, 3, 32, 32), torch.tensor([1, 2, 3, 4])
    loss = module._step({"images": images, "targets": targets}, "train")
    assert loss is not None
    terms = module.criterion.terms
    expected = (
        terms["cross_entropy"]
        + 0.2 * terms["entropy/entropy"]
        + 0.3 * terms["gradient/gradient_error"]
        + 0.5 * (1 - terms["consistency/consistency"])
        + 1e-4 * terms["consistency/sparsity"]
    )
    torch.testing.assert_close(loss.detach(), expected)
    module._set_weights(0.5)
    assert module.criterion["entropy"].beta == 0.1
    assert module.criterion["consistency"].beta == pytest.approx(5e-5)
    module.close()
    # what has no weight is not there
    few = CombinedClassifier(build_model(config, 10), tiny(**{**COMBINED, "beta": 0.0}), 10)
    assert list(few.criterion) == ["gradient", "consistency"]
    few._set_weights(1.0)
    few.close()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--recipe", "combined"), "recipe: 'combined' needs one of alpha, beta, gradient_weight"),
        (("--norm-weight", "1"), "norm_weight: recipe 'entropy' does not read it"),
        (("--ramp-epochs", "-1"), "ramp_epochs: must be at least 0"),
        (("--balance-every", "0"), "balance_every: must be at least 1"),
        (("--balance", "-1"), "balance: must be at least 0"),
        (("--balance", "1", "--precision", "16-mixed"), "balance: gradients would be measured"),
        (("--recipe", "baseline", "--balance", "1"), "balance: recipe 'baseline' does not"),
        (("--recipe", "combined", "--alpha", "1", "--compare", "x"), "compare: recipe 'combined'"),
    ],
)
def test_mistakes_are_named(argv: tuple[str, ...], message: str) -> None:
    with pytest.raises(CamtrainError, match=message):
        cli.fit_config(cli.parser().parse_args(["fit", *argv]))
