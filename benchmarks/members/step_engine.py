"""Training steps run by the second-order engine, against plain cross-entropy in eager PyTorch.

A step is forward, loss and backward to all parameter gradients; the optimiser's own step, the same
for every side, is not part of it. Every side has its own copy of the model.

    plain       the model as it is, cross-entropy
    fast, lean, lean_bf16
                ck.swap_in(model, engine=True, memory=...) and the criterion of the case
    fast_ce, lean_ce
                the engine with cross-entropy alone
    eager       the criterion of the case in eager autograd, with care (loops.py)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import camkernels as ck
from benchmarks import loops
from benchmarks.harness import Benchmark, Case, Options, Side, relative_error, require_agreement
from benchmarks.members import _steps
from benchmarks.members._steps import Maker
from benchmarks.members.step_interpretable import (
    BATCH,
    GPU_BATCH,
    PLAIN,
    WEIGHT,
    Setting,
    _under,
)

BETA = 1.0


@dataclass(frozen=True)
class Work:
    """One case: a setting, a criterion and the sides that are of interest there."""

    setting: Setting
    sides: tuple[str, ...]
    layer: str | None = None
    """Of CAM entropy; None: the interpretable gradient."""
    size: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        loss = "interpretable" if self.layer is None else f"cam {self.layer}"
        size = "" if self.size is None else f" {self.size[0]}x{self.size[1]}"
        return f"{self.setting.name} {loss}{size}"


_NCHW = Setting("resnet50", "float32", "nchw")
WORKS = (
    Work(_NCHW, ("fast", "lean", "lean_bf16", "fast_ce", "lean_ce", "eager")),
    Work(
        Setting("resnet50", "float32", "channels_last"),
        ("fast", "lean", "lean_bf16", "fast_ce", "lean_ce", "eager"),
    ),
    Work(_NCHW, ("fast",), size=(16, 224)),
    Work(
        Setting("resnet50", "bfloat16 autocast", "channels_last"), ("fast", "lean"), size=(8, 192)
    ),
    Work(_NCHW, ("lean", "eager"), layer="layer4"),
    Work(_NCHW, ("fast", "lean", "eager"), layer="layer3"),
    Work(_NCHW, ("fast", "lean", "eager"), layer="layer2"),
    Work(Setting("resnet18", "float32", "nchw"), ("fast", "lean", "eager")),
)


# On a GPU only; what benchmarks/results/roofline.md predicts.
_LOWERED = Setting("resnet50", "bfloat16 autocast", "channels_last")
GPU_WORKS = (
    Work(_LOWERED, ("fast", "lean", "fast_ce", "eager"), size=GPU_BATCH),
    Work(_LOWERED, ("fast", "lean", "eager"), layer="layer4", size=GPU_BATCH),
)


def _engine(memory: str, criterion: Callable[[nn.Module], Any]) -> Maker:
    def make(model: nn.Module) -> tuple[loops.Loop, Callable[[], None]]:
        model = ck.swap_in(model, engine=True, memory=memory)
        loss = criterion(model)
        close = getattr(loss, "close", lambda: None)
        return lambda images, targets: loss(model(images), targets), close

    return make


def makers(work: Work, device: str) -> dict[str, Maker]:
    """The sides of a case by name."""
    precision = work.setting.context(device)

    def ours(model: nn.Module) -> nn.Module:
        if work.layer is not None:
            return ck.CAMEntropyLoss(model, work.layer, BETA)
        return ck.InterpretableGradientLoss(model, "cosine", WEIGHT)

    def cross_entropy(model: nn.Module) -> nn.Module:
        return nn.CrossEntropyLoss()

    def eager(model: nn.Module) -> tuple[loops.Loop, Callable[[], None]]:
        if work.layer is not None:
            return loops.careful(model, work.layer, BETA)
        return loops.interpretable(model, WEIGHT, precision)

    def under(maker: Maker) -> Maker:
        def make(model: nn.Module) -> tuple[loops.Loop, Callable[[], None]]:
            loop, close = maker(model)
            return _under(precision, loop), close

        return make

    known: dict[str, Maker] = {
        PLAIN: under(loops.plain),
        "fast": under(_engine("fast", ours)),
        "lean": under(_engine("lean", ours)),
        "lean_bf16": under(_engine("lean-bf16", ours)),
        "fast_ce": under(_engine("fast", cross_entropy)),
        "lean_ce": under(_engine("lean", cross_entropy)),
        "eager": eager,
    }
    return {name: known[name] for name in (PLAIN, *work.sides)}


def check(work: Work, options: Options) -> None:
    """In float64, on a batch small enough to be quick, the sides give the gradients that they
    should; lean_bf16 rounds in float32 only."""
    images, targets = _steps.batch(2, 64, options, torch.float64)
    images = images.contiguous(memory_format=work.setting.memory_format)
    in_float64 = Work(
        Setting(work.setting.model, "float32", work.setting.layout), work.sides, work.layer
    )
    results: dict[str, list[Tensor]] = {}
    for name, maker in makers(in_float64, options.device).items():
        model = _steps.network(work.setting.model).to(options.device, torch.float64)
        model = model.to(memory_format=work.setting.memory_format)  # type: ignore[call-overload]
        side = _steps.side(model, maker, images, targets)
        loss = side.forward()
        assert side.backward is not None
        results[name] = [loss.detach(), *side.backward(loss)]
        if side.close is not None:
            side.close()
    alone = {n: r for n, r in results.items() if n in (PLAIN, "fast_ce", "lean_ce")}
    require_agreement(alone, PLAIN, "float64")
    both = {n: r for n, r in results.items() if n not in alone}
    require_agreement(both, "eager" if "eager" in both else work.sides[0], "float64")
    flat = [torch.cat([g.flatten() for g in results[n][1:]]) for n in (work.sides[0], PLAIN)]
    if work.layer is None and relative_error(*flat) < 0.9:
        raise RuntimeError("the interpretable-gradient term does not dominate the gradients")


def _case(work: Work, options: Options) -> Case:
    setting = work.setting
    batch, size = (2, 64) if options.quick else work.size or BATCH[setting.model]

    def build() -> dict[str, Callable[[], Side]]:
        images, targets = _steps.batch(batch, size, options, torch.float32)
        images = images.contiguous(memory_format=setting.memory_format)

        def factory(maker: Maker) -> Side:
            model = _steps.network(setting.model).to(options.device)
            model = model.to(memory_format=setting.memory_format)  # type: ignore[call-overload]
            return _steps.side(model, maker, images, targets)

        sides = makers(work, options.device)
        return {name: lambda m=maker: factory(m) for name, maker in sides.items()}  # type: ignore[misc]

    facts: dict[str, Any] = {
        "model": setting.model,
        "precision": setting.precision,
        "layout": setting.layout,
        "layer": work.layer,
        "batch": batch,
        "image_size": size,
    }
    return Case(work.name, build, check=lambda: check(work, options), rounds=(5, 101), facts=facts)


def _cases(options: Options, precision: str) -> list[Case]:
    if options.dtype != "float32":
        raise ValueError("step_engine: precision belongs to the member, not to --dtype")
    works = WORKS + (GPU_WORKS if options.device == "cuda" else ())
    return [_case(work, options) for work in works if work.setting.precision == precision]


BENCHMARK = Benchmark(
    name="step_engine",
    about="ResNet training step in train mode through the second-order engine",
    cases=lambda options: _cases(options, "float32"),
    baseline=PLAIN,
    seconds=60.0,
    isolate=True,
    needs_torchvision=True,
    caveats=(
        "the optimiser's step is not included",
        "plain: cross-entropy alone, the model as it is (in-place ReLUs)",
        "eager: one forward; interpretable: both input gradients from its graph; cam: create_graph",
        "saved MiB: what autograd holds; the engine holds its buffers itself, see the peaks",
        "the sides' agreement is checked in float64 at 2 x 64 x 64, in the layout of the case",
    ),
)
# A file of its own: on a CPU without bfloat16 instructions it takes longer than all the others.
BFLOAT16 = replace(
    BENCHMARK,
    name="step_engine_bfloat16",
    cases=lambda options: _cases(options, "bfloat16 autocast"),
)
