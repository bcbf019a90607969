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
from camkernels.nn._functional_relus import lines_of_functional_relus
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
    try:
        return _rewrite(container, trace(container, training, shape))
    except RefusedError:
        raise
    except Exception as error:  # ours; the user's network runs all the same
        raise RefusedError(f"internal error of camkernels: {error!r}") from error


def _rewrite(container: nn.Module, traced: Traced) -> Variant:
    findings = analyse(traced)
    if not findings.worth_rewriting():
        return Variant(traced, findings, None, None, [])
    in_order, copies = _copy(traced.graph)
    for node in findings.functional_relus:
        _replace_relu(copies[node], output_is_kept(traced, node))
    for group in findings.groups:
        if group.links[-1] == "relu" and group.nodes[-1].op != "call_module":
            _replace_relu(copies[group.nodes[-1]], kept=False)
    fused, copies = _copy(traced.graph)
    for node in findings.functional_relus:
        _replace_relu(copies[node], output_is_kept(traced, node))
    spread = []
    for group in findings.groups:
        call = _fused_group(traced, group)
        if is_spread(group, traced.graph.nodes):
            spread.append(call)
        _replace_group(fused, copies, group, call)
    return Variant(
        traced, findings, _compiled(fused, container), _compiled(in_order, container), spread
    )


def _copy(graph: Graph) -> tuple[Graph, dict[Node, Node]]:
    """A copy, and each node's node in it."""
    result = Graph()
    copies: dict[Node, Node] = {}
    result.output(result.graph_copy(graph, copies))
    return result, copies


def _replace_relu(node: Node, kept: bool) -> None:
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
            parts["steps"].append(_fused.module_step(module))
        elif link == "add":
            first = node.args[0] is group.residual
            parts["steps"].append(_fused.sum_step(node.target, first))
        else:
            parts["steps"].append(_fused.relu_step(in_place(node)))
    relu = group.links[-1] == "relu" or "bn_relu" in group.links
    return _fused.FusedGroup(adds=group.residual is not None, relu=relu, **parts)


def _replace_group(
    graph: Graph, copies: dict[Node, Node], group: Group, call: _fused.FusedGroup
) -> None:
    nodes = [copies[node] for node in group.nodes]
    args: tuple[Any, ...] = (nodes[0].args[0],)
    if group.residual is not None:
        args += (copies[group.residual],)
    with graph.inserting_before(nodes[-1]):
        node = graph.call_function(call, args)
    nodes[-1].replace_all_uses_with(node)
    copies[group.nodes[-1]] = node
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
        self._variants: list[Variant] = []
        self._refused: list[tuple[CallShape, bool]] = []
        self._retraces = 0
        self.given_up: str | None = None

    def add(self, variant: Variant) -> None:
        self._variants.append(variant)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.container).forward(self.container, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch._C._get_tracing_state() is not None or torch.compiler.is_compiling():
            return self.original(*args, **kwargs)
        found = _shape_of(args, kwargs)
        if found is None:
            return self.original(*args, **kwargs)
        shape, tensors = found
        variant = self._variant(shape)
        if variant is None or variant.fused is None:
            return self.original(*args, **kwargs)
        return variant.run(tensors)

    def _variant(self, shape: CallShape) -> Variant | None:
        for variant in self._variants:
            if variant.traced.is_for(shape):
                if variant.traced.holds():
                    return variant
                self._variants.remove(variant)
                self._retraces += 1
                break
        if (shape, self.container.training) in self._refused:
            return None
        return self._retrace(shape)

    def _retrace(self, shape: CallShape) -> Variant | None:
        if self.given_up is not None:
            return None
        if len(self._variants) >= _MOST_VARIANTS or self._retraces > _MOST_RETRACES:
            self._give_up("what its forward reads or is given changes from call to call")
            return None
        try:
            variant = make_variant(self.container, self.container.training, shape)
        except RefusedError as refused:
            self.refuse(shape, self.container.training)
            self._retraces += 1
            self._warn(str(refused))
            return None
        self._variants.append(variant)
        return variant

    def refuse(self, shape: CallShape, training: bool) -> None:
        """Run the class's forward for such calls, without asking again."""
        self._refused.append((shape, training))

    def _give_up(self, reason: str) -> None:
        self.given_up = reason
        self._warn(reason)

    def _warn(self, reason: str) -> None:
        """Where it matters: a fused group that runs module by module gives the same numbers."""
        lines = lines_of_functional_relus(self.container)
        if lines:
            warnings.warn(
                f"camkernels: the rewritten forward of {type(self.container).__name__} does not "
                f"apply to this call ({reason}); its own runs, and its functional ReLUs are plain "
                f"under ck.guided(): {', '.join(lines)}",
                UserWarning,
                stacklevel=6,
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


def _shape_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[CallShape, list[Any]] | None:
    if len(args) == 1 and not kwargs and type(args[0]) is Tensor:
        return _ONE_TENSOR, list(args)
    try:
        return CallShape.of(args, kwargs)
    except RefusedError:
        return None


def refuse_replicas() -> nn.Module:
    """In the place of a rewritten container's ``_replicate_for_data_parallel``."""
    raise TypeError(
        "nn.DataParallel is not supported after ck.swap_in (its replicas would run the original's "
        "forward); use nn.parallel.DistributedDataParallel, or ck.swap_out(model) first"
    )


__all__ = ["RewrittenForward", "Variant", "default_shape", "make_variant", "refuse_replicas"]
