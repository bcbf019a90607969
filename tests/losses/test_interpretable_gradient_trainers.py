"""InterpretableGradientLoss: what trainers do to a criterion."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import criterion_process as process
import pytest
import torch
from guided_nets import GuidedNet, eager_loss, relative, twin_of
from nets import batch, largest_difference, parameter_gradients
from torch import Tensor, nn

import camkernels as ck


def alike(a: list[Tensor], b: list[Tensor]) -> float:
    x, y = (torch.cat([g.flatten().double() for g in v]) for v in (a, b))
    return float(torch.cosine_similarity(x, y, 0).nan_to_num(-1.0))


# -- precision -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    model = GuidedNet().eval()
    images, targets = batch(dtype=torch.float32)
    criterion = ck.InterpretableGradientLoss(model, weight=10.0, keep_gradients=True)
    with torch.autocast("cpu", dtype=dtype):
        logits = model(images)
        assert logits.dtype == dtype
        loss = criterion(logits, targets)
    assert loss.dtype == torch.float32
    assert {g.dtype for g in criterion.gradients} == {torch.float32}
    ours = parameter_gradients(model, loss)
    twin = twin_of(model, torch.float64)
    truth = parameter_gradients(twin, eager_loss(twin, images.double(), targets, "cosine", 10.0))
    assert alike(ours, truth) > 0.95  # what autocast itself loses is not ours to win back


def test_float16_gradients_do_not_underflow() -> None:
    images, targets = batch(side=48, dtype=torch.float32)
    model = GuidedNet().eval()
    with torch.no_grad():
        model.fc.weight.mul_(1e-3)  # the input gradient lies below float16
    twin = twin_of(model, torch.float64)
    truth = parameter_gradients(twin, eager_loss(twin, images.double(), targets, "cosine", 1.0))

    def likeness(**options: Any) -> tuple[float, float]:
        criterion = ck.InterpretableGradientLoss(model, weight=1.0, **options)
        with torch.autocast("cpu", dtype=torch.float16):
            loss = criterion(model(images), targets)
        criterion.close()
        zero = float(criterion.terms["zero_gradients"])
        return alike(parameter_gradients(model, loss), truth), zero

    found, zero = likeness(inner_scale=1.0)
    assert found < 0.5
    assert zero == 1
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    for options in ({}, {"inner_scale": 2.0**12}, {"grad_scaler": scaler}):
        found, zero = likeness(**options)
        assert found > 0.999, options
        assert zero == 0


@pytest.mark.parametrize("inner", ["mean", "sum"])
def test_the_inner_scale_drops_out(inner: str) -> None:
    images, targets = batch(dtype=torch.float64)
    model = GuidedNet().double()
    found = []
    for scale in (None, 2.0**10):
        criterion = ck.InterpretableGradientLoss(
            model, "sigmoid", 1e3, inner_scale=scale, inner_reduction=inner
        )
        found.append(parameter_gradients(model, criterion(model(images), targets)))
        criterion.close()
    assert largest_difference(*found) == 0  # a power of two


def test_grad_scaler_steps_and_skips() -> None:
    images, targets = batch(dtype=torch.float32)
    model = GuidedNet()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    criterion = ck.InterpretableGradientLoss(model, weight=0.1, grad_scaler=scaler)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = criterion(model(images), targets)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    before = copy.deepcopy(model.state_dict())
    step()
    assert scaler.get_scale() == 2.0**10
    assert not torch.equal(model.fc.weight, before["fc.weight"])
    scaler.update(2.0**60)  # delta overflows: seen, not hidden, and skipped
    before = copy.deepcopy(model.state_dict())
    step()
    assert not criterion.terms["regularizer"].isfinite()
    assert scaler.get_scale() < 2.0**60
    assert torch.equal(model.fc.weight, before["fc.weight"])


# -- lifetime --------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", [False, True])
def test_nothing_is_kept_alive(measure: bool) -> None:
    images, targets = batch()
    model = GuidedNet().double()
    criterion = ck.InterpretableGradientLoss(model, measure_without_grad=measure)
    kept: list[weakref.ref[Any]] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        kept.append(weakref.ref(inputs[0]))
        kept.append(weakref.ref(output))

    handles = [
        model.hidden.register_forward_hook(keep),
        model.register_forward_hook(keep),  # the leaf
    ]
    gc.collect()
    gc.disable()
    try:
        for call in (lambda t: t.backward(), lambda t: None):
            data = images.clone()
            kept.append(weakref.ref(data))
            loss = criterion(model(data), targets)
            call(loss)
            del loss, data
        with torch.no_grad():
            criterion(model(images.clone()), targets)
        assert [ref() for ref in kept] == [None] * len(kept)
        model(images.clone())  # a forward without a loss
        assert [ref() for ref in kept] == [None] * len(kept)
    finally:
        gc.enable()
    for handle in handles:
        handle.remove()
    model_ref = weakref.ref(model)
    del model, criterion
    gc.collect()
    assert model_ref() is None


def test_the_leaf_keeps_no_gradient() -> None:
    images, targets = batch()
    model = GuidedNet().double()
    leaves = []
    criterion = ck.InterpretableGradientLoss(model)
    handle = model.register_forward_pre_hook(lambda m, args: leaves.append(args[0]))
    criterion(model(images), targets).backward()
    handle.remove()
    (leaf,) = leaves
    assert leaf.is_leaf
    assert leaf.requires_grad
    assert leaf.grad is None
    assert leaf.data_ptr() == images.data_ptr()


def test_deepcopy_and_pickle() -> None:
    images, targets = batch()
    model = GuidedNet().double().eval()
    criterion = ck.InterpretableGradientLoss(
        model, weight=3.0, every=2, class_weight=torch.rand(5).double(), keep_gradients=True
    )
    expected = criterion(model(images), targets)  # a graph is alive
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        logits = model(images)
        twin(images[:1])  # not seen
        criterion(logits, targets)
    holder = nn.Module()
    holder.model, holder.criterion = model, criterion
    criterion.calls = 5
    buffer = io.BytesIO()
    torch.save(holder, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(holder), torch.load(buffer, weights_only=False)):
        assert twin.criterion._tap.model is twin.model
        assert twin.criterion.calls == 5
        assert twin.criterion.terms == {}
        twin.criterion.calls = 6
        torch.testing.assert_close(twin.criterion(twin.model(images), targets), expected)
    assert all(name.startswith("model.") for name, _ in holder.named_parameters())
    assert set(criterion.state_dict()) == {"class_weight"}
    expected.backward()


# -- trainers --------------------------------------------------------------------------------


def test_gradient_accumulation_equals_two_losses() -> None:
    model = GuidedNet().double()
    twin = twin_of(model)
    images, targets = batch(8)
    criterion = ck.InterpretableGradientLoss(model, weight=100.0)
    for part in (slice(0, 4), slice(4, 8)):
        criterion(model(images[part]), targets[part]).backward()
        eager_loss(twin, images[part], targets[part], "cosine", 100.0).backward()
    ours, theirs = ([p.grad for p in m.parameters()] for m in (model, twin))
    assert relative(ours, theirs) <= 1e-9  # type: ignore[arg-type]


def test_frozen_parameters() -> None:
    for frozen in ("conv1", "bn1", "hidden"):
        model = GuidedNet().double()
        twin = twin_of(model)
        model.get_submodule(frozen).requires_grad_(False)
        images, targets = batch()
        criterion = ck.InterpretableGradientLoss(model, weight=100.0)
        criterion(model(images), targets).backward()
        theirs = parameter_gradients(twin, eager_loss(twin, images, targets, "cosine", 100.0))
        for parameter, expected in zip(model.parameters(), theirs, strict=True):
            if parameter.requires_grad:
                torch.testing.assert_close(parameter.grad, expected)
            else:
                assert parameter.grad is None


def test_functional_call() -> None:
    model = GuidedNet().double()
    images, targets = batch()
    criterion = ck.InterpretableGradientLoss(model, weight=10.0)
    expected = parameter_gradients(model, criterion(model(images), targets))
    values = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    logits = torch.func.functional_call(model, values, (images,))
    found = torch.autograd.grad(criterion(logits, targets), list(values.values()))
    assert largest_difference(list(found), expected) <= 1e-12


class TwoInputs(GuidedNet):
    def forward(self, mask: Any, pixel_values: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(pixel_values)


@pytest.mark.parametrize("input", [1, "pixel_values"])
def test_which_argument_holds_the_images(input: int | str) -> None:
    images, targets = batch(dtype=torch.float32)
    mask = torch.ones(4, 3, dtype=torch.int64)
    model = TwoInputs()
    criterion = ck.InterpretableGradientLoss(model, input=input)
    criterion(model(mask, images), targets).backward()
    if input == 1:
        with pytest.raises(ck.TapError, match="input=1"):
            model(mask, pixel_values=images)
    else:
        criterion(model(mask, pixel_values=images), targets).backward()
        criterion(model(pixel_values=images, mask=None), targets).backward()
        with pytest.raises(TypeError, match=r"'pixel_values'|argument 1"):
            model(mask, [images])
    criterion.close()
    criterion = ck.InterpretableGradientLoss(model)
    criterion(model(None, images), targets)
    criterion(model(mask=None, pixel_values=images), targets)
    with pytest.raises(ck.TapError, match="pass input="):
        model(mask=mask, pixel_values=images)
    with pytest.raises(TypeError, match="int64"):
        model(mask, images)


def test_channels_last() -> None:
    model = GuidedNet().double()
    twin = twin_of(model)
    images, targets = batch()
    model = model.to(memory_format=torch.channels_last)
    criterion = ck.InterpretableGradientLoss(model, weight=100.0)
    loss = criterion(model(images.to(memory_format=torch.channels_last)), targets)
    theirs = parameter_gradients(twin, eager_loss(twin, images, targets, "cosine", 100.0))
    assert relative(parameter_gradients(model, loss), theirs) <= 1e-9


# -- processes -------------------------------------------------------------------------------


def test_two_processes_with_synchronised_statistics_equal_one_with_all_the_batch(
    tmp_path: Path, two_processes: Callable[[str], None]
) -> None:
    two_processes(process.__file__)
    found = torch.load(tmp_path / "gradients.pt")
    for index, (error, inner) in enumerate(process.SETTINGS):
        model = ck.swap_in(process.network())
        process.train(model, *process.data(), error=error, inner_reduction=inner)
        expected = [p.grad for p in model.parameters()]
        wrappers = len(process.WRAPPERS)
        for ours in found[wrappers * index : wrappers * (index + 1)]:
            assert relative(ours, expected) <= 1e-9  # type: ignore[arg-type]
    plain = ck.swap_in(process.network())
    images, targets = process.data()
    plain_loss = torch.nn.functional.cross_entropy(plain(images), targets)
    without = torch.autograd.grad(plain_loss, list(plain.parameters()))
    names = [*process.CAM_CRITERIA, *process.STATIC.values()]
    for name, ours in zip(names, found[-len(names) :], strict=True):
        model = ck.swap_in(process.network())
        criterion = process.cam_criterion(name, model, slice(None))
        criterion(model(images), targets).backward()
        expected = [p.grad for p in model.parameters()]
        assert relative(ours, expected) <= 1e-9, name  # type: ignore[arg-type]
        assert relative(list(without), expected) > 1e-3, name  # type: ignore[arg-type]
        terms = criterion.terms
        assert all(value == 0 for key, value in terms.items() if key.endswith("dead")), name


def test_distributed_data_parallel_and_its_static_graph(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model = GuidedNet().double()
        twin = twin_of(model)
        wrapped = nn.parallel.DistributedDataParallel(model)
        images, targets = batch()
        criterion = ck.InterpretableGradientLoss(wrapped, weight=100.0)
        for _ in range(3):
            wrapped.zero_grad()
            criterion(wrapped(images), targets).backward()
        eager_loss(twin, images, targets, "cosine", 100.0).backward()
        ours, theirs = ([p.grad for p in m.parameters()] for m in (model, twin))
        assert relative(ours, theirs) <= 1e-9  # type: ignore[arg-type]
        # With two processes the gradients would be wrong, without a word, or it would hang.
        static = nn.parallel.DistributedDataParallel(model, static_graph=True)
        logits = static(images)
        with pytest.raises(ck.TapError, match="static_graph"):
            criterion(logits, targets)
    finally:
        torch.distributed.destroy_process_group()
