"""Gradients over several batches, and what becomes of them after the optimiser's step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from camtrain import cli
from camtrain.config import FitConfig
from camtrain.fit import fit
from camtrain.training import Classifier
from torch import nn

Tiny = Callable[..., FitConfig]


class Little(nn.Module):
    """Without BatchNorm, which sees the parts of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Conv2d(3, 8, 5, stride=2), nn.ReLU())
        self.fc = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.layer(x).mean((2, 3)))


def little() -> nn.Module:
    return Little()


BASE: dict[str, Any] = {
    "arch": f"{__name__}:little", "layer": "layer", "precision": "64-true", "augment": False,
    "optimizer": "sgd", "lr": 0.05, "epochs": 2,
}  # fmt: skip


def weights(config: FitConfig) -> dict[str, torch.Tensor]:
    fit(config, quiet=True)
    found: dict[str, torch.Tensor] = torch.load(Path(config.out) / "model.pt")
    return found


@pytest.mark.parametrize(
    "recipe",
    [
        {"recipe": "entropy", "beta": 0.02},
        {"recipe": "interpretable", "gradient_weight": 0.5, "warmup_epochs": 0, "beta": 0.0},
    ],
)
def test_parts_of_a_batch_train_as_the_batch(
    tiny: Tiny, tmp_path: Path, recipe: dict[str, Any]
) -> None:
    given = {**BASE, **recipe, "limit_train": 48}
    whole = weights(tiny(**given, batch_size=24, out=str(tmp_path / "whole")))
    parts = weights(tiny(**given, batch_size=12, accumulate=2, out=str(tmp_path / "parts")))
    alone = weights(tiny(**given, batch_size=12, out=str(tmp_path / "alone")))
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-9, atol=1e-12)
        assert (alone[name] - value).abs().max() > 1e-6


def test_steps_are_the_optimisers_and_gradients_are_freed_after_them(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[bool] = []
    step = Classifier.training_step

    def spied(module: Classifier, batch: dict[str, Any], batch_idx: int) -> Any:
        held.append(any(p.grad is not None for p in module.model.parameters()))
        return step(module, batch, batch_idx)

    monkeypatch.setattr(Classifier, "training_step", spied)
    config = tiny(**{**BASE, "epochs": 1}, batch_size=15, accumulate=3)
    run = fit(config, quiet=True)
    assert held == [False, True, True, False]  # four batches, two steps
    assert run.rows[-1]["step"] == 2


def test_a_lazy_regulariser_counts_batches(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from camkernels.losses.interpretable_gradient import InterpretableGradientLoss

    calls: list[int] = []
    parts = InterpretableGradientLoss.parts

    def spied(self: Any, *args: Any) -> Any:
        if torch.is_grad_enabled():
            calls.append(self.calls)
        return parts(self, *args)

    monkeypatch.setattr(InterpretableGradientLoss, "parts", spied)
    config = tiny(**BASE, recipe="interpretable", gradient_weight=0.1, beta=0.0, batch_size=20,
                  accumulate=2, every=2)  # fmt: skip
    fit(config, quiet=True)
    assert calls == list(range(6))


def test_mistakes_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    assert cli.main(["fit", "--accumulate", "0", "--out", out]) == 1
    assert "accumulate: must be at least 1, got 0" in capsys.readouterr().err
    assert not Path(out).exists()
