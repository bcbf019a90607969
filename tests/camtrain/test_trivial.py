"""The trivial solutions of the consistency loss: when they are told, and with what advice."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from camtrain import config as configuration
from camtrain.config import FitConfig
from camtrain.fit import fit
from camtrain.recorder import Recorder
from camtrain.trivial import TrivialSolutions, advice
from torch import nn

Tiny = Callable[..., FitConfig]


@pytest.mark.parametrize(
    ("shares", "weights", "words"),
    [
        ({"dead": 0.4, "uniform": 0.1}, (0.1, 1e-6), ""),
        ({"dead": 0.6, "uniform": 0.0}, (0.1, 1e-6), "60% of the training maps are all zero"),
        ({"dead": 0.6, "uniform": 0.0}, (0.1, 1e-6), "lower --beta"),
        ({"dead": 0.6, "uniform": 0.0}, (0.1, 0.0), "lower --alpha"),
        ({"dead": 0.0, "uniform": 0.2}, (0.1, 1e-6), "raise --beta"),
        ({"dead": 0.0, "uniform": 0.2}, (0.0, 0.0), "alpha and beta are 0"),
        ({"dead": 0.0, "uniform": 0.2}, (9.0, 0.0), "lower --alpha"),
    ],
)
def test_advice_names_what_to_change(
    shares: dict[str, float], weights: tuple[float, float], words: str
) -> None:
    config = configuration.resolve(
        {"recipe": "consistency", "alpha": weights[0], "beta": weights[1]}
    )
    row = {"epoch": 3, **{f"train/{name}": value for name, value in shares.items()}}
    told = advice(row, config)
    assert words in told
    assert bool(told) == bool(words)


@pytest.mark.parametrize(
    ("shares", "weights", "words"),
    [
        ({"dead_views": 0.6}, {"norm_weight": 0.1}, "lower --norm-weight, which pays"),
        ({"dead_views": 0.6}, {"alpha": 1, "norm_weight": 0.1}, "maps of zero, or --alpha"),
        ({"dead_views": 0.6}, {"alpha": 1, "beta": 1}, "lower --alpha, or --beta, whose entropy"),
        ({"uniform": 0.6}, {"alpha": 1}, "raise --norm-weight, which pays for sparse maps, or low"),
        # of the entropy, where no views are compared
        ({"dead": 0.6}, {"beta": 1}, ""),
    ],
)
def test_advice_of_several_regularisers(
    shares: dict[str, float], weights: dict[str, float], words: str
) -> None:
    config = configuration.resolve({"recipe": "combined", "beta": 0.0, **weights})
    told = advice({"epoch": 1, **{f"train/{k}": v for k, v in shares.items()}}, config)
    assert words in told
    assert bool(told) == bool(words)


def constant(value: float) -> nn.Module:
    """Its layer 1 puts out ``value``, or 0 below 0, whatever the picture."""
    first = nn.Conv2d(3, 4, 3)
    nn.init.zeros_(first.weight)
    nn.init.constant_(first.bias, value)  # type: ignore[arg-type]
    return nn.Sequential(
        first, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )  # fmt: skip


def uniform() -> nn.Module:
    return constant(1.0)


def dead() -> nn.Module:
    return constant(-1.0)


@pytest.fixture
def told_on(
    run_on: Tiny, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Callable[..., list[str]]:
    """What runs of such a network warn of."""
    monkeypatch.setitem(sys.modules, "mine", sys.modules[__name__])

    def run(network: str, resume: bool = False, **options: Any) -> list[str]:
        config = run_on(arch=f"mine:{network}", layer="1", lr=1e-9, **options)
        with caplog.at_level(logging.WARNING, "camtrain"):
            fit(config, quiet=True)
            if resume:
                fit(dataclasses.replace(config, epochs=3), resume=True, quiet=True)
        return [r.message for r in caplog.records if "trivial solution" in r.message]

    return run


def test_trivial_solutions_are_told_once(told_on: Callable[..., list[str]], run_on: Tiny) -> None:
    (told,) = told_on("uniform", resume=True, epochs=2, insertion_steps=0)
    assert "epoch 1: 100% of the training maps are nearly uniform or cover the picture" in told
    assert "raise --beta" in told
    callback = TrivialSolutions(run_on(), Recorder(Path("unused")))
    callback.load_state_dict({"warned": True})
    assert callback.state_dict() == {"warned": True}


def test_trivial_solutions_of_several_regularisers(told_on: Callable[..., list[str]]) -> None:
    (told,) = told_on("dead", recipe="combined", alpha=1.0, beta=0.0, norm_weight=1e-3,
                      insertion_steps=224)  # fmt: skip
    assert (
        "epoch 1: 100% of the training maps are all zero (alpha = 1, norm_weight = 0.001)" in told
    )
    assert "lower --norm-weight" in told
