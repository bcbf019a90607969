"""The examples: their diffs are short, and the losses that trainers see are the eager ones.

An after script runs as it is, in float64 (the default dtype is set). There rounding does not grow
to what can be seen; in float32 it does, for the entropy of a map that is about to die has a steep
gradient. Its criterion is watched: a copy of the model is taken when the criterion is made, and
images, targets and loss at each call that trains. The oracle trains the copy on the same batches in
plain PyTorch, with the optimiser of the script.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from eager_losses import eager_consistency, eager_entropy, eager_interpretable
from networks import Small, Switched
from watched import LR, Watched, assert_alike, train_eagerly

import camkernels as ck

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
TRAINERS = {
    "plain_loop": (),
    "lightning": ("lightning",),
    "huggingface": ("transformers", "accelerate"),
    "accelerate": ("accelerate",),
}
"""Folder of an example -> what it imports beside torch and Pillow."""
SIDE = 32
HEAVY = "transformers is 129 MB, which make test does not install"


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ResNet of transformers, with random weights, in a folder."""
    transformers = pytest.importorskip("transformers", reason=HEAVY)
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=4,
        hidden_sizes=[4, 4, 6, 8],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        num_labels=5,
    )
    folder = tmp_path_factory.mktemp("resnet")
    transformers.ResNetForImageClassification(config).double().save_pretrained(folder)
    return folder


def script(trainer: str, name: str) -> Any:
    for package in TRAINERS[trainer]:
        pytest.importorskip(package, reason=HEAVY if package == "transformers" else None)
    return importlib.import_module(f"examples.{trainer}.{name}")


@pytest.fixture
def run(
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Iterator[Callable[..., None]]:
    """Runs a script for 20 batches, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def call(trainer: str, name: str, accumulate: int = 1) -> None:
        module = script(trainer, name)
        model, side = "networks:Small", SIDE
        if trainer == "huggingface":
            model, side = str(request.getfixturevalue("saved_model")), 2 * SIDE
        module.main(
            [
                *("--data", str(pictures), "--model", model, "--side", str(side)),
                *("--epochs", "2", "--batch", "4", "--accumulate", str(accumulate)),
                *("--lr", str(LR)),
            ]
        )

    yield call
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


def difference(trainer: str) -> list[str]:
    """Lines of ndiff, without empty ones."""
    before, after = (
        (EXAMPLES / trainer / f"{name}.py").read_text().splitlines() for name in ("before", "after")
    )
    return [line for line in difflib.ndiff(before, after) if line[2:].strip()]


@pytest.mark.parametrize("trainer", TRAINERS)
def test_at_most_five_lines_differ(trainer: str) -> None:
    lines = difference(trainer)
    assert 0 < sum(line.startswith("+ ") for line in lines) <= 5
    assert sum(line.startswith("- ") for line in lines) <= 5


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_guide_shows_the_diff(trainer: str) -> None:
    lines = [line[2:] for line in difference(trainer) if line.startswith("+ ")]
    guide = (ROOT / "docs" / "trainers.md").read_text().splitlines()
    assert [line for line in lines if f"+{line}" not in guide] == []


@pytest.mark.parametrize("trainer", TRAINERS)
def test_before(trainer: str, run: Callable[..., None]) -> None:
    run(trainer, "before")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_plain_loop(
    accumulate: int, run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(monkeypatch, ck.CAMEntropyLoss)
    run("plain_loop", "after", accumulate)
    losses = train_eagerly(watched.twin, eager_entropy("layer4"), watched, accumulate)
    assert_alike(watched, watched.twin, losses)
    assert watched.without_grad > 0


@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_lightning(
    accumulate: int, run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(monkeypatch, ck.InterpretableGradientLoss)
    run("lightning", "after", accumulate)
    twin = Small(5, Switched)
    twin.load_state_dict(watched.before)
    losses = train_eagerly(twin, eager_interpretable, watched, accumulate)
    assert_alike(watched, twin, losses)
    assert watched.without_grad > 0


@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerate(
    accumulate: int, run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(monkeypatch, ck.CAMConsistencyLoss)
    run("accelerate", "after", accumulate)
    twin = Small(5)
    twin.load_state_dict(watched.before)
    losses = train_eagerly(twin, eager_consistency, watched, accumulate)
    assert_alike(watched, twin, losses)
    assert watched.without_grad > 0


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_huggingface(
    accumulate: int, run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(monkeypatch, ck.CAMEntropyLoss)
    run("huggingface", "after", accumulate)
    loss = eager_entropy("resnet.encoder.stages.3", summed=True)
    losses = train_eagerly(
        watched.twin, loss, watched, accumulate, momentum=0.0, divide=4 * accumulate
    )
    assert_alike(watched, watched.twin, losses)
    assert watched.without_grad > 0
