"""CAMEntropyLoss: values and gradients against eager autograd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from nets import (
    SmallNet,
    batch,
    eager_loss,
    eager_maps,
    eager_statistics,
    largest_difference,
    model_and_twin,
    parameter_gradients,
)
from torch import Tensor, nn

import camkernels as ck

HEADS = ("linear", "mlp", "deep", "linear-linear", "dropout", "batch-norm", "tanh", "final-relu")
CLOSED = ("linear", "mlp", "deep", "linear-linear")


def both_gradients(
    model: nn.Module, twin: nn.Module, layer: str, beta: float = 3.0, **options: Any
) -> tuple[list[Tensor], list[Tensor], ck.CAMEntropyLoss]:
    images, targets = batch()
    criterion = ck.CAMEntropyLoss(model, layer, beta, **options)
    torch.manual_seed(3)  # the same dropout mask on both sides
    ours = parameter_gradients(model, criterion(model(images), targets))
    torch.manual_seed(3)
    regularizer = options.get("regularizer", "entropy")
    theirs = parameter_gradients(twin, eager_loss(twin, layer, images, targets, beta, regularizer))
    return ours, theirs, criterion


@pytest.mark.parametrize("regularizer", ["entropy", "area", "dispersion"])
@pytest.mark.parametrize("choice", ["auto", "autograd"])
@pytest.mark.parametrize("head", HEADS)
def test_parameter_gradients_equal_eager_autograd(head: str, choice: str, regularizer: str) -> None:
    model, twin = model_and_twin(head)
    ours, theirs, criterion = both_gradients(
        model, twin, "body", head=choice, regularizer=regularizer
    )
    assert largest_difference(ours, theirs) <= 1e-11
    closed = choice == "auto" and head in CLOSED
    assert criterion.head.startswith("closed form" if closed else "autograd")


def test_earlier_layer_takes_autograd() -> None:
    model, twin = model_and_twin()
    ours, theirs, criterion = both_gradients(model, twin, "body.2")
    assert largest_difference(ours, theirs) <= 1e-11
    assert "Conv2d in the head" in criterion.head


def test_regularizer_reaches_every_parameter() -> None:
    model, _ = model_and_twin("mlp")
    images, targets = batch()
    plain = ck.CAMEntropyLoss(model, "body", 0.0)
    without = parameter_gradients(model, plain(model(images), targets))
    plain.close()
    weighted = ck.CAMEntropyLoss(model, "body", 5.0)
    with_it = parameter_gradients(model, weighted(model(images), targets))
    named = [name for name, _ in model.named_parameters()]
    moved = {
        name
        for name, a, b in zip(named, without, with_it, strict=True)
        if float((a - b).abs().max()) > 1e-6
    }
    assert {"body.0.weight", "body.3.weight", "fc.1.weight", "fc.3.weight"} <= moved


def test_beta_zero_is_cross_entropy_to_the_bit_and_still_measures() -> None:
    model = SmallNet()
    images, targets = batch(dtype=torch.float32)
    criterion = ck.CAMEntropyLoss(model, "body", 0.0)
    logits = model(images)
    assert torch.equal(criterion(logits, targets), nn.functional.cross_entropy(logits, targets))
    assert criterion.terms["entropy"] > 0


def test_terms_against_eager() -> None:
    model, twin = model_and_twin()
    images, targets = batch()
    criterion = ck.CAMEntropyLoss(model, "body", 2.0)
    loss = criterion(model(images), targets)
    logits, maps = eager_maps(twin, "body", images, targets)
    expected = eager_statistics(maps)
    terms = criterion.terms
    live = expected["live"]
    for name in ("entropy", "area", "dispersion"):
        torch.testing.assert_close(terms[name], expected[name][live].mean())
    torch.testing.assert_close(terms["live"], live.sum().double())
    torch.testing.assert_close(terms["dead"], 1 - live.double().mean())
    torch.testing.assert_close(terms["cross_entropy"] + 2.0 * terms["regularizer"], loss.detach())
    torch.testing.assert_close(criterion.maps, maps.detach())
    assert not any(value.requires_grad for value in terms.values())
    assert logits.shape == (4, 5)


def test_dead_maps_count_for_nothing_but_are_told() -> None:
    model, _ = model_and_twin()
    images, targets = batch()
    with torch.no_grad():
        model.fc[1].weight[targets[0]] = -1.0  # post-ReLU activations: the map of class 0 is dead
    criterion = ck.CAMEntropyLoss(model, "body", 1.0)
    loss = criterion(model(images), targets)
    entropy = criterion.statistics.entropy
    assert entropy[0] == 0
    assert criterion.terms["dead"] >= 0.25
    live = entropy > 0
    torch.testing.assert_close(criterion.terms["regularizer"], entropy[live].mean())
    assert all(g.isfinite().all() for g in parameter_gradients(model, loss))


def test_all_dead_maps_give_cross_entropy() -> None:
    model, _ = model_and_twin()
    with torch.no_grad():
        model.fc[1].weight.copy_(-model.fc[1].weight.abs())
    images, targets = batch()
    criterion = ck.CAMEntropyLoss(model, "body", 1.0)
    logits = model(images)
    loss = criterion(logits, targets)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, targets))
    assert criterion.terms["dead"] == 1
    assert all(g.isfinite().all() for g in parameter_gradients(model, loss))


@pytest.mark.parametrize("head", ["linear", "mlp", "tanh"])
def test_other_classes_is_the_mean_over_absent_classes(head: str) -> None:
    model, twin = model_and_twin(head)
    images, targets = batch()
    criterion = ck.CAMEntropyLoss(model, "body", 2.0, other_classes=0.5)
    ours = criterion(model(images), targets)
    logits, maps = eager_maps(twin, "body", images, targets)
    true = eager_statistics(maps)
    values, lives = [], []
    for offset in range(1, 5):
        found = eager_statistics(eager_maps(twin, "body", images, (targets + offset) % 5)[1])
        values.append(found["entropy"])
        lives.append(found["live"])
    value, live = torch.stack(values), torch.stack(lives)
    theirs = nn.functional.cross_entropy(logits, targets) + 2.0 * (
        true["entropy"][true["live"]].mean() - 0.5 * value[live].mean()
    )
    # eval-mode BatchNorm would share one batch; in train mode the twin's forwards agree anyway
    torch.testing.assert_close(ours, theirs)
    ours_g, theirs_g = parameter_gradients(model, ours), parameter_gradients(twin, theirs)
    assert largest_difference(ours_g, theirs_g) <= 1e-11


def test_predicted_target() -> None:
    model, twin = model_and_twin()
    images, targets = batch()
    criterion = ck.CAMEntropyLoss(model, "body", 2.0, target="predicted")
    logits = model(images)
    criterion(logits, targets)
    maps = eager_maps(twin, "body", images, logits.argmax(1))[1]
    torch.testing.assert_close(criterion.maps, maps.detach())
    probabilities = torch.softmax(torch.randn(4, 5, dtype=torch.float64), 1)
    loss = criterion(logits, probabilities)  # mixup-style targets go with the predicted class
    expected = nn.functional.cross_entropy(logits, probabilities)
    torch.testing.assert_close(loss - 2.0 * criterion.terms["regularizer"], expected)


def test_normalize_divides_by_the_largest_entropy() -> None:
    model, _ = model_and_twin()
    images, targets = batch()
    plain = ck.CAMEntropyLoss(model, "body", 1.0)
    normalized = ck.CAMEntropyLoss(model, "body", 1.0, normalize=True)
    logits = model(images)
    plain(logits, targets)
    normalized(logits, targets)
    expected = plain.terms["entropy"] / math.log(36)
    torch.testing.assert_close(normalized.terms["entropy"], expected)
    torch.testing.assert_close(normalized.terms["regularizer"], expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_options(reduction: str) -> None:
    model, _ = model_and_twin()
    images, targets = batch()
    weight = torch.rand(5, dtype=torch.float64) + 0.5
    targets[1] = -7
    criterion = ck.CAMEntropyLoss(
        model, "body", 2.0, weight=weight, ignore_index=-7, label_smoothing=0.1, reduction=reduction
    )
    logits = model(images)
    loss = criterion(logits, targets)
    expected = nn.functional.cross_entropy(
        logits, targets, weight, ignore_index=-7, label_smoothing=0.1, reduction=reduction
    )
    entropy = criterion.statistics.entropy.clone()
    entropy[1] = 0  # the ignored sample has no map
    counted = entropy > 0
    regularizer = {"mean": entropy[counted].mean(), "sum": entropy.sum(), "none": entropy}
    torch.testing.assert_close(loss, expected + 2.0 * regularizer[reduction])
    assert list(criterion.state_dict()) == ["weight"]


def test_several_layers_are_averaged() -> None:
    model, twin = model_and_twin()
    images, targets = batch()
    criterion = ck.CAMEntropyLoss(model, ["body.2", "body"], 2.0)
    ours = criterion(model(images), targets)
    cross_entropy = criterion.terms["cross_entropy"]
    means = []
    for layer in ("body.2", "body"):
        found = eager_statistics(eager_maps(twin, layer, images, targets)[1])
        means.append(found["entropy"][found["live"]].mean())
    torch.testing.assert_close(ours, cross_entropy + 2.0 * torch.stack(means).mean())
    assert [m.shape[1:] for m in criterion.maps] == [(12, 12), (6, 6)]
