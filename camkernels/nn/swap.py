"""swap_in: our modules and fused forwards in a user's network, in place; swap_out: back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from camkernels.nn import _kinds, modules
from camkernels.nn._functional_relus import lines_of_functional_relus, mentions_relu
from camkernels.nn._rewritten import (
    RewrittenForward,
    Variant,
    default_shape,
    make_variant,
    refuse_replicas,
)
from camkernels.nn._watch import RefusedError
from camkernels.nn.report import SwapReport

_REPLICATE = "_replicate_for_data_parallel"
_PATCHED = "it is patched on the instance"


def swap_in(model: nn.Module, engine: bool = False, memory: str | int | None = None) -> nn.Module:
    """Make ``model`` cheap to differentiate twice, and guidable, in place.

    ReLU, Conv2d, BatchNorm2d, SyncBatchNorm, MaxPool2d and timm's BatchNormAct2d become those of
    ``camkernels.nn`` by a change of class, so parameters, buffers, hooks, state_dict keys and
    references from optimizers stay. Convolution, BatchNorm, sum and ReLU that follow each other in
    a container run as one, and functional ReLUs become guidable, where ``torch.fx`` can trace the
    container's forward; what cannot be traced keeps its own. Hooks on any module see what they saw:
    a group with a hook inside runs module by module. Outputs are the same numbers.

    Swap before wrapping in DistributedDataParallel or ``torch.compile``. May be called again, for
    modules that were added since.

    Args:
        model: any network.
        engine: run the network by the second-order engine: its convolutions, BatchNorms and ReLUs
            as scheduled passes, which keep less and recompute what is cheap. What the engine cannot
            plan raises. Every gradient of parameters leaves at the end of a stage's backward, so
            that DistributedDataParallel cannot overlap communication with it.
        memory: of the engine: ``"fast"`` (the default) keeps the outputs of convolutions and what
            the double backward needs; ``"lean"`` convolves once more per block and pass instead;
            ``"lean-bf16"`` also stores the second-order tensors in bfloat16, which rounds
            the regulariser's gradient.

    Returns:
        ``model``.

    Raises:
        TypeError: a wrapped model. ValueError: an unknown ``memory``; EngineError (a ValueError):
        a network that the engine cannot plan, by module; it is then left as it was.

    Warns:
        UserWarning: functional ReLUs in a forward that cannot be traced, with their lines; a
            network without any ReLU.

    Example:
        >>> import torch, camkernels as ck
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8),
        ...                           torch.nn.ReLU())
        >>> ck.swap_report(ck.swap_in(net)).fused
        {'': ['0 + 1 + 2']}
    """
    _refuse_wrapped(model)
    if memory is not None and not engine:
        raise ValueError("memory: belongs to the engine; pass engine=True")
    forward = None if not engine else _engine_forward(model, "fast" if memory is None else memory)
    swap_out(model)
    plan = _plan(model)
    for module, target in plan.classes:
        module.__dict__[_kinds.ORIGINAL] = type(module)
        module.__class__ = target
    for container, variants in plan.variants:
        if any(variant.fused is not None for variant in variants):
            _install(container, variants)
    for relu in plan.relus_kept():
        relu.save = "output"  # type: ignore[assignment]
    if forward is not None:
        model.__dict__["forward"] = forward
        model.__dict__[_REPLICATE] = refuse_replicas
    _warn_of(model, plan)
    return model


def _engine_forward(model: nn.Module, memory: str | int) -> Any:
    """Planned in both modes before anything is changed."""
    from camkernels import engine  # it stands above this room

    return engine.install(model, memory)


def swap_out(model: nn.Module) -> nn.Module:
    """Undo :func:`swap_in`: every module has its class and forward again.

    Returns:
        ``model``.

    Example:
        >>> import torch, camkernels as ck
        >>> net = ck.swap_in(torch.nn.Sequential(torch.nn.ReLU()))
        >>> type(ck.swap_out(net)[0]) is torch.nn.ReLU
        True
    """
    _check_module(model)
    for module in model.modules():
        installed = module.__dict__.get("forward")
        if isinstance(installed, RewrittenForward) or hasattr(installed, "is_engine"):
            del module.__dict__["forward"]
            module.__dict__.pop(_REPLICATE, None)
        original = module.__dict__.pop(_kinds.ORIGINAL, None)
        if original is not None and _kinds.is_ours(module):
            module.__dict__.pop("save", None)
            module.__class__ = original
    return model


def swap_report(model: nn.Module) -> SwapReport:
    """What :func:`swap_in` did to ``model``, or would do. Changes nothing.

    Example:
        >>> import torch, camkernels as ck
        >>> print(ck.swap_report(torch.nn.Sequential(torch.nn.ReLU(), torch.nn.GELU())))
        not swapped in; 1 modules, 0 fused groups, 0 functional ReLUs, 1 left alone
          0  swapped: ReLU
          1  left alone: GELU is not guided: only ReLU has a guided backward
    """
    _refuse_wrapped(model)
    return _plan(model).report


# --- the plan -------------------------------------------------------------------------------------


@dataclass
class _Plan:
    report: SwapReport
    classes: list[tuple[nn.Module, type[nn.Module]]] = field(default_factory=list)
    variants: list[tuple[nn.Module, list[Variant]]] = field(default_factory=list)
    kept: dict[nn.Module, bool] = field(default_factory=dict)
    relus: int = 0

    def relus_kept(self) -> Iterator[nn.Module]:
        for module, kept in self.kept.items():
            if kept and type(module) is modules.ReLU and _kinds.ORIGINAL in module.__dict__:
                yield module

    def site(self, relu: nn.Module, kept: bool) -> None:
        self.kept[relu] = kept and self.kept.get(relu, True)


def _plan(model: nn.Module) -> _Plan:
    """What is to be done, from the network as it is; it may be swapped already."""
    plan = _Plan(SwapReport())
    for name, module in _walk(model, plan.report):
        if _kinds.ORIGINAL in module.__dict__:
            plan.report.swapped_in = True
            plan.report.swapped[name] = type(module).__name__
        elif (target := _kinds.target_of(module)) is not None:
            plan.classes.append((module, target))
            plan.report.swapped[name] = target.__name__
        elif (reason := _kinds.left_alone_reason(module)) is not None:
            plan.report.left_alone[name] = reason
        kind = _kinds.kind_of(module)
        plan.relus += kind in ("relu", "bn_relu")
        plan.relus += isinstance(module, modules.BatchNormReLU2d)
        if kind is None and not _kinds.is_ours(module):
            _plan_container(plan, name, module)
    return plan


def _walk(model: nn.Module, report: SwapReport) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules, each once, without what is below opaque ones."""
    seen: set[int] = set()
    pending = [("", model)]
    while pending:
        name, module = pending.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        reason = _kinds.opaque_reason(module)
        if reason is not None:
            report.left_alone[name] = reason
            continue
        yield name, module
        prefix = f"{name}." if name else ""
        children = [(prefix + n, m) for n, m in module._modules.items() if m is not None]
        pending += reversed(children)


def _plan_container(plan: _Plan, name: str, container: nn.Module) -> None:
    if not _has_forward(container) or not _is_candidate(container):
        return
    installed = container.__dict__.get("forward")
    variants: list[Variant] = []
    reason = None
    if hasattr(installed, "is_engine"):
        plan.report.swapped_in = True
        plan.report.engine = True
    elif installed is not None and not isinstance(installed, RewrittenForward):
        reason = _PATCHED
    elif isinstance(installed, RewrittenForward):
        plan.report.swapped_in = True
        reason = installed.given_up
    if reason is None:
        variants, reason = _variants(container)
    if variants:
        plan.variants.append((container, variants))
        _record(plan, name, variants)
    if reason is not None:
        mode = "" if not variants else f" in {_other_mode(variants[0])}"
        _plan_refused(plan, name, container, f"{reason}{mode}")


def _has_forward(module: nn.Module) -> bool:
    """False for ModuleList and the like."""
    return type(module).forward is not nn.modules.module._forward_unimplemented


def _variants(container: nn.Module) -> tuple[list[Variant], str | None]:
    """One per mode, where it can be traced; else why not."""
    variants: list[Variant] = []
    reason = None
    for training in (container.training, not container.training):
        try:
            variants.append(make_variant(container, training, default_shape(container)))
        except RefusedError as refused:
            reason = reason or str(refused)
        if variants and variants[0].traced.training is None:
            break  # the same in both modes
    return variants, reason


def _other_mode(variant: Variant) -> str:
    return "evaluation" if variant.traced.training else "training"


def _is_candidate(container: nn.Module) -> bool:
    """Whether its forward may hold a group or a ReLU of its own."""
    pending = [container]
    while pending:
        for child in pending.pop()._modules.values():
            if child is None:
                continue
            if _kinds.kind_of(child) not in (None, "conv", "max_pool", "identity"):
                return True
            if isinstance(child, nn.Sequential) or not _has_forward(child):
                pending.append(child)
    return not type(container).__module__.startswith("torch.") and mentions_relu(container)


def _plan_refused(plan: _Plan, name: str, container: nn.Module, reason: str) -> None:
    plan.report.left_alone[name] = f"forward of {type(container).__name__}: {reason}"
    for child in container.modules():
        if isinstance(child, nn.ReLU):
            plan.site(child, False)
    lines = lines_of_functional_relus(container)
    if lines and reason != _PATCHED:
        plan.report.unguided_relus[name] = lines


def _record(plan: _Plan, name: str, variants: list[Variant]) -> None:
    findings = variants[0].findings
    if findings.groups:
        plan.report.fused[name] = [group.describe() for group in findings.groups]
    if findings.functional_relus:
        plan.report.functional_relus[name] = len(findings.functional_relus)
    in_groups = sum(
        link == "relu" and node.op != "call_module"
        for group in findings.groups
        for node, link in zip(group.nodes, group.links, strict=True)
    )
    plan.relus += in_groups + len(findings.functional_relus)
    for variant in variants:
        for relu, kept in variant.findings.relu_outputs_kept.items():
            plan.site(relu, kept)


# --- doing it -------------------------------------------------------------------------------------


def _install(container: nn.Module, variants: list[Variant]) -> None:
    forward = RewrittenForward(container)
    for variant in variants:
        forward.add(variant)
    modes = {variant.traced.training for variant in variants}
    if len(modes) == 1 and None not in modes:  # the other mode was refused, and that reported
        forward.refuse(default_shape(container), not variants[0].traced.training)
    container.__dict__["forward"] = forward
    container.__dict__[_REPLICATE] = refuse_replicas


def _check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def _refuse_wrapped(model: Any) -> None:
    _check_module(model)
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    for name, module in model.named_modules():
        kind = type(module).__name__
        compiled = isinstance(module, torch._dynamo.eval_frame.OptimizedModule)
        if isinstance(module, wrappers) or compiled or _kinds.is_sharded(module):
            kind = f"FSDP ({kind})" if _kinds.is_sharded(module) else kind
            where = f" (at {name!r})" if name else ""
            raise TypeError(
                f"model: already wrapped in {kind}{where}; call ck.swap_in on the plain model "
                "before wrapping it in DistributedDataParallel, FSDP or torch.compile"
            )


def _warn_of(model: nn.Module, plan: _Plan) -> None:
    for name, lines in plan.report.unguided_relus.items():
        module = model.get_submodule(name)
        warnings.warn(
            f"camkernels: {name or 'the network'} ({type(module).__name__}) has functional ReLUs, "
            f"which stay plain under ck.guided(): {', '.join(lines)}; "
            f"{plan.report.left_alone[name]}",
            UserWarning,
            stacklevel=3,
        )
    if plan.relus == 0 and not plan.report.unguided_relus:
        warnings.warn(
            f"camkernels: no ReLU found in {type(model).__name__}: its guided gradient equals the "
            "plain one",
            UserWarning,
            stacklevel=3,
        )
