"""What the engine will do with a network, and what memory a step will take: told without a GPU,
and without taking the memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from camkernels import modes
from camkernels.engine import choose
from camkernels.engine.conv_norm import Conv, Norm
from camkernels.engine.forward import EngineForward
from camkernels.engine.gradients import input_gradients
from camkernels.engine.ledger import Ledger
from camkernels.engine.plan import Call, Hooked, Program, Stage

Step = Callable[[nn.Module, Tensor], Tensor]
_DEVICES = ("cpu", "cuda")


@dataclass
class PlanReport:
    """See :func:`plan_report`; ``print`` it.

    Attributes:
        rows: per operation its name, what it is, what becomes of its output (``"kept"``,
            ``"convolved again"``, ``"made again"``, ``"passed on"``), and the bytes of that output.
        kept_bytes: what the forward leaves for the backward.
        predicted_peak: bytes above the level before a step with an input gradient and its double
            backward (the interpretable-gradient loss). plain_peak: of a cross-entropy step.
        parameter_bytes: of the parameters; their gradients, as large, are part of the peaks.
    """

    shape: tuple[int, ...]
    memory: str | int
    device: str
    rows: list[tuple[str, str, str, int]] = field(default_factory=list)
    kept_bytes: int = 0
    predicted_peak: int = 0
    plain_peak: int = 0
    parameter_bytes: int = 0

    def __str__(self) -> str:
        width = max((len(row[0]) for row in self.rows), default=0)
        wide = max((len(row[1]) for row in self.rows), default=0)
        lines = [
            f"{name:<{width}}  {kind:<{wide}}  {fate:<15}  {size / 2**20:9.2f} MiB"
            for name, kind, fate, size in self.rows
        ]
        return "\n".join(
            [
                f"plan for images {self.shape}, memory={self.memory!r}, {self.device}",
                *lines,
                f"kept by the forward: {self.kept_bytes / 2**20:.1f} MiB",
                f"peak of a step, interpretable gradients: {self.predicted_peak / 2**20:.1f} MiB; "
                f"cross-entropy: {self.plain_peak / 2**20:.1f} MiB "
                f"(parameters, {self.parameter_bytes / 2**20:.1f} MiB, not counted; their "
                "gradients are)",
            ]
        )


def plan_report(
    model: nn.Module,
    shape: tuple[int, int, int, int],
    memory: str | int = "fast",
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
) -> PlanReport:
    """What ``ck.swap_in(model, engine=True, memory=memory)`` keeps, recomputes and needs.

    The step is run on the meta device: nothing of that size is allocated, no GPU is needed, and
    ``model`` is not changed. Where a library takes memory inside a call, that is entered by rule:
    the blocked copies of oneDNN on the CPU; nothing for cuDNN's workspaces.

    Args:
        model: a network in the mode it will be trained in; swapped in or not.
        shape: of the images, (B, C, H, W).
        memory: as for :func:`swap_in`.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: of autocast, ``torch.bfloat16`` or ``torch.float16``; None: without.
        channels_last: the memory format of model and images.

    Returns:
        a :class:`PlanReport`; sizes in bytes.

    Raises:
        ValueError: an unknown ``memory`` or device. EngineError: a network that cannot be planned.
        BudgetError: no plan fits into ``memory`` bytes.

    Example:
        >>> import torch, camkernels as ck
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8),
        ...                           torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...                           torch.nn.Flatten(), torch.nn.Linear(8, 5))
        >>> ck.plan_report(net, (4, 3, 32, 32)).rows[0][:3]
        ('0', 'conv', 'kept')
    """
    if device not in _DEVICES:
        raise ValueError(f"device: expected one of {', '.join(_DEVICES)}, got {device!r}")
    if len(shape) != 4 or min(shape) < 1:
        raise ValueError(f"shape: expected (B, C, H, W), got {shape!r}")
    from camkernels.nn.swap import swap_in  # which stands below, and calls the engine

    copied = swap_in(_on_meta(model, channels_last), engine=True, memory=memory)
    report = PlanReport(tuple(shape), memory, device)
    report.parameter_bytes = sum(p.numel() * p.itemsize for p in copied.parameters())
    images = _images(shape, channels_last, model)
    plain = _step_of(copied, images, dtype)
    report.plain_peak = predict_peak(plain, device)
    program = _program(copied, images)
    _fill(report, program, images.itemsize if dtype is None else dtype.itemsize)
    report.predicted_peak = predict_peak(_step_of(copied, images, dtype, "input gradient"), device)
    return report


def predict_peak(step: Callable[[], Any], device: str = "cpu") -> int:
    """Bytes above the start at the highest moment of ``step``, which runs on the meta device; the
    second run counts, as in a loop of training."""
    step()
    ledger = Ledger(device)
    with ledger.running():
        step()
    return ledger.peak


def _on_meta(model: nn.Module, channels_last: bool) -> nn.Module:
    # through a memo that stands meta tensors in for the parameters: no copy of them is made
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        meta = torch.empty_like(tensor, device="meta")
        if isinstance(tensor, nn.Parameter):
            meta = nn.Parameter(meta, tensor.requires_grad)
        memo[id(tensor)] = meta
    copied = copy.deepcopy(model, memo)
    if channels_last:
        copied = copied.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return copied


def _images(shape: tuple[int, ...], channels_last: bool, model: nn.Module) -> Tensor:
    first = next(model.parameters(), None)
    dtype = torch.float32 if first is None else first.dtype
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, device="meta", dtype=dtype, memory_format=layout)


def _step_of(
    model: nn.Module, images: Tensor, dtype: torch.dtype | None, loss: str = "cross-entropy"
) -> Callable[[], None]:
    """A step on the meta device; gradients are dropped at its end."""

    def precision() -> Any:
        return nullcontext() if dtype is None else torch.autocast("cpu", dtype)

    def run() -> None:
        targets = torch.zeros(images.shape[0], dtype=torch.long, device="meta")
        leaf = images.detach().requires_grad_(loss != "cross-entropy")
        modes.mark_unread(leaf)
        with precision():
            logits = model(leaf)
            total = nn.functional.cross_entropy(logits, targets)
        if loss != "cross-entropy":
            delta, guided = input_gradients(total, logits, leaf)
            total = total + (delta * guided).sum()
        total.backward()
        for p in model.parameters():
            p.grad = None

    return run


def _program(model: nn.Module, images: Tensor) -> Program:
    forward: EngineForward = model.__dict__["forward"]
    return forward.program_of(images)


def _fill(report: PlanReport, program: Program, itemsize: int) -> None:
    for step in program.steps:
        if isinstance(step, Stage):
            _fill_stage(report, step, itemsize)
        elif isinstance(step, Call):
            kind = type(step.op.module).__name__ if step.op.module is not None else "function"
            report.rows.append((step.op.name, kind, "called", 0))
        elif isinstance(step, Hooked):
            report.rows.append((step.exit.name, "forward hooks", "called", 0))


def _fill_stage(report: PlanReport, stage: Stage, itemsize: int) -> None:
    sizes = choose.sizes_of(stage, stage.shapes, itemsize, report.device)
    read = {v for u in stage.units for v in (*u.reads, *u.reads_for_weights)}
    for unit in stage.units:
        value = unit.output
        if value in stage.kept:
            fate = "kept"
            report.kept_bytes += sizes.of[value]
        elif value in stage.dropped:
            fate = "convolved again"
        else:
            fate = "made again" if value in read else "passed on"
        report.rows.append((unit.name, _kind(unit), fate, sizes.of[value]))


def _kind(unit: Any) -> str:
    if isinstance(unit, Conv):
        return "conv"
    if isinstance(unit, Norm):
        parts = ["bn", *(["add"] if unit.residual else []), *(["relu"] if unit.relu else [])]
        return "+".join(parts)
    return type(unit).__name__.lower()
