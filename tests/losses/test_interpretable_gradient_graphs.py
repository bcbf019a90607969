"""InterpretableGradientLoss: graphs that it refuses, validation, and bad input."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from guided_nets import GuidedNet, Pointwise, eager_loss, relative, twin_of
from nets import SmallNet, batch, parameter_gradients
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import camkernels as ck
from camkernels.nn import functional as ck_functional

# -- without gradients -----------------------------------------------------------------------


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_validation_loop(context: Callable[[], Any]) -> None:
    images, targets = batch()
    model = GuidedNet().double()
    criterion = ck.InterpretableGradientLoss(model, weight=10.0)
    for _ in range(2):
        criterion(model(images), targets).backward()
        model.eval()
        with context():
            for size in (4, 3):  # the last batch is smaller
                logits = model(images[:size])
                loss = criterion(logits, targets[:size])
                assert torch.equal(loss, nn.functional.cross_entropy(logits, targets[:size]))
                assert set(criterion.terms) == {"cross_entropy"}
        model.train()
    assert criterion.calls == 2


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_measuring_without_grad(context: Callable[[], Any]) -> None:
    images, targets = batch()
    model = GuidedNet().double().eval()
    criterion = ck.InterpretableGradientLoss(model, weight=10.0, every=2, measure_without_grad=True)
    criterion(model(images), targets)
    expected = float(criterion.terms["regularizer"])
    with context():
        data = images.clone()  # an inference tensor under inference_mode
        logits = model(data)
        assert not logits.requires_grad
        assert not torch.is_grad_enabled()
        loss = criterion(logits, targets)
        assert not loss.requires_grad
        terms = criterion.terms
        # every does not apply: a measurement carries the plain weight
        torch.testing.assert_close(loss, terms["cross_entropy"] + 10 * terms["regularizer"])
        assert float(terms["regularizer"]) == pytest.approx(expected, rel=1e-12)
        criterion(logits, targets)  # once more: the graph is gone, and nothing crashes
        assert set(criterion.terms) == {"cross_entropy"}
    assert torch.is_grad_enabled()
    assert criterion.calls == 1

    def fail(*args: Any) -> None:
        raise RuntimeError("boom")

    handle = model.fc.register_forward_pre_hook(fail)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="boom"):
            model(images)
        assert not torch.is_grad_enabled()
    handle.remove()
    with torch.no_grad():
        criterion(model(images), targets)


# -- ReLUs -----------------------------------------------------------------------------------


PLAIN_RELUS: dict[str, Callable[[Tensor], Tensor]] = {
    "module": nn.ReLU(),
    "inplace": nn.ReLU(inplace=True),
    "method": lambda t: t.relu_(),
    "relu6": nn.ReLU6(),
    "threshold": nn.Threshold(0.0, 0.0),
    "clamp": lambda t: t.clamp(min=0),
    "clamp-min": lambda t: torch.clamp_min(t, 0),
}
NOT_RELUS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": nn.GELU(),
    "hardtanh": nn.Hardtanh(),
    "clamp": lambda t: t.clamp(min=-1e9),
    "leaky": nn.LeakyReLU(),
}


@pytest.mark.parametrize("name", PLAIN_RELUS)
def test_plain_relus_raise_with_advice(name: str) -> None:
    model = Pointwise(PLAIN_RELUS[name])
    images, targets = batch(dtype=torch.float32)
    criterion = ck.InterpretableGradientLoss(model)
    with pytest.raises(ck.TapError, match=r"1 ReLUs .* ck.swap_in\(model\)"):
        criterion(model(images), targets)
    criterion = ck.InterpretableGradientLoss(model, plain_relus="warn")
    with pytest.warns(UserWarning, match="do not obey guided mode"):
        criterion(model(images), targets)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion(model(images), targets)  # once is enough
        criterion = ck.InterpretableGradientLoss(model, plain_relus="ignore")
        criterion(model(images), targets)


@pytest.mark.parametrize("name", NOT_RELUS)
def test_a_network_without_relu_is_told_once(name: str) -> None:
    model = Pointwise(NOT_RELUS[name])
    images, targets = batch(dtype=torch.float32)
    criterion = ck.InterpretableGradientLoss(model)
    with pytest.warns(UserWarning, match="has no ReLU"):
        criterion(model(images), targets)
    assert criterion.terms["regularizer"] == pytest.approx(-1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion(model(images), targets)


def test_relus_beside_the_way_do_not_matter() -> None:
    class Conditioned(GuidedNet):
        def forward(self, x: Tensor) -> Tensor:
            scale = nn.functional.relu(self.fc.bias).sum() + 1  # not a function of x
            return super().forward(x) * scale

    model = Conditioned()
    images, targets = batch(dtype=torch.float32)
    criterion = ck.InterpretableGradientLoss(model)
    criterion(model(images), targets)
    model.relu = "torch"  # and a graph that changes is looked at again
    with pytest.raises(ck.TapError, match="4 ReLUs"):
        criterion(model(images), targets)


def test_one_plain_relu_among_ours_is_found() -> None:
    def mixed(t: Tensor) -> Tensor:
        return nn.functional.relu(ck_functional.relu(t))

    model = Pointwise(mixed)
    images, targets = batch(dtype=torch.float32)
    criterion = ck.InterpretableGradientLoss(model)
    with pytest.raises(ck.TapError, match="1 ReLUs"):
        criterion(model(images), targets)


# -- graphs that cannot serve ----------------------------------------------------------------


class Checkpointed(GuidedNet):
    reentrant = False

    def features(self, x: Tensor) -> Tensor:
        features: Tensor = checkpoint(super().features, x, use_reentrant=self.reentrant)
        return features


def test_checkpointing() -> None:
    torch.manual_seed(1)
    model = Checkpointed().double().eval()
    twin = twin_of(GuidedNet().double().eval())
    twin.load_state_dict(model.state_dict())
    images, targets = batch()
    criterion = ck.InterpretableGradientLoss(model, weight=1e3)
    theirs = parameter_gradients(twin, eager_loss(twin, images, targets, "cosine", 1e3))
    for _ in range(2):  # a recomputation is not taken for a forward
        ours = parameter_gradients(model, criterion(model(images), targets))
        assert relative(ours, theirs) <= 1e-9
    assert criterion.calls == 2
    whole = checkpoint(model, images, use_reentrant=False)  # the hook itself is run again
    criterion(whole, targets)
    assert relative(parameter_gradients(model, criterion(whole, targets)), theirs) <= 1e-9
    for parameter in twin.parameters():  # torch's convolution saves less without a leaf
        parameter.requires_grad_(False)
    twin.fc.requires_grad_(True)
    criterion = ck.InterpretableGradientLoss(twin, plain_relus="ignore")
    criterion(checkpoint(twin, images, use_reentrant=False), targets).backward()
    criterion = ck.InterpretableGradientLoss(model)
    model.reentrant = True
    with pytest.raises(ck.TapError, match="use_reentrant=False"):
        criterion(model(images), targets)


def test_compiled_model_is_refused_with_advice() -> None:
    model = GuidedNet("torch")
    images, targets = batch(dtype=torch.float32)
    compiled = torch.compile(model, backend="aot_eager")
    criterion = ck.InterpretableGradientLoss(compiled)
    logits = compiled(images)
    with pytest.raises(ck.TapError, match=r"torch\.compile cannot differentiate twice"):
        criterion(logits, targets)
    with torch.no_grad():
        criterion(compiled(images), targets)


def test_torch_sync_batch_norm_is_refused_with_advice() -> None:
    class SyncBatchNorm(torch.autograd.Function):  # torch's own needs a GPU
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad

    model = Pointwise(SyncBatchNorm.apply)
    images, targets = batch(dtype=torch.float32)
    criterion = ck.InterpretableGradientLoss(model)
    with pytest.raises(ck.TapError, match="SyncBatchNorm has no double backward"):
        criterion(model(images), targets)


def test_stale_and_missing_forwards() -> None:
    model = GuidedNet().double()
    images, targets = batch()
    criterion = ck.InterpretableGradientLoss(model)
    logits = twin_of(model)(images)
    with pytest.raises(ck.TapError, match="no forward has run"):
        criterion(logits, targets)
    stale = model(images)
    model(torch.randn_like(images))
    with pytest.raises(ck.TapError, match="stale forward"):
        criterion(stale, targets)
    stale = model(images)
    with torch.no_grad():
        model(images)
    with pytest.raises(ck.TapError, match="stale forward"):
        criterion(stale, targets)
    with pytest.raises(ck.TapError, match="not connected"):
        criterion(model(images).detach(), targets)
    logits = model(images[:2])
    with pytest.raises(ck.TapError, match="last saw a batch of 2"):
        criterion(logits.repeat(2, 1), targets)
    model(images)
    newest = model(images)
    criterion(newest, targets)
    criterion(newest, targets).backward()  # the same forward, twice
    criterion.close()
    criterion.close()
    with pytest.raises(ck.TapError, match="closed"):
        criterion(newest, targets)


def test_integer_images_are_named() -> None:
    model = Pointwise(ck_functional.relu)
    criterion = ck.InterpretableGradientLoss(model)
    images = torch.randint(0, 255, (2, 3, 8, 8), dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"images: the model's argument 0 is torch.uint8"):
        model(images)
    model.register_forward_pre_hook(lambda m, args: (args[0] / 255,))  # inside, and too late
    with pytest.raises(TypeError, match="uint8"):
        model(images)
    with torch.no_grad():
        criterion(model(images), torch.tensor([0, 1]))


# -- bad input -------------------------------------------------------------------------------


def test_bad_options() -> None:
    model = GuidedNet()
    for option, match in (
        ({"error": "cos"}, "error: expected one of sigmoid, centered_sigmoid"),
        ({"reduction": "max"}, "reduction"),
        ({"inner_reduction": "none"}, "inner_reduction: expected one of mean, sum"),
        ({"plain_relus": "hide"}, "plain_relus"),
        ({"weight": math.nan}, "weight: expected a finite number"),
        ({"every": 0}, "every: expected an integer"),
        ({"every": 2.5}, "every: expected an integer"),
        ({"inner_scale": -1.0}, "inner_scale: expected a positive number"),
        ({"inner_scale": 2.0, "grad_scaler": torch.amp.GradScaler("cpu")}, "one of them"),
    ):
        with pytest.raises(ValueError, match=match):
            ck.InterpretableGradientLoss(model, **option)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="DistributedDataParallel"):
        ck.InterpretableGradientLoss(nn.DataParallel(model))
    assert not model._forward_pre_hooks


def test_bad_calls() -> None:
    model = GuidedNet().double()
    images, targets = batch()
    criterion = ck.InterpretableGradientLoss(model)
    with pytest.raises(RuntimeError, match="keep_gradients=True"):
        _ = criterion.gradients
    logits = model(images)
    with pytest.raises(IndexError, match="class 9 is out of range for 5 classes"):
        criterion(logits, targets + 6)
    with pytest.raises(ValueError, match="expected class indices"):
        criterion(logits, torch.rand(4))
    with pytest.raises(ValueError, match="expected shape"):
        criterion(logits, targets[:2])
    with pytest.raises(ValueError, match=r"logits: expected floating-point \(B, C\)"):
        criterion(logits[0], targets)
    criterion(logits, targets)  # none of them spoilt the forward
    keeper = ck.InterpretableGradientLoss(model, keep_gradients=True)
    with torch.no_grad():
        keeper(model(images), targets)
    with pytest.raises(RuntimeError, match="measured none"):
        _ = keeper.gradients


def test_empty_batch() -> None:
    model = GuidedNet().double().eval()
    criterion = ck.InterpretableGradientLoss(model, reduction="sum")
    images, targets = batch(0)
    loss = criterion(model(images), targets)
    loss.backward()
    assert loss == 0


def test_nan_in_one_sample_shows_in_the_loss_and_crashes_nothing() -> None:
    model = GuidedNet().double().eval()
    images, targets = batch()
    images[1] = math.nan
    criterion = ck.InterpretableGradientLoss(model, reduction="none")
    loss = criterion(model(images), targets)
    assert loss.isnan().tolist() == [False, True, False, False]


def test_side_by_side_with_another_criterion() -> None:
    model = SmallNet().double()
    images, targets = batch()
    entropy = ck.CAMEntropyLoss(model, "body", 1.0)
    gradient = ck.InterpretableGradientLoss(model, weight=1.0, plain_relus="ignore")
    logits = model(images)
    (entropy(logits, targets) + gradient(logits, targets)).backward()
    assert all(p.grad is not None for p in model.parameters())
