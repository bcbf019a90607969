"""CAMEntropyLoss: what trainers do to a criterion, and bad input."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from nets import (
    SmallNet,
    batch,
    eager_loss,
    eager_maps,
    largest_difference,
    model_and_twin,
    parameter_gradients,
)
from torch import Tensor, nn

import camkernels as ck


def test_nothing_of_the_model_is_changed() -> None:
    model, twin = model_and_twin("tanh")
    images, targets = batch()
    criterion = ck.CAMEntropyLoss(model, "body", 1.0)
    random = torch.get_rng_state()
    loss = criterion(model(images), targets)
    assert torch.equal(torch.get_rng_state(), random)
    nn.functional.cross_entropy(twin(images), targets)
    for (name, ours), theirs in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    loss.backward()
    criterion.close()
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize("head", ["linear", "tanh"])
def test_eval_mode_without_grad(head: str) -> None:
    model, twin = model_and_twin(head)
    images, targets = batch()
    criterion = ck.CAMEntropyLoss(model, "body", 2.0)
    model.eval()
    twin.eval()
    maps = eager_maps(twin, "body", images, targets)[1].detach()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            logits = model(images)
            loss = criterion(logits, targets)
            assert not loss.requires_grad
            assert not logits.requires_grad
            assert not criterion.maps.requires_grad
            assert torch.is_grad_enabled() is False
        torch.testing.assert_close(criterion.maps.clone(), maps)
    assert torch.is_grad_enabled()


def test_gradient_mode_is_restored_when_the_forward_raises() -> None:
    model, _ = model_and_twin("tanh")
    criterion = ck.CAMEntropyLoss(model, "body", 2.0)
    images, targets = batch()

    def fail(*args: Any) -> None:
        raise RuntimeError("boom")

    handle = model.fc.register_forward_pre_hook(fail)
    with torch.no_grad(), pytest.raises(RuntimeError, match="boom"):
        model(images)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="boom"):
            model(images)
        assert not torch.is_grad_enabled()
    handle.remove()
    criterion(model(images), targets)


@pytest.mark.parametrize("head", ["linear", "mlp", "tanh"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(head: str, dtype: torch.dtype) -> None:
    model = SmallNet(head)
    twin = copy.deepcopy(model).double()
    images, targets = batch(dtype=torch.float32)
    criterion = ck.CAMEntropyLoss(model, "body", 1.0)
    with torch.autocast("cpu", dtype=dtype):
        loss = criterion(model(images), targets)
    ours = parameter_gradients(model, loss * 128.0)
    truth = parameter_gradients(twin, eager_loss(twin, "body", images.double(), targets, 1.0))
    eager = copy.deepcopy(model)
    with torch.autocast("cpu", dtype=dtype):
        eager_value = eager_loss(eager, "body", images, targets, 1.0)
    theirs = parameter_gradients(eager, eager_value * 128.0)

    def alike(gradients: list[Tensor]) -> float:
        a, b = (torch.cat([g.flatten().double() for g in x]) for x in (gradients, truth))
        # Eager float16 may well overflow to NaN where our scaling does not.
        return float(torch.cosine_similarity(a, b, 0).nan_to_num(-1.0))

    # What autocast itself loses is not ours to win back.
    assert alike(ours) > 0.9
    assert alike(ours) > alike(theirs) - 0.01


def test_float16_gradients_do_not_underflow() -> None:
    # 1 / Z = 2^-18 times weights of 1e-3 lies below float16: unscaled, every map would be dead.
    layers = [nn.Conv2d(3, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(4, 5)).to(torch.float16)
    with torch.no_grad():
        model[4].weight.mul_(0.0).add_(2e-3)
        model[0].bias.add_(1.0)
    images = torch.rand(1, 3, 512, 512, dtype=torch.float16)
    with ck.GradCAM(model, "1", head="autograd") as cam:
        maps = cam(model(images), torch.tensor([2]))
    with ck.GradCAM(model, "1") as cam:
        expected = cam(model(images), torch.tensor([2]))
        assert cam.head.startswith("closed form")
    assert (maps > 0).any()
    torch.testing.assert_close(maps, expected, rtol=0.05, atol=0)


def test_gradient_accumulation_equals_two_losses() -> None:
    model, twin = model_and_twin()
    images, targets = batch(8)
    criterion = ck.CAMEntropyLoss(model, "body", 2.0)
    for part in (slice(0, 4), slice(4, 8)):
        criterion(model(images[part]), targets[part]).backward()
    for part in (slice(0, 4), slice(4, 8)):
        eager_loss(twin, "body", images[part], targets[part], 2.0).backward()
    ours = [p.grad for p in model.parameters()]
    assert largest_difference(ours, [p.grad for p in twin.parameters()]) <= 1e-11


@pytest.mark.parametrize("head", ["linear", "tanh"])
def test_frozen_backbone_and_partly_frozen(head: str) -> None:
    for frozen in ("body", "body.0", "fc.1"):
        model, twin = model_and_twin(head)
        for net in (model, twin):
            net.get_submodule(frozen).requires_grad_(False)
        images, targets = batch()
        criterion = ck.CAMEntropyLoss(model, "body", 2.0)
        criterion(model(images), targets).backward()
        twin_loss_model = copy.deepcopy(twin).requires_grad_(True)
        expected = parameter_gradients(
            twin_loss_model, eager_loss(twin_loss_model, "body", images, targets, 2.0)
        )
        for parameter, reference in zip(model.parameters(), expected, strict=True):
            if parameter.requires_grad:
                torch.testing.assert_close(parameter.grad, reference)
            else:
                assert parameter.grad is None


def test_deepcopy_and_pickle_of_the_model_carry_no_tap() -> None:
    model, _ = model_and_twin()
    images, targets = batch()
    criterion = ck.CAMEntropyLoss(model, "body", 2.0)
    loss = criterion(model(images), targets)  # a graph is alive
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin(images[:1])
        criterion(model(images), targets)  # the twin's forward was not seen
    loss.backward()


def test_deepcopy_and_pickle_of_the_criterion_tap_their_own_model() -> None:
    model, _ = model_and_twin()
    images, targets = batch()
    holder = nn.Module()
    holder.model, holder.criterion = model, ck.CAMEntropyLoss(model, "body", 2.0)
    expected = holder.criterion(model(images), targets)
    buffer = io.BytesIO()
    torch.save(holder, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(holder), torch.load(buffer, weights_only=False)):
        assert twin.criterion._tap.model is twin.model
        torch.testing.assert_close(twin.criterion(twin.model(images), targets), expected)
    names = [name for name, _ in holder.named_parameters()]
    assert all(name.startswith("model.") for name in names)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(self.body, x.requires_grad_(), use_reentrant=reentrant)
            return self.fc(self.pool(x))

    model = Checkpointed("linear").double()
    twin = SmallNet("linear").double()
    twin.load_state_dict(model.state_dict())
    images, targets = batch()
    criterion = ck.CAMEntropyLoss(model, "body.4", 2.0)
    if reentrant:
        with pytest.raises(ck.TapError, match="use_reentrant=False"):
            model(images.clone())
        return
    ours = parameter_gradients(model, criterion(model(images.clone()), targets))
    theirs = parameter_gradients(twin, eager_loss(twin, "body.4", images, targets, 2.0))
    assert largest_difference(ours, theirs) <= 1e-11
    criterion(model(images.clone()), targets)  # the recomputation was not taken for a second call


def test_channels_last() -> None:
    model, twin = model_and_twin()
    images, targets = batch()
    model = model.to(memory_format=torch.channels_last)
    criterion = ck.CAMEntropyLoss(model, "body", 2.0)
    loss = criterion(model(images.to(memory_format=torch.channels_last)), targets)
    ours = parameter_gradients(model, loss)
    theirs = parameter_gradients(twin, eager_loss(twin, "body", images, targets, 2.0))
    assert largest_difference(ours, theirs) <= 1e-11


def test_training_lowers_the_entropy() -> None:
    images, targets = batch(16, dtype=torch.float32)
    finals = []
    for beta in (0.0, 1.0):
        torch.manual_seed(0)
        model = SmallNet("mlp")
        criterion = ck.CAMEntropyLoss(model, "body", beta)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(40):
            optimizer.zero_grad()
            criterion(model(images), targets).backward()
            optimizer.step()
        finals.append(float(criterion.terms["entropy"]))
    assert finals[1] < finals[0] - 0.3


def test_saves_no_more_than_cross_entropy_plus_the_maps() -> None:
    def saved_bytes(criterion: nn.Module, model: nn.Module, images: Tensor, y: Tensor) -> int:
        storages: dict[int, int] = {}
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
        with ck.backend("cpu"), hooks:  # the reference formula saves all its intermediates
            loss = criterion(model(images), y)
        assert loss.requires_grad
        return sum(storages.values())

    model = SmallNet(channels=64)
    images, targets = batch(8, side=32, dtype=torch.float32)
    plain = saved_bytes(nn.CrossEntropyLoss(), model, images, targets)
    criterion = ck.CAMEntropyLoss(model, "body", 1.0)
    criterion(model(images), targets)
    ours = saved_bytes(criterion, model, images, targets)
    maps = criterion.maps.numel() * 4
    per_sample = 8 * 4 * 64 * 4  # weights, statistics and indices: a few values per (B, K)
    assert ours <= plain + maps + per_sample


# -- bad input -------------------------------------------------------------------------------


def test_bad_options() -> None:
    model = SmallNet()
    for option, match in (
        ({"regularizer": "spread"}, "regularizer: expected one of entropy, area, dispersion"),
        ({"target": "best"}, "target: expected one of true, predicted"),
        ({"reduction": "max"}, "reduction"),
        ({"beta": math.nan}, "beta: expected a finite number"),
        ({"head": "closed"}, "head: expected one of"),
    ):
        with pytest.raises(ValueError, match=match):
            ck.CAMEntropyLoss(model, "body", **option)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="other_classes"):
        ck.CAMEntropyLoss(model, ["body", "body.2"], other_classes=1.0)
    with pytest.raises(ValueError, match="near names: 'body'"):
        ck.CAMEntropyLoss(model, "boddy")
    with pytest.raises(TypeError, match="DistributedDataParallel"):
        ck.CAMEntropyLoss(nn.DataParallel(model), "body")
    assert not any(m._forward_hooks for m in model.modules())


def test_bad_calls() -> None:
    model, _ = model_and_twin()
    images, targets = batch()
    criterion = ck.CAMEntropyLoss(model, "body", 1.0)
    logits = SmallNet().double()(images)
    with pytest.raises(ck.TapError, match="no forward has run"):
        criterion(logits, targets)
    with pytest.raises(RuntimeError, match="has not been called"):
        _ = criterion.maps
    assert criterion.terms == {}
    logits = model(images)
    with pytest.raises(IndexError, match="class 5 is out of range for 5 classes"):
        criterion(logits, targets + 1 + (targets == 3))
    with pytest.raises(TypeError, match="class indices"):
        criterion(logits, torch.softmax(logits, 1))
    with pytest.raises(ValueError, match="expected shape"):
        criterion(logits, targets[:2])
    with pytest.raises(ValueError, match=r"logits: expected floating-point \(B, C\)"):
        criterion(logits[0], targets)
    criterion.close()
    with pytest.raises(ck.TapError, match="closed"):
        criterion(logits, targets)


@pytest.mark.parametrize("head", ["linear", "mlp", "tanh"])
def test_stale_forward_is_noticed(head: str) -> None:
    model, _ = model_and_twin(head)
    images, targets = batch()
    criterion = ck.CAMEntropyLoss(model, "body", 1.0)
    stale = model(images)
    model(torch.randn_like(images))
    with pytest.raises(ck.TapError, match="stale forward"):
        criterion(stale, targets)
    model(images[:2])
    with pytest.raises(ck.TapError, match="stale forward"):
        criterion(stale, targets)


def test_empty_batch() -> None:
    for head in ("linear", "tanh"):
        model, _ = model_and_twin(head)
        model.eval()
        criterion = ck.CAMEntropyLoss(model, "body", 1.0, reduction="sum")
        images, targets = batch(0)
        loss = criterion(model(images), targets)
        loss.backward()
        assert loss == 0


def test_nan_in_one_sample_shows_in_the_loss_and_crashes_nothing() -> None:
    model, _ = model_and_twin()
    model.eval()
    images, targets = batch()
    images[1] = math.nan
    criterion = ck.CAMEntropyLoss(model, "body", 1.0, reduction="none")
    loss = criterion(model(images), targets)
    assert loss.isnan().tolist() == [False, True, False, False]
