"""A container's forward, rewritten: installed as the instance's ``forward``."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from camkernels.nn import _fused
from camkernels.nn._groups import Findings, Group, analyse, is_spread, output_is_kept
from camkernels.nn._groups import relu_is_in_place as in_place
from camkernels.nn._trace import CallShape, Traced, default_shape, trace
from camkernels.nn._watch import RefusedError

# A forward that never looks the same twice is not retraced for ever.
_MOST_VARIANTS = 16
_MOST_RETRACES = 32


@dataclass
class Variant:
    """A traced forward and the functions that stand in its place."""

    traced: Traced
    findings: Findings
    fused: Callable[..., Any] | None
    """None where there is nothing to rewrite."""
    in_order: Callable[..., Any] | None
    """Only its functional ReLUs rewritten: every module runs where the forward had it."""
    spread: list[_fused.FusedGroup]
    """Groups that other modules run in between of."""

    def run(self, tensors: list[Any]) -> Any:
        assert self.fused is not None
        if self.spread and not all(group.runs_only_forwards() for group in self.spread):
            assert self.in_order is not None
            return self.in_order(self.traced.container, *tensors)
        return self.fused(self.traced.container, *tensors)


def make_variant(container: nn.Module, training: bool, shape: CallShape) -> Variant:
    """Trace and rewrite.

    Raises:
        RefusedError: the forward cannot be traced, or not safely.
    """
    traced = trace(container, training, shape)
    findings = analyse(traced)
    if not findings.worth_rewriting():
        return Variant(traced, findings, None, None, [])
    relus = {node.name: output_is_kept(traced, node) for node in findings.functional_relus}
    in_order = _copy(traced.graph)
    for name, kept in relus.items():
        _replace_relu(in_order, name, kept)
    for group in findings.groups:  # their functional ReLUs
        for node, link in zip(group.nodes, group.links, strict=True):
            if link == "relu" and node.op != "call_module":
                _replace_relu(in_order, node.name, False)
    fused = _copy(traced.graph)
    spread = []
    for name, kept in relus.items():
        _replace_relu(fused, name, kept)
    for group in findings.groups:
        call = _fused_group(traced, group)
        if is_spread(group, traced.graph.nodes):
            spread.append(call)
        _replace_group(fused, group, call)
    return Variant(
        traced, findings, _compiled(fused, container), _compiled(in_order, container), spread
    )


def _copy(graph: Graph) -> Graph:
    result = Graph()
    result.output(result.graph_copy(graph, {}))
    return result


def _named(graph: Graph, name: str) -> Node:
    return next(node for node in graph.nodes if node.name == name)


def _replace_relu(graph: Graph, name: str, kept: bool) -> None:
    node = _named(graph, name)
    inplace = in_place(node)
    node.op, node.target = "call_function", _fused.relu
    node.args, node.kwargs = (node.args[0], inplace, "output" if kept else "mask"), {}


def _fused_group(traced: Traced, group: Group) -> _fused.FusedGroup:
    parts: dict[str, Any] = {"conv": None, "others": [], "steps": []}
    for node, link in zip(group.nodes, group.links, strict=True):
        module = traced.module(node)
        if link == "conv":
            parts["conv"] = module
        elif link in ("bn", "sync_bn", "bn_act", "bn_relu"):
            parts["bn"] = module
        elif module is not None:
            parts["others"].append(module)
        if module is not None:
            parts["steps"].append(lambda x, _, module=module: module(x))
        elif link == "add":
            first = node.args[0] is group.residual
            parts["steps"].append(_fused.sum_step(node.target, first))
        else:
            parts["steps"].append(lambda x, _, inplace=in_place(node): _fused.relu(x, inplace))
    relu = group.links[-1] == "relu" or "bn_relu" in group.links
    return _fused.FusedGroup(adds=group.residual is not None, relu=relu, **parts)


def _replace_group(graph: Graph, group: Group, call: _fused.FusedGroup) -> None:
    nodes = [_named(graph, node.name) for node in group.nodes]
    source, last = nodes[0].args[0], nodes[-1]
    args: tuple[Any, ...] = (source,)
    if group.residual is not None:
        args += (_named(graph, group.residual.name),)
    with graph.inserting_before(last):
        node = graph.call_function(call, args)
    last.replace_all_uses_with(node)
    for old in reversed(nodes):
        graph.erase_node(old)


def _compiled(graph: Graph, container: nn.Module) -> Callable[..., Any]:
    graph.lint()
    code = graph.python_code(root_module="self")
    names = dict(code.globals)
    label = f"<forward of {type(container).__name__}, rewritten by camkernels>"
    exec(compile(code.src, label, "exec"), names)
    function: Callable[..., Any] = names["forward"]
    return function


class RewrittenForward:
    """Callable that runs a container's forward with its groups fused.

    It runs the graph that was traced for a call of this structure and mode while all that the
    forward read is as it was; retraces where it changed; and else runs the class's own forward.
    """

    def __init__(self, container: nn.Module) -> None:
        self.container = container
        self._forget()

    def _forget(self) -> None:
        self._variants: dict[bool, list[Variant | tuple[CallShape, str]]] = {True: [], False: []}
        self._retraces = 0
        self.given_up: str | None = None

    def add(self, variant: Variant) -> None:
        self._variants[variant.traced.training].append(variant)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.container).forward(self.container, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.jit.is_tracing() or torch.compiler.is_compiling() or self.given_up is not None:
            return self.original(*args, **kwargs)
        if len(args) == 1 and not kwargs and type(args[0]) is Tensor:
            shape, tensors = _ONE_TENSOR, list(args)
        else:
            try:
                shape, tensors = CallShape.of(args, kwargs)
            except RefusedError:
                return self.original(*args, **kwargs)
        variant = self._variant(shape)
        if variant is None or variant.fused is None:
            return self.original(*args, **kwargs)
        return variant.run(tensors)

    def _variant(self, shape: CallShape) -> Variant | None:
        variants = self._variants[self.container.training]
        for index, variant in enumerate(variants):
            if isinstance(variant, tuple):
                if variant[0] == shape:
                    return None
            elif variant.traced.shape == shape:
                if variant.traced.holds():
                    return variant
                del variants[index]
                self._retraces += 1
                break
        return self._retrace(shape, variants)

    def _retrace(self, shape: CallShape, variants: list[Any]) -> Variant | None:
        if len(variants) >= _MOST_VARIANTS or self._retraces > _MOST_RETRACES:
            self._give_up("its forward reads what changes from call to call")
            return None
        try:
            variant = make_variant(self.container, self.container.training, shape)
        except RefusedError as refused:
            variants.append((shape, str(refused)))
            self._warn(str(refused))
            return None
        variants.append(variant)
        return variant

    def _give_up(self, reason: str) -> None:
        self.given_up = reason
        self._warn(reason)

    def _warn(self, reason: str) -> None:
        warnings.warn(
            f"camkernels: the rewritten forward of {type(self.container).__name__} no longer "
            f"applies ({reason}); its own runs, where functional ReLUs are plain under ck.guided()",
            UserWarning,
            stacklevel=5,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> RewrittenForward:
        result = RewrittenForward.__new__(RewrittenForward)
        memo[id(self)] = result
        result.container = copy.deepcopy(self.container, memo)
        result._forget()
        return result

    def __getstate__(self) -> dict[str, Any]:
        return {"container": self.container}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.container = state["container"]
        self._forget()

    def __repr__(self) -> str:
        return f"<forward of {type(self.container).__name__}, rewritten by camkernels>"


_ONE_TENSOR = CallShape.of((torch.empty(0),), {})[0]


def refuse_replicas() -> nn.Module:
    """In the place of a rewritten container's ``_replicate_for_data_parallel``."""
    raise TypeError(
        "nn.DataParallel is not supported after ck.swap_in (its replicas would run the original's "
        "forward); use nn.parallel.DistributedDataParallel, or ck.swap_out(model) first"
    )


__all__ = ["RewrittenForward", "Variant", "default_shape", "make_variant", "refuse_replicas"]
