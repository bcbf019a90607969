"""Maps of images: explain() of every CAM explainer, fusion of layers, memory budgets."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import camkernels as ck
from camkernels.explain._memory import _Peak, bytes_of


class Net(nn.Module):
    """BatchNorm, dropout and a random state that explaining must not move."""

    def __init__(self, tanh: bool = False) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(6, 8, 3, 2), nn.ReLU())
        between = nn.Tanh() if tanh else nn.Identity()
        self.head = nn.Sequential(
            between, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 5)
        )

    def forward(self, x: Tensor) -> Any:
        return self.head(self.second(self.first(x)))


class Structured(Net):
    def forward(self, x: Tensor) -> Any:
        return {"logits": (super().forward(x),)}


METHODS: dict[str, Callable[..., Any]] = {
    "CAM": ck.CAM,
    "GradCAM": ck.GradCAM,
    "GradCAMPlusPlus": ck.GradCAMPlusPlus,
    "LayerCAM": ck.LayerCAM,
    "ScoreCAM": ck.ScoreCAM,
    "SmoothGradCAMPlusPlus": lambda *args, **options: ck.SmoothGradCAMPlusPlus(
        *args, samples=2, **options
    ),
}
every_method = pytest.mark.parametrize("name", METHODS)
TARGETS = [4, 0, 2, 2]


def images(count: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, 11, 9, generator=generator).double()


# CAM needs a head with a closed form, which a Tanh has not
@pytest.mark.parametrize(
    ("name", "tanh"), [(n, t) for n in METHODS for t in (False, True) if not (t and n == "CAM")]
)
def test_explain(name: str, tanh: bool) -> None:
    model, x = Net(tanh).double().train(), images()
    with METHODS[name](model, "second") as cam:
        whole = cam.explain(x, TARGETS)
        assert whole.shape == (4, 5, 4)
        assert whole.dtype == torch.float64
        assert not whole.requires_grad
        for targets in (torch.tensor(TARGETS), torch.tensor(TARGETS, dtype=torch.int32)):
            torch.testing.assert_close(cam.explain(x, targets), whole, rtol=0, atol=0)
        parts = cam.explain(x, TARGETS, batch_size=3)
        torch.testing.assert_close(parts, whole)
        torch.testing.assert_close(cam.explain(x[1:2], 0), whole[1:2])
        predicted = copy.deepcopy(model).eval()(x).argmax(1)
        torch.testing.assert_close(cam.explain(x), cam.explain(x, predicted))
        large = F.interpolate(whole[:, None], (11, 9), mode="bilinear")[:, 0]
        torch.testing.assert_close(cam.explain(x, TARGETS, size="input"), large)
        assert cam.explain(x, TARGETS, size=(7, 20)).shape == (4, 7, 20)
        assert cam.explain(x[:0]).shape == (0, 5, 4)
        assert cam.explain(x[:0], size="input").shape == (0, 11, 9)
        index = torch.tensor(TARGETS)[:, None]
        rows = [lambda row, c=c: row[c] for c in TARGETS]
        torch.testing.assert_close(cam.explain(x, rows, batch_size=3), whole)
        if name != "ScoreCAM":  # its callable is asked about other batches
            by_score = cam.explain(x, lambda logits: logits.gather(1, index)[:, 0])
            torch.testing.assert_close(by_score, whole)
        torch.testing.assert_close(cam.explain(x, lambda logits: logits[:, 3]), cam.explain(x, 3))
    structured = Structured(tanh).double()
    structured.load_state_dict(model.state_dict())
    if name != "CAM":
        with METHODS[name](structured, structured.second) as cam:
            found = cam.explain(x, TARGETS, logits=lambda output: output["logits"][0])
            torch.testing.assert_close(found, whole)
            with pytest.raises(TypeError, match="model: returned dict; pass logits="):
                cam.explain(x)


def test_explain_is_the_map_of_a_forward() -> None:
    model, x = Net().double().eval(), images()
    with ck.LayerCAM(model, "second") as cam:
        torch.testing.assert_close(cam.explain(x, TARGETS), cam(model(x), TARGETS).detach())
        logits = model(x)
        cam.explain(x)
        with pytest.raises(ck.TapError, match="no forward"):
            cam(logits)
        by_score = cam(model(x), lambda values: values[:, 1] * 2)
        torch.testing.assert_close(by_score, 2 * cam(model(x), 1))


@every_method
@pytest.mark.parametrize("context", ["grad", "no_grad", "inference"])
def test_nothing_is_left_changed(name: str, context: str) -> None:
    model, x = Net().double().train(), images()
    model.second.eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    contexts = {"grad": torch.enable_grad, "no_grad": torch.no_grad}
    expected = METHODS[name](copy.deepcopy(model), "second").explain(x, TARGETS)
    with contexts.get(context, torch.inference_mode)():
        cam = METHODS[name](model, "second")
        found = cam.explain(x.clone(), TARGETS)
        assert torch.is_grad_enabled() == (context == "grad")
    torch.testing.assert_close(found.clone(), expected)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(IndexError, match="class 9 is out of range for 5 classes"):
        cam.explain(x, [0, 1, 9, 2])
    assert [module.training for module in model.modules()] == modes
    cam.close()
    hooks = [m._forward_hooks or m._forward_pre_hooks for m in model.modules()]
    assert not any(hooks)


@pytest.mark.parametrize("name", ["GradCAM", "LayerCAM", "ScoreCAM", "SmoothGradCAMPlusPlus"])
def test_fusion_of_layers(name: str) -> None:
    model, x = Net(tanh=True).double().eval(), images()
    layers = ["first", "second"]

    def scaled(maps: Tensor) -> Tensor:
        low, high = (f((1, 2), keepdim=True) for f in (maps.amin, maps.amax))
        return torch.where(high > low, (maps - low) / (high - low), 0.0)  # one map is dead

    with METHODS[name](model, layers) as cam:
        maps = cam.explain(x, TARGETS)
        assert isinstance(maps, list)
        assert [tuple(m.shape) for m in maps] == [(4, 11, 9), (4, 5, 4)]
        sized = cam.explain(x, TARGETS, size="input")
        assert [tuple(m.shape) for m in sized] == [(4, 11, 9)] * 2
    alike = torch.stack(
        [scaled(maps[0]), F.interpolate(scaled(maps[1])[:, None], (11, 9), mode="bilinear")[:, 0]]
    )
    rules: dict[Any, Tensor] = {"mean": alike.mean(0), "max": alike.amax(0)}
    rules[lambda stacked: stacked.prod(0)] = alike.prod(0)
    for rule, expected in rules.items():
        with METHODS[name](model, layers, fusion=rule) as cam:
            torch.testing.assert_close(cam.explain(x, TARGETS), expected)
    with pytest.raises(ValueError, match="fusion: expected one of mean, max, a callable or None"):
        METHODS[name](model, layers, fusion="sum")
    with (
        METHODS[name](model, layers, fusion=lambda stacked: stacked) as cam,
        pytest.raises(ValueError, match=r"fusion: expected maps \(4, 11, 9\) of the callable"),
    ):
        cam.explain(x, TARGETS)


@pytest.mark.parametrize("tanh", [False, True])
def test_maps_of_scores_can_be_trained_through(tanh: bool) -> None:
    """Of a score that is not linear in the logits, with a closed form and without."""
    model, x = Net(tanh).double().eval(), images(2)

    def margin(logits: Tensor) -> Tensor:
        return logits[:, 1].exp() * logits[:, 2]

    a = model.second(model.first(x))
    (g,) = torch.autograd.grad(margin(model.head(a)).sum(), a, create_graph=True)
    expected = (g.mean((2, 3), keepdim=True) * a).sum(1).relu()
    with ck.GradCAM(model, "second") as cam:
        maps = cam(model(x), margin)
        torch.testing.assert_close(maps, expected)
        assert cam.head.startswith("autograd" if tanh else "closed form")
        with torch.no_grad():
            torch.testing.assert_close(cam(model(x), margin), expected.detach())
    parameters = list(model.parameters())
    found = torch.autograd.grad(maps.square().sum(), parameters, allow_unused=True)
    wanted = torch.autograd.grad(expected.square().sum(), parameters, allow_unused=True)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-12)


def test_fused_maps_can_be_trained_through() -> None:
    model, x = Net(tanh=True).double().eval(), images(2)
    with ck.GradCAM(model, ["first", "second"], fusion="mean") as cam:
        maps = cam(model(x), [1, 2])
        statistics = cam.statistics(model(x), [1, 2])
        torch.testing.assert_close(statistics.mean, maps.mean((1, 2)))
        weight = model.first[0].weight

        def loss() -> Tensor:
            return cam(model(x), [1, 2]).square().mean()

        (gradient,) = torch.autograd.grad(loss(), weight)
        index, step = (2, 1, 0, 1), 1e-6
        with torch.no_grad():
            weight[index] += step
        above = loss().detach()
        with torch.no_grad():
            weight[index] -= 2 * step
        below = loss().detach()
        assert float(gradient[index]) == pytest.approx(float(above - below) / (2 * step), rel=1e-4)


@every_method
def test_memory_budget(name: str) -> None:
    model, x = Net().double().eval(), images(9)
    with METHODS[name](model, "second") as cam:
        with _Peak() as one:
            cam.explain(x[:1], batch_size=1)
        budget = 3 * one.bytes
        with _Peak() as peak:
            found = cam.explain(x, memory_budget=budget)
        # the maps of all nine are returned, and found twice over while they are joined
        assert one.bytes < peak.bytes <= budget + 2 * found.nbytes
        torch.testing.assert_close(found, cam.explain(x))
        with pytest.raises(ValueError, match=r"memory_budget: one image takes \S+ MiB, more than"):
            cam.explain(x, memory_budget=one.bytes // 4)
        with pytest.raises(ValueError, match="batch_size, memory_budget: expected one of them"):
            cam.explain(x, memory_budget=budget, batch_size=2)


@pytest.mark.parametrize("explainer", [ck.InputGradient, ck.GuidedBackprop])
def test_memory_budget_of_gradients(explainer: Any) -> None:
    model, x = Net().double().eval(), images(9)
    with _Peak() as one:
        whole = explainer(model)(x[:1])
    with _Peak() as peak:
        found = explainer(model, memory_budget=4 * one.bytes)(x)
    assert one.bytes < peak.bytes <= 4 * one.bytes + 2 * found.nbytes
    torch.testing.assert_close(found[:1], whole)
    with pytest.raises(ValueError, match="one image takes"):
        explainer(model, memory_budget="1KiB")(x)


def test_budgets_are_read() -> None:
    texts = {"512MiB": 512 << 20, "2 GB": 2 * 10**9, "1.5k": 1500, "7": 7, "8b": 8, 5: 5}
    for text, size in texts.items():
        assert bytes_of(text) == size
    for bad in ("", "x", "-1", "3ib", "1 XB", 0, "0"):
        with pytest.raises(ValueError, match="memory_budget"):
            bytes_of(bad)
    for bad in (1.5, True, None):
        with pytest.raises(TypeError, match="memory_budget"):
            bytes_of(bad)  # type: ignore[arg-type]


def test_what_cannot_be_explained_is_refused() -> None:
    model, x = Net().eval(), images().float()
    with ck.GradCAM(model, "second") as cam:
        with pytest.raises(TypeError, match="images: expected a tensor"):
            cam.explain([x[0], x[1, :, :5]])
        with pytest.raises(TypeError, match="images: expected a floating-point dtype"):
            cam.explain(x.long())
        with pytest.raises(ValueError, match=r"images: expected \(B, C, H, W\)"):
            cam.explain(x[0])
        with pytest.raises(ValueError, match="targets: expected one per image, 4, got 3"):
            cam.explain(x, [1, 2, 3])
        with pytest.raises(TypeError, match="targets: expected class indices"):
            cam.explain(x, "cat")
        with pytest.raises(ck.TapError, match="detached from the logits"):
            cam.explain(x, lambda logits: logits[:, 0].detach())
        for size in ("large", (1, 2, 3), (0, 4), (2.5, 3)):
            with pytest.raises(ValueError, match="size: expected 'layer', 'input'"):
                cam.explain(x, size=size)
        with pytest.raises(ValueError, match="batch_size: expected a positive number"):
            cam.explain(x, batch_size=0)
    for method in (ck.GradCAM, ck.ScoreCAM):
        with method(model, "head.2") as cam, pytest.raises(ck.TapError, match=r"\(B, K, h, w\)"):
            cam.explain(x)


def test_memory_is_flat_over_a_thousand_batches() -> None:
    model, x = Net().eval(), images(2).float()
    cams = {name: METHODS[name](model, "second") for name in METHODS}

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other cost more than such a forward
    try:
        for cam in cams.values():
            cam.explain(x)
        before = alive()
        for name, cam in cams.items():
            for _ in range(1000 if name in ("CAM", "GradCAM") else 50):
                cam.explain(x)
        assert alive() <= before
    finally:
        torch.set_num_threads(threads)
