"""InterpretableGradientLoss: what trainers do to a criterion, and bad input."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import subprocess
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import interpretable_gradient_process as process
import pytest
import torch
from guided_nets import GuidedNet, eager_loss, twin_of
from nets import SmallNet, batch, largest_difference, parameter_gradients
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import camkernels as ck
from camkernels.nn import functional as ck_functional


def relative(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return largest_difference(ours, theirs) / max(float(t.abs().max()) for t in theirs)


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


class Pointwise(nn.Module):
    def __init__(self, relu: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.fc = nn.Linear(6, 5)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.relu(self.conv(x)).mean((2, 3)))
        return logits


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


# -- processes -------------------------------------------------------------------------------


def test_two_processes_with_synchronised_statistics_equal_one_with_all_the_batch(
    tmp_path: Path, python: str, subprocess_environment: dict[str, str]
) -> None:
    command = [python, process.__file__]
    workers = [
        subprocess.Popen(
            [*command, str(rank), "2", str(tmp_path)],
            env=subprocess_environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for worker in workers:
            output = worker.communicate(timeout=300)[0]
            assert worker.returncode == 0, output
    finally:
        for worker in workers:
            worker.kill()
    found = torch.load(tmp_path / "gradients.pt")
    for index, (error, inner) in enumerate(process.SETTINGS):
        model = ck.swap_in(process.network())
        process.train(model, *process.data(), error=error, inner_reduction=inner)
        expected = [p.grad for p in model.parameters()]
        wrappers = len(process.WRAPPERS)
        for ours in found[wrappers * index : wrappers * (index + 1)]:
            assert relative(ours, expected) <= 1e-9  # type: ignore[arg-type]


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
