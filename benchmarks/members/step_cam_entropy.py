"""A ResNet-50 training step with CAM entropy in the loss, against plain CE and today's loops.

A step is forward, loss and backward to all parameter gradients (kept in ``.grad``, from None); the
optimiser's own step, the same for every side, is not part of it. Every side has its own copy of the
model, so that no side's hooks run in another.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import camkernels as ck
from benchmarks import loops
from benchmarks.harness import Benchmark, Case, Options, Side, relative_error, require_agreement
from benchmarks.members import _steps
from benchmarks.members._steps import Maker

BETA = 100.0
PLAIN = "plain"


def _model(options: Options) -> nn.Module:
    """ResNet-50 (ResNet-18 with --quick) in train mode, from a fixed seed.

    The rows of the last layer are shifted alike, which changes no softmax and makes every map of
    layer4 live: a dead map has nothing to differentiate.
    """
    model = _steps.network("resnet18" if options.quick else "resnet50")
    with torch.no_grad():
        model.get_parameter("fc.weight").add_(0.05)
    return model


def ours(layer: str) -> Maker:
    """``ck.CAMEntropyLoss`` in place of ``nn.CrossEntropyLoss``."""

    def make(model: nn.Module) -> tuple[loops.Loop, Callable[[], None]]:
        criterion = ck.CAMEntropyLoss(model, layer, beta=BETA)
        return lambda images, targets: criterion(model(images), targets), criterion.close

    return make


def makers(layer: str) -> Mapping[str, Maker]:
    """The sides at one target layer; the closed form of alpha exists behind layer4 only."""
    out: dict[str, Maker] = {
        PLAIN: loops.plain,
        "ours": ours(layer),
        "careful": lambda m: loops.careful(m, layer, BETA),
        "separate": lambda m: loops.separate(m, layer, BETA),
    }
    if layer == "layer4":
        out["closed_form"] = lambda m: loops.closed_form(m, layer, "fc", BETA)
    return out


def check(layer: str, options: Options) -> None:
    """All sides but plain CE give the same loss and parameter gradients, in float64, on a batch
    small enough to be quick; in float32 eager autograd itself is off by a per cent here."""
    model = _model(options).to(options.device, torch.float64)
    images, targets = _steps.batch(2, 64, options, torch.float64)
    results: dict[str, list[Tensor]] = {}
    for name, maker in makers(layer).items():
        side = _steps.side(copy.deepcopy(model), maker, images, targets)
        loss = side.forward()
        assert side.backward is not None
        gradients = side.backward(loss)
        results[name] = [loss.detach(), torch.cat([g.flatten() for g in gradients])]
        if side.close is not None:
            side.close()
    apart = results.pop(PLAIN)[1]
    require_agreement(results, "careful", "float64")
    if relative_error(results["careful"][1], apart) < 0.1:
        raise RuntimeError(f"the CAM entropy at {layer} does not show in the gradients")


def _case(layer: str, batch: int, size: int, options: Options) -> Case:
    def build() -> dict[str, Callable[[], Side]]:
        images, targets = _steps.batch(batch, size, options, options.torch_dtype)

        def factory(maker: Maker) -> Side:
            model = _model(options).to(options.device, options.torch_dtype)
            return _steps.side(model, maker, images, targets)

        return {name: lambda m=maker: factory(m) for name, maker in makers(layer).items()}  # type: ignore[misc]

    side = size // (32 if layer == "layer4" else 16)
    facts: dict[str, Any] = {
        "layer": layer,
        "model": "resnet18" if options.quick else "resnet50",
        "batch": batch,
        "image_size": size,
        "beta": BETA,
        "maps_bytes": batch * side * side * 4,
    }
    return Case(
        name=layer,
        build=build,
        check=lambda: check(layer, options),
        facts=facts,
    )


def cases(options: Options) -> list[Case]:
    batch, size = (2, 64) if options.quick else (8, 192)
    return [_case(layer, batch, size, options) for layer in ("layer4", "layer3")]


BENCHMARK = Benchmark(
    name="step_cam_entropy",
    about="ResNet-50 training step in train mode, cross-entropy plus CAM entropy of the true class",
    cases=cases,
    baseline=PLAIN,
    seconds=100.0,
    isolate=True,
    needs_torchvision=True,
    caveats=(
        "the optimiser's step is not included",
        "separate: a second forward for the map; careful: one forward, autograd.grad with "
        "create_graph; closed_form: alpha from the last layer's weights, eager",
        "the sides' agreement is checked in float64 at 2 x 64 x 64",
    ),
)
