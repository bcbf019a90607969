"""CAMConsistencyLoss: values and gradients against eager autograd, and what it leaves alone."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from consistency_oracle import BOXES, FLIPS, SIDE, eager_loss
from nets import SmallNet, batch, largest_difference, model_and_twin, parameter_gradients
from torch import Tensor, nn

import camkernels as ck
from camkernels.losses._contrast import contrast
from camkernels.losses._trivial import trivial
from camkernels.taps.views import View

SMALL = {"window_size": 3}


def ours(
    model: nn.Module, images: Tensor, targets: Tensor, **options: Any
) -> tuple[Tensor, ck.CAMConsistencyLoss]:
    criterion = ck.CAMConsistencyLoss(model, "body", **{**SMALL, **options})
    if criterion.views == "joint":
        criterion.use(BOXES, FLIPS)
        return criterion(model(images), targets), criterion
    return criterion(model(images), targets, BOXES, FLIPS), criterion


@pytest.mark.parametrize("p", [1.0, 2.0])
@pytest.mark.parametrize("views", ["separate", "joint"])
@pytest.mark.parametrize("head", ["linear", "mlp", "batch-norm", "tanh"])
def test_parameter_gradients_equal_eager_autograd(head: str, views: str, p: float) -> None:
    model, twin = model_and_twin(head)
    images, targets = batch(side=SIDE)
    loss, criterion = ours(model, images, targets, alpha=3.0, beta=0.01, p=p, views=views)
    found = parameter_gradients(model, loss)
    truth = eager_loss(twin, images, targets, 3.0, 0.01, p, joint=views == "joint")
    assert float((loss - truth).abs()) <= 1e-11
    assert largest_difference(found, parameter_gradients(twin, truth)) <= 1e-10
    closed = head in ("linear", "mlp")
    assert criterion.head.startswith("closed form" if closed else "autograd")


def test_contrast_leaves_out_samples_that_do_not_count() -> None:
    u, v = torch.rand(4, 6, 6), torch.rand(4, 6, 6)
    counted = torch.tensor([True, False, True, True])
    found = contrast(u, v, counted, 0.5)
    assert float(found[1]) == 0
    torch.testing.assert_close(
        found[counted], contrast(u[counted], v[counted], counted[counted], 0.5)
    )


def test_every_parameter_learns_from_the_second_view_and_the_norm() -> None:
    for options in ({"alpha": 5.0, "beta": 0.0}, {"alpha": 0.0, "beta": 5.0}):
        model, twin = model_and_twin()
        images, targets = batch(side=SIDE)
        loss, _ = ours(model, images, targets, **options)
        plain = F.cross_entropy(twin(images), targets)
        found, without = parameter_gradients(model, loss), parameter_gradients(twin, plain)
        moved = {
            name
            for (name, _), a, b in zip(model.named_parameters(), found, without, strict=True)
            if float((a - b).abs().max()) > 1e-7
        }
        assert {"body.0.weight", "body.1.weight", "body.3.weight", "fc.1.weight"} <= moved


def test_alpha_and_beta_zero_are_cross_entropy_to_the_bit() -> None:
    model = SmallNet()
    twin = copy.deepcopy(model)
    images, targets = batch(side=SIDE, dtype=torch.float32)
    loss, criterion = ours(model, images, targets, alpha=0.0, beta=0.0)
    truth = F.cross_entropy(twin(images), targets)
    assert torch.equal(loss, truth)
    for a, b in zip(
        parameter_gradients(model, loss), parameter_gradients(twin, truth), strict=True
    ):
        assert torch.equal(a, b)
    assert "consistency" not in criterion.terms
    assert {"sparsity", "dead", "uniform"} <= set(criterion.terms)
    running, expected = (m.body[1].running_mean for m in (model, twin))
    assert torch.equal(running, expected), "a second forward moved the statistics"


def test_ignored_samples_do_not_count() -> None:
    model = SmallNet().double().eval()
    images, targets = batch(side=SIDE)
    criterion = ck.CAMConsistencyLoss(model, "body", 1.0, 1e-3, **SMALL)
    targets = targets.clone()
    targets[3] = -100
    loss = criterion(model(images), targets, BOXES, FLIPS)
    fewer = criterion(model(images[:3]), targets[:3], BOXES[:3], FLIPS[:3])
    torch.testing.assert_close(loss, fewer)


def test_dead_and_uniform_maps_are_counted() -> None:
    class Flat(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(value))
            self.layer = nn.Identity()
            self.fc = nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.layer(torch.ones_like(x[:, :2]) * self.scale).mean((2, 3)))

    images, targets = torch.rand(4, 3, SIDE, SIDE), torch.zeros(4, dtype=torch.long)
    for value, dead, uniform in ((0.0, 1.0, 0.0), (1.0, 0.0, 1.0)):
        model = Flat(value)
        criterion = ck.CAMConsistencyLoss(model, "layer", 1.0, 1.0, **SMALL)
        loss = criterion(model(images), targets, BOXES, FLIPS)
        loss.backward()
        assert float(criterion.terms["dead"]) == dead
        assert float(criterion.terms["uniform"]) == uniform
        assert bool(torch.isfinite(loss))


def test_maps_that_cover_the_picture_are_uniform() -> None:
    maps = 1 + 0.02 * torch.randn(3, 7, 7)
    maps[:, 0, 0] = 0.0  # the whole range is one corner
    maps[1, :4] = 0.0  # half of the picture: an explanation
    maps[2] = 0.0
    maps[2, 3, 3] = 1.0  # one pixel: a sparse one
    dead, uniform = trivial(maps)
    assert not bool(dead.any())
    assert uniform.tolist() == [True, False, False]
    assert trivial(-maps)[1].tolist() == [False, False, True], "all but one pixel"


def test_alpha_zero_is_measured_where_gradients_are_off() -> None:
    model = SmallNet().eval()
    images, targets = batch(side=SIDE, dtype=torch.float32)
    criterion = ck.CAMConsistencyLoss(model, "body", alpha=0.0, beta=0.0, **SMALL)
    with torch.no_grad():
        loss = criterion(model(images), targets, BOXES, FLIPS)
    assert torch.equal(loss, F.cross_entropy(model(images), targets))
    scores = ck.consistency_scores(model, "body", images, BOXES, FLIPS, window_size=3)
    torch.testing.assert_close(criterion.consistency, scores)


def test_nothing_of_the_users_changes() -> None:
    model = SmallNet("dropout")
    model.body[1].eval()
    modes = [m.training for m in model.modules()]
    images, targets = batch(side=SIDE, dtype=torch.float32)
    criterion = ck.CAMConsistencyLoss(model, "body", **SMALL)
    logits = model(images)
    model.fc[1].eval()  # no dropout in the second forward: nothing else may draw
    state = torch.get_rng_state()
    loss = criterion(logits, targets)
    assert torch.equal(torch.get_rng_state(), state)
    model.fc[1].train()
    assert [m.training for m in model.modules()] == modes
    assert images.grad is None
    assert not images.requires_grad
    loss.backward()
    criterion.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_batch_norm_statistics_move_twice_in_separate_and_once_in_joint_views() -> None:
    images, targets = batch(side=SIDE, dtype=torch.float32)
    for views, times in (("separate", 2), ("joint", 1)):
        model = SmallNet()
        ours(model, images, targets, views=views)
        assert int(model.body[1].num_batches_tracked) == times


def test_without_gradients_it_measures() -> None:
    for views in ("separate", "joint"):
        model = SmallNet().eval()
        images, targets = batch(side=SIDE, dtype=torch.float32)
        criterion = ck.CAMConsistencyLoss(model, "body", views=views, **SMALL)
        with torch.no_grad():
            logits = model(images)
            assert logits.shape[0] == 4
            loss = criterion(logits, targets)
        assert not loss.requires_grad
        assert 0 < float(criterion.terms["consistency"]) <= 1


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_through_the_engine(memory: str) -> None:
    model, twin = model_and_twin()
    images, targets = batch(side=SIDE)
    swapped = ck.swap_in(model, engine=True, memory=memory)
    loss, _ = ours(swapped, images, targets, alpha=3.0, beta=0.01)
    truth = eager_loss(twin, images, targets, 3.0, 0.01, 1.0)
    found, wanted = parameter_gradients(model, loss), parameter_gradients(twin, truth)
    assert largest_difference(found, wanted) <= 1e-10


# ---- views ----


def test_drawn_views_are_those_of_random_resized_crop() -> None:
    draw = ck.RandomResizedCropFlip(seed=3)
    boxes, flips = draw(4000, 100, 140)
    top, left, height, width = boxes.unbind(1)
    assert bool(((top >= 0) & (left >= 0) & (top + height <= 100) & (left + width <= 140)).all())
    share, ratio = height * width / 14000, width / height
    assert 0.07 < float(share.min()) < 0.1
    assert float(share.max()) <= 1.0
    assert float(ratio.min()) > 0.7
    assert float(ratio.max()) < 1.4
    assert abs(float(flips.double().mean()) - 0.5) < 0.05
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    picture = torch.empty(3, 100, 140)
    theirs = torch.tensor(
        [RandomResizedCrop.get_params(picture, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]
    )
    found, expected = boxes.double().mean(0), theirs.double().mean(0)
    assert bool(((found - expected).abs() < 1.5).all()), (found, expected)


def test_pictures_that_no_crop_fits_get_the_central_one() -> None:
    boxes, _ = ck.RandomResizedCropFlip(scale=(1.0, 1.0), seed=0)(3, 10, 100)
    assert boxes.tolist() == [[0, 43, 10, 13]] * 3


def test_seeds() -> None:
    one, other = (ck.RandomResizedCropFlip(seed=s)(8, 50, 50) for s in (1, 2))
    again = ck.RandomResizedCropFlip(seed=1)(8, 50, 50)
    assert torch.equal(one.boxes, again.boxes)
    assert not torch.equal(one.boxes, other.boxes)
    for options in ({"scale": (0.5, 0.2)}, {"scale": (0.5, 1.5)}, {"ratio": (0.0, 1.0)},
                    {"flip": 1.5}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(options))):
            ck.RandomResizedCropFlip(**options)  # type: ignore[arg-type]


# ---- errors ----


def test_wrong_arguments() -> None:
    model = SmallNet()
    for options in (
        {"alpha": float("nan")}, {"p": -1.0}, {"p": 0.5}, {"target": "both"},
        {"normalize": "sum"}, {"distance": "l2"}, {"views": "two"}, {"temperature": 0.0},
        {"window_size": 4}, {"reduction": "max"}, {"padding": "zero"}, {"data_range": 0.0},
        {"data_range": -1.0}, {"data_range": float("nan")},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(options))):
            ck.CAMConsistencyLoss(model, "body", **options)
    with pytest.raises(ValueError, match="layer"):
        ck.CAMConsistencyLoss(model, ["body", "pool"])  # type: ignore[arg-type]
    assert not model._forward_hooks, "a refused criterion left hooks"


@pytest.mark.parametrize("alpha", [0.0, 0.1])
@pytest.mark.parametrize("views", ["separate", "joint"])
@pytest.mark.parametrize(
    ("boxes", "flips", "error", "message"),
    [
        (BOXES[:2], FLIPS[:2], ValueError, r"boxes: expected \(4, 4\) for this.*got \(2, 4\)"),
        (BOXES.tolist(), None, TypeError, "boxes: expected an int64 or int32 tensor.*got list"),
        (BOXES.float(), None, TypeError, r"boxes: expected an int64.*got torch\.float32"),
        (BOXES + 1, FLIPS, ValueError, r"boxes: sample 0 has.*\[1, 1, 13, 13\].*12 x 12 pixels"),
        (BOXES, FLIPS[:2], ValueError, r"flips: expected \(4,\) for this batch, got \(2,\)"),
        (BOXES, FLIPS.tolist(), TypeError, "flips: expected a bool tensor.*got list"),
        (BOXES, FLIPS.long(), TypeError, r"flips: expected a bool tensor.*got torch\.int64"),
    ],
)
def test_refused_parameters_are_told_and_forgotten(
    boxes: Any, flips: Any, error: type[Exception], message: str, views: str, alpha: float
) -> None:
    model = SmallNet()
    images, targets = batch(side=SIDE, dtype=torch.float32)
    criterion = ck.CAMConsistencyLoss(model, "body", alpha, views=views, **SMALL)
    criterion.use(boxes, flips)
    with pytest.raises(error, match=message):
        criterion(model(images), targets)
    criterion(model(images), targets).backward()
    if views == "separate":
        with pytest.raises(error, match=message):
            criterion(model(images), targets, boxes, flips)


def test_parameters_in_the_wrong_place() -> None:
    model = SmallNet()
    images, targets = batch(side=SIDE, dtype=torch.float32)
    criterion = ck.CAMConsistencyLoss(model, "body", **SMALL)
    with pytest.raises(ValueError, match="flips: recorded parameters need boxes"):
        criterion(model(images), targets, None, FLIPS)
    criterion.transform = lambda batch, height, width: (BOXES.tolist(), FLIPS)
    with pytest.raises(TypeError, match=r"transform: expected .* two tensors.* got list, Tensor"):
        criterion(model(images), targets)
    criterion.close()
    joint = ck.CAMConsistencyLoss(model, "body", views="joint", **SMALL)
    with pytest.raises(ValueError, match=r"criterion\.use"):
        joint(model(images), targets, BOXES, FLIPS)


def test_views_of_a_forward_that_got_no_loss_are_not_those_of_the_next() -> None:
    model = SmallNet()
    images, targets = batch(side=SIDE, dtype=torch.float32)
    criterion = ck.CAMConsistencyLoss(model, "body", views="joint", **SMALL)
    model(images)
    with torch.no_grad():  # no joint forward, hence views of its own
        criterion(model(images[:2]), targets[:2])
    assert criterion.consistency.shape == (2,)


def test_stale_logits() -> None:
    model = SmallNet()
    images, targets = batch(side=SIDE, dtype=torch.float32)
    criterion = ck.CAMConsistencyLoss(model, "body", **SMALL)
    with pytest.raises(ck.TapError, match="no forward"):
        criterion(torch.randn(4, 5), targets)
    logits = model(images)
    model(images[:2])
    with pytest.raises(ck.TapError, match="stale"):
        criterion(logits, targets)


@pytest.mark.parametrize("views", ["separate", "joint"])
def test_copies_and_pickles(views: str) -> None:
    model = SmallNet().double()
    criterion = ck.CAMConsistencyLoss(model, "body", alpha=0.3, views=views, **SMALL)
    images, targets = batch(side=SIDE)
    criterion(model(images), targets)
    copied = copy.deepcopy(criterion)
    buffer = io.BytesIO()
    torch.save(criterion, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    found = []
    for one in (copied, loaded, criterion):
        assert one.alpha == 0.3
        inner = one._images.model
        assert inner is one._tap.model
        before = int(inner.body[1].num_batches_tracked)
        one.use(BOXES, FLIPS)
        loss = one(inner(images), targets)
        forwards = int(inner.body[1].num_batches_tracked) - before
        assert forwards == (1 if views == "joint" else 2)
        found.append(parameter_gradients(inner, loss))
    assert largest_difference(found[0], found[2]) <= 1e-12
    assert largest_difference(found[1], found[2]) <= 1e-12


def test_scores_are_of_evaluation_mode_and_leave_the_model_alone() -> None:
    model = SmallNet()
    model.body[1].eval()
    modes = [m.training for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    images, _ = batch(side=SIDE, dtype=torch.float32)
    scores = ck.consistency_scores(model, "body", images, BOXES, FLIPS, window_size=3)
    assert scores.shape == (4,)
    assert not scores.requires_grad
    assert abs(float(scores[0]) - 1) < 1e-5  # the whole picture, not mirrored
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(ValueError, match="normalize"):
        ck.consistency_scores(model, "body", images, BOXES, normalize="sum")


def test_a_view_goes_to_the_device_of_the_images() -> None:
    view = View(BOXES, FLIPS).to(torch.device("meta"))
    assert view.boxes.is_meta
    assert view.flips.is_meta
