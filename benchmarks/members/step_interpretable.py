"""A training step with the interpretable-gradient term, against plain CE and the eager loop.

A step is forward, loss and backward to all parameter gradients; the optimiser's own step, the same
for every side, is not part of it. Layout and precision belong to the case: each side is compared
with plain cross-entropy in the same ones. Every side has its own copy of the model.

    plain           the model as it is, cross-entropy
    swapped_plain   ck.swap_in(model), cross-entropy
    ours            ck.swap_in(model), ck.InterpretableGradientLoss
    eager           the model as it is, double backpropagation by eager autograd (loops.py)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import camkernels as ck
from benchmarks import loops
from benchmarks.harness import Benchmark, Case, Options, Side, relative_error, require_agreement
from benchmarks.members import _steps
from benchmarks.members._steps import Maker

# The term dominates the gradients: at the paper's weights its errors would hide.
WEIGHT = 100.0
PLAIN = "plain"
Precision = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Setting:
    model: str
    precision: str
    layout: str

    @property
    def name(self) -> str:
        return f"{self.model} {self.precision} {self.layout}"

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.layout == "channels_last" else torch.contiguous_format

    def context(self, device: str) -> Precision:
        if self.precision == "float32":
            return nullcontext
        return functools.partial(torch.autocast, device, torch.bfloat16)


SETTINGS = (
    Setting("resnet50", "float32", "nchw"),
    Setting("resnet50", "float32", "channels_last"),
    Setting("resnet18", "float32", "nchw"),
    Setting("resnet18", "float32", "channels_last"),
    Setting("resnet50", "bfloat16 autocast", "channels_last"),
)
BATCH = {"resnet50": (8, 192), "resnet18": (16, 160)}
# bfloat16 on a CPU without instructions for it: a plain step of 8 x 192 takes half a minute.
SLOW_BATCH = (4, 128)
# What benchmarks/results/roofline.md predicts.
GPU_BATCH = (64, 224)


def _under(precision: Precision, loop: loops.Loop) -> loops.Loop:
    def run(images: Tensor, targets: Tensor) -> Tensor:
        with precision():
            return loop(images, targets)

    return run


def makers(precision: Precision = nullcontext) -> Mapping[str, Maker]:
    """The sides by name."""

    def plain(model: nn.Module) -> tuple[loops.Loop, Callable[[], None]]:
        loop, close = loops.plain(model)
        return _under(precision, loop), close

    def ours(model: nn.Module) -> tuple[loops.Loop, Callable[[], None]]:
        model = ck.swap_in(model)
        criterion = ck.InterpretableGradientLoss(model, error="cosine", weight=WEIGHT)
        loop: loops.Loop = lambda images, targets: criterion(model(images), targets)  # noqa: E731
        return _under(precision, loop), criterion.close

    return {
        PLAIN: plain,
        "swapped_plain": lambda model: plain(ck.swap_in(model)),
        "ours": ours,
        "eager": lambda model: loops.interpretable(model, WEIGHT, precision),
    }


def check(setting: Setting, options: Options) -> None:
    """In float64, on a batch small enough to be quick: ours and eager give the same loss and
    parameter gradients, and so do the two sides with cross-entropy alone. In float32 eager
    autograd itself is off by a per cent on a network of random weights."""
    images, targets = _steps.batch(2, 64, options, torch.float64)
    images = images.contiguous(memory_format=setting.memory_format)
    results: dict[str, list[Tensor]] = {}
    for name, maker in makers().items():
        model = _steps.network(setting.model).to(options.device, torch.float64)
        model = model.to(memory_format=setting.memory_format)  # type: ignore[call-overload]
        side = _steps.side(model, maker, images, targets)
        loss = side.forward()
        assert side.backward is not None
        results[name] = [loss.detach(), *side.backward(loss)]
        if side.close is not None:
            side.close()
    first_order = {name: results[name] for name in (PLAIN, "swapped_plain")}
    require_agreement(first_order, PLAIN, "float64")
    second_order = {name: results[name] for name in ("ours", "eager")}
    require_agreement(second_order, "eager", "float64")
    flat = [torch.cat([g.flatten() for g in results[n][1:]]) for n in ("eager", PLAIN)]
    if relative_error(*flat) < 0.9:
        raise RuntimeError("the interpretable-gradient term does not dominate the gradients")


def _case(setting: Setting, options: Options) -> Case:
    slow = setting.precision != "float32"
    batch, size = (2, 64) if options.quick else SLOW_BATCH if slow else BATCH[setting.model]
    if slow and options.device == "cuda" and not options.quick:
        batch, size = GPU_BATCH

    def build() -> dict[str, Callable[[], Side]]:
        images, targets = _steps.batch(batch, size, options, torch.float32)
        images = images.contiguous(memory_format=setting.memory_format)

        def factory(maker: Maker) -> Side:
            model = _steps.network(setting.model).to(options.device)
            model = model.to(memory_format=setting.memory_format)  # type: ignore[call-overload]
            return _steps.side(model, maker, images, targets)

        sides = makers(setting.context(options.device))
        return {name: lambda m=maker: factory(m) for name, maker in sides.items()}  # type: ignore[misc]

    facts: dict[str, Any] = {
        "model": setting.model,
        "precision": setting.precision,
        "layout": setting.layout,
        "batch": batch,
        "image_size": size,
        "weight": WEIGHT,
    }
    rounds = (3, 101) if slow else (5, 101)
    return Case(
        setting.name, build, check=lambda: check(setting, options), rounds=rounds, facts=facts
    )


def _cases(options: Options, precision: str) -> list[Case]:
    if options.dtype != "float32":
        raise ValueError("step_interpretable: precision belongs to the member, not to --dtype")
    return [_case(setting, options) for setting in SETTINGS if setting.precision == precision]


BENCHMARK = Benchmark(
    name="step_interpretable",
    about="ResNet training step in train mode, cross-entropy plus the interpretable-gradient term",
    cases=lambda options: _cases(options, "float32"),
    baseline=PLAIN,
    seconds=100.0,
    isolate=True,
    needs_torchvision=True,
    caveats=(
        "the optimiser's step is not included",
        "swapped_plain: cross-entropy alone through the swapped modules",
        "eager: double backpropagation with one forward, both input gradients from its graph",
        "the sides' agreement is checked in float64 at 2 x 64 x 64, in the layout of the case",
    ),
)
# A file of its own: on a CPU without bfloat16 instructions it takes longer than all the others.
BFLOAT16 = replace(
    BENCHMARK,
    name="step_interpretable_bfloat16",
    cases=lambda options: _cases(options, "bfloat16 autocast"),
)
