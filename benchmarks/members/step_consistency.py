"""A training step of CAM consistency against plain cross-entropy.

A step is forward, loss and backward to all parameter gradients; two forwards and two backwards of
the network are its floor.

    plain      the model as it is, cross-entropy
    ours       the model as it is, ck.CAMConsistencyLoss
    swapped    ck.swap_in(model), the same
    lean       ck.swap_in(model, engine=True, memory="lean"), the same
    eager      a careful loop: two forwards, the closed form of the maps, eager.consistency
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import camkernels as ck
from benchmarks import eager, loops
from benchmarks.harness import Benchmark, Case, Options, Side, require_agreement
from benchmarks.members import _steps
from benchmarks.members._steps import Maker

ALPHA, BETA = 10.0, 1e-3
BATCH = {"resnet50": (8, 192), "resnet18": (16, 160)}


def _views() -> Callable[[int, int, int], tuple[Tensor, Tensor]]:
    """The same views in every step and on every side."""

    def draw(batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        return ck.RandomResizedCropFlip(seed=1)(batch, height, width)

    return draw


def _ours(swap: Callable[[nn.Module], nn.Module]) -> Maker:
    def make(model: nn.Module) -> tuple[loops.Loop, Callable[[], None]]:
        model = swap(model)
        criterion = ck.CAMConsistencyLoss(model, "layer4", ALPHA, BETA, transform=_views())
        return lambda images, targets: criterion(model(images), targets), criterion.close

    return make


def _eager(model: nn.Module) -> tuple[loops.Loop, Callable[[], None]]:
    kept = loops.Kept(model.layer4)  # type: ignore[arg-type]
    draw = _views()

    def maps(logits: Tensor, classes: Tensor) -> Tensor:
        activations = kept.take()
        weights = model.fc.weight[classes]  # type: ignore[index, union-attr]
        b, _, h, w = activations.shape
        found = torch.bmm(weights[:, None], activations.flatten(2)).view(b, h, w) / (h * w)
        low, high = found.amin((1, 2), True), found.amax((1, 2), True)
        return (found - low) / (high - low)

    def loop(images: Tensor, targets: Tensor) -> Tensor:
        size = (images.shape[2], images.shape[3])
        boxes, flips = draw(images.shape[0], *size)
        logits = model(images)
        classes = logits.argmax(1)
        first = maps(logits, classes)
        with torch.no_grad():
            views = eager.crop_resize_flip(images, boxes, flips, size)
        second = maps(model(views), classes)
        scores = eager.consistency(first, second, boxes, flips, size)
        whole = F.interpolate(first[:, None], size, mode="bilinear", align_corners=False)
        norms = whole.abs().flatten(1).sum(1).mean()
        return F.cross_entropy(logits, targets) + ALPHA * (1 - scores).mean() + BETA * norms

    return loop, kept.handle.remove


MAKERS: dict[str, Maker] = {
    "plain": loops.plain,
    "ours": _ours(lambda model: model),
    "swapped": _ours(ck.swap_in),
    "lean": _ours(lambda model: ck.swap_in(model, engine=True, memory="lean")),
    "eager": _eager,
}


def check(name: str, options: Options) -> None:
    """In float64 all sides but plain give the same gradients."""
    images, targets = _steps.batch(2, 64, options, torch.float64)
    results = {}
    for side_name, maker in MAKERS.items():
        if side_name == "plain":
            continue
        model = _steps.network(name).to(options.device, torch.float64)
        side = _steps.side(model, maker, images, targets)
        loss = side.forward()
        assert side.backward is not None
        results[side_name] = [loss.detach(), *side.backward(loss)]
        if side.close is not None:
            side.close()
    require_agreement(results, "eager", "float64")


def _case(name: str, options: Options) -> Case:
    batch, size = (2, 64) if options.quick else BATCH[name]

    def build() -> dict[str, Callable[[], Side]]:
        images, targets = _steps.batch(batch, size, options, torch.float32)

        def factory(maker: Maker) -> Side:
            return _steps.side(_steps.network(name).to(options.device), maker, images, targets)

        return {n: lambda m=maker: factory(m) for n, maker in MAKERS.items()}  # type: ignore[misc]

    facts = {"model": name, "batch": batch, "image_size": size}
    return Case(
        f"{name} {batch}x{size}", build, check=lambda: check(name, options), rounds=(5, 101),
        facts=facts,
    )  # fmt: skip


BENCHMARK = Benchmark(
    name="step_consistency",
    about="ResNet training step in train mode with CAM consistency and sparsity",
    cases=lambda options: [_case(name, options) for name in BATCH],
    baseline="plain",
    seconds=45.0,
    isolate=True,
    needs_torchvision=True,
    caveats=(
        "the optimiser's step is not included",
        "plain: one forward of the pictures; the others: of pictures and of views, of one size",
        "eager: the closed form of the map, one grid_sample for the views",
    ),
)
