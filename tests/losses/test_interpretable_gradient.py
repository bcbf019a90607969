"""InterpretableGradientLoss: values and gradients against eager autograd."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from guided_nets import (
    ERRORS,
    GuidedNet,
    eager_error,
    eager_gradients,
    eager_loss,
    relative,
    twin_of,
)
from nets import batch, parameter_gradients
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import camkernels as ck
from camkernels import modes

LARGE = 1e3  # the regulariser dominates: at the paper's weights its errors would hide
# The sigmoid errors are flat where gradients are small.
WEIGHTS = {**dict.fromkeys(ERRORS, LARGE), "sigmoid": 1e7, "centered_sigmoid": 1e7}


def model_and_twin(training: bool = True) -> tuple[GuidedNet, GuidedNet]:
    model = GuidedNet().double().train(training)
    if not training:  # running statistics worth using
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point():
                low, high = (0.5, 2.0) if name.endswith("var") else (-0.5, 0.5)
                buffer.uniform_(low, high)
    return model, twin_of(model)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("error", ERRORS)
def test_parameter_gradients_equal_eager_autograd(error: str, training: bool) -> None:
    model, twin = model_and_twin(training)
    images, targets = batch()
    criterion = ck.InterpretableGradientLoss(model, error, WEIGHTS[error])
    loss = criterion(model(images), targets)
    expected = eager_loss(twin, images, targets, error, WEIGHTS[error])
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=0)
    ours, theirs = parameter_gradients(model, loss), parameter_gradients(twin, expected)
    assert relative(ours, theirs) <= 1e-9
    plain = parameter_gradients(twin, nn.functional.cross_entropy(twin(images), targets))
    assert relative(ours, plain) > 0.9  # it is the regulariser that was compared


def test_every_parameter_before_the_logits_is_reached() -> None:
    model, _ = model_and_twin()
    images, targets = batch()
    found = []
    for weight in (0.0, 1.0):
        criterion = ck.InterpretableGradientLoss(model, weight=weight)
        found.append(parameter_gradients(model, criterion(model(images), targets)))
        criterion.close()
    for (name, _), a, b in zip(model.named_parameters(), *found, strict=True):
        moved = float((a - b).abs().max())
        assert moved > 1e-6, name


@pytest.mark.parametrize("inner", ["mean", "sum"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_with_all_options_of_cross_entropy(reduction: str, inner: str) -> None:
    model, twin = model_and_twin()
    images, targets = batch(6)
    targets[2] = 4
    options: dict[str, Any] = {
        "weight": torch.rand(5, dtype=torch.float64) + 0.5,
        "ignore_index": 4,
        "label_smoothing": 0.1,
    }
    criterion = ck.InterpretableGradientLoss(
        model, "sigmoid", WEIGHTS["sigmoid"], class_weight=options["weight"], ignore_index=4,
        label_smoothing=0.1, reduction=reduction, inner_reduction=inner,
    )  # fmt: skip
    loss = criterion(model(images), targets)
    logits, delta, guided = eager_gradients(twin, images, targets, reduction=inner, **options)
    valid = targets != 4
    errors = torch.where(valid, eager_error(delta, guided, "sigmoid"), 0.0)
    cross_entropy = nn.functional.cross_entropy(logits, targets, reduction=reduction, **options)
    regularizer = {"mean": errors.sum() / valid.sum(), "sum": errors.sum(), "none": errors}
    expected = cross_entropy + WEIGHTS["sigmoid"] * regularizer[reduction]
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    assert loss.shape == ((6,) if reduction == "none" else ())
    cotangent = torch.rand_like(loss)
    ours = parameter_gradients(model, (loss * cotangent).sum())
    theirs = parameter_gradients(twin, (expected * cotangent).sum())
    assert relative(ours, theirs) <= 1e-9
    torch.testing.assert_close(
        criterion.terms["gradient_error"], (errors.sum() / valid.sum()).detach()
    )


def test_class_probabilities_as_targets() -> None:
    model, twin = model_and_twin()
    images, _ = batch()
    targets = torch.softmax(torch.randn(4, 5, dtype=torch.float64), 1)
    criterion = ck.InterpretableGradientLoss(model, weight=LARGE)
    loss = criterion(model(images), targets)
    expected = eager_loss(twin, images, targets, "cosine", LARGE)
    assert relative(parameter_gradients(model, loss), parameter_gradients(twin, expected)) <= 1e-9


def test_terms_and_gradients_against_eager() -> None:
    model, twin = model_and_twin()
    images, targets = batch()
    criterion = ck.InterpretableGradientLoss(model, weight=0.5, keep_gradients=True)
    assert criterion.terms == {}
    loss = criterion(model(images), targets)
    _, delta, guided = eager_gradients(twin, images, targets)
    ours, ours_guided = criterion.gradients
    torch.testing.assert_close(ours, delta.detach())
    torch.testing.assert_close(ours_guided, guided)
    assert not torch.allclose(delta, guided)
    terms = criterion.terms
    assert not any(value.requires_grad for value in terms.values())
    torch.testing.assert_close(terms["gradient_norm"], delta.detach().flatten(1).norm(dim=1).mean())
    torch.testing.assert_close(terms["guided_gradient_norm"], guided.flatten(1).norm(dim=1).mean())
    torch.testing.assert_close(terms["cross_entropy"] + 0.5 * terms["regularizer"], loss.detach())
    assert terms["zero_gradients"] == 0
    assert not ours.requires_grad


def test_zero_gradients_are_told_and_harmless() -> None:
    model, _ = model_and_twin(training=False)
    images, targets = batch()
    with torch.no_grad():
        model.hidden.bias.fill_(-1e3)  # every unit is dead: delta = 0
    criterion = ck.InterpretableGradientLoss(model, weight=LARGE)
    loss = criterion(model(images), targets)
    assert criterion.terms["zero_gradients"] == 1
    assert criterion.terms["regularizer"] == 0
    assert all(g.isfinite().all() for g in parameter_gradients(model, loss))


@pytest.mark.parametrize("make", [lambda: GuidedNet(), lambda: GuidedNet().eval()])
def test_weight_zero_is_cross_entropy_to_the_bit_and_still_measures(
    make: Callable[[], GuidedNet],
) -> None:
    model = make()
    images, targets = batch(dtype=torch.float32)
    criterion = ck.InterpretableGradientLoss(model, weight=0.0)
    logits = model(images)
    loss = criterion(logits, targets)
    expected = nn.functional.cross_entropy(logits, targets)
    assert torch.equal(loss, expected)
    ours = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    theirs = torch.autograd.grad(expected, list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert -1 <= criterion.terms["regularizer"] < 0


def test_every_kth_call_carries_k_times_the_weight() -> None:
    model, twin = model_and_twin(training=False)
    images, targets = batch()
    criterion = ck.InterpretableGradientLoss(model, weight=2.0, every=3)
    heavy = eager_loss(twin, images, targets, "cosine", 6.0)
    light = nn.functional.cross_entropy(twin(images), targets)
    for call in range(7):
        with torch.no_grad():  # a validation step in between counts for nothing
            criterion(model(images), targets)
        loss = criterion(model(images), targets)
        torch.testing.assert_close(loss, heavy if call % 3 == 0 else light)
        assert ("regularizer" in criterion.terms) == (call % 3 == 0)
        assert criterion.calls == call + 1


def test_a_skipped_call_costs_what_cross_entropy_costs() -> None:
    model = GuidedNet()
    images, targets = batch(dtype=torch.float32)
    criterion = ck.InterpretableGradientLoss(model, every=2)
    criterion(model(images), targets)
    with _Convolutions() as skipped:
        criterion(model(images), targets).backward()
    criterion.close()
    with _Convolutions() as plain:
        nn.functional.cross_entropy(model(images), targets).backward()
    assert skipped.masks == plain.masks
    assert (False, True, False) in plain.masks  # the first layer: no gradient of the images


class _Convolutions(TorchDispatchMode):
    """What each backward convolution is asked for: input, weight, bias."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[tuple[bool, ...]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any | None = None
    ) -> Any:
        if func is torch.ops.aten.convolution_backward.default:
            self.masks.append(tuple(args[10]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("relu", ["camkernels", "torch"])
def test_inner_passes_make_no_weight_gradients(relu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = GuidedNet(relu)
    images, targets = batch(dtype=torch.float32)
    seen = []
    real = torch.autograd.grad

    def spy(*args: Any, **kwargs: Any) -> Any:
        with _Convolutions() as convolutions:
            found = real(*args, **kwargs)
        seen.append((convolutions.masks, modes._depth(modes._GUIDED), modes._depth(
            modes._NO_WEIGHT_GRADIENTS), kwargs.get("create_graph", False)))  # fmt: skip
        return found

    criterion = ck.InterpretableGradientLoss(model, plain_relus="ignore")
    logits = model(images)
    monkeypatch.setattr(torch.autograd, "grad", spy)
    loss = criterion(logits, targets)
    monkeypatch.undo()
    assert [(guided, quiet, graph) for _, guided, quiet, graph in seen] == [
        (1, 1, False),
        (0, 1, True),
    ]
    for masks, *_ in seen:
        assert masks == [(True, False, False)] * 3
    assert modes.weight_gradients_wanted()
    assert not modes.guided_now()
    with _Convolutions() as last:
        loss.backward()
    assert any(mask[1] for mask in last.masks)


@pytest.mark.parametrize("relu", ["camkernels", "torch"])
def test_images_that_require_grad_stay_connected(relu: str) -> None:
    model, twin = model_and_twin()
    images, targets = batch()
    shift = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    criterion = ck.InterpretableGradientLoss(model, weight=LARGE)
    # ReLUs before the model are none of its business
    x = nn.functional.relu(images) + shift
    criterion(model(x), targets).backward()
    y = nn.functional.relu(images) + shift
    logits = twin(y)
    cross_entropy = nn.functional.cross_entropy(logits, targets)
    (delta,) = torch.autograd.grad(cross_entropy, y, create_graph=True)
    guided = eager_gradients(twin_of(twin), nn.functional.relu(images), targets)[2]
    expected = cross_entropy + LARGE * eager_error(delta, guided, "cosine").mean()
    torch.testing.assert_close(shift.grad, torch.autograd.grad(expected, shift)[0])


def test_nothing_of_the_users_is_changed() -> None:
    model, twin = model_and_twin()
    images, targets = batch()
    criterion = ck.InterpretableGradientLoss(model)
    random = torch.get_rng_state()
    loss = criterion(model(images), targets)
    assert torch.equal(torch.get_rng_state(), random)
    twin(images)
    for (name, ours), theirs in zip(model.named_buffers(), twin.buffers(), strict=True):
        if not name.endswith("num_batches_tracked"):  # modules count, functions do not
            torch.testing.assert_close(ours, theirs)
    assert all(p.grad is None for p in model.parameters())
    loss.backward()
    assert images.grad is None
    assert not images.requires_grad
    assert model.training
    criterion.close()
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert [name for name, _ in criterion.named_parameters()] == []


def test_a_modest_weight_lowers_the_error() -> None:
    images, targets = batch(16, dtype=torch.float32)
    finals = []
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        model = GuidedNet()
        criterion = ck.InterpretableGradientLoss(model, weight=weight)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(30):
            optimizer.zero_grad()
            criterion(model(images), targets).backward()
            optimizer.step()
        finals.append(float(criterion.terms["gradient_error"]))
    assert finals[1] < finals[0] - 0.1


def test_gradients_do_not_need_a_context_of_the_users() -> None:
    model, _ = model_and_twin()
    images, targets = batch()
    criterion = ck.InterpretableGradientLoss(model, weight=1.0)
    logits = model(images)
    for context in (nullcontext, torch.no_grad):
        with context():
            loss = criterion(logits, targets)
        assert loss.requires_grad == (context is nullcontext)
        assert "regularizer" in criterion.terms
