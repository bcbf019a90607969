"""The whole network as one list of operations, in the order in which its forward runs them.

Each container's own forward is traced as ``swap_in`` traces it (``nn/_trace.py``: what it read is
recorded and can be asked again), and its children are put in the place of their calls. What the
engine has no operation for stays a call of the user's own code (kind ``"eager"``); the plan decides
whether such a call may stand where it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from camkernels.nn import modules
from camkernels.nn._groups import RELU_FUNCTIONS, RELU_METHODS, is_add, relu_is_in_place
from camkernels.nn._kinds import kind_of
from camkernels.nn._rewritten import RewrittenForward
from camkernels.nn._trace import IN_PLACE, CallShape, Traced, trace
from camkernels.nn._watch import RefusedError

_BATCH_NORMS = ("bn", "sync_bn", "bn_act", "bn_relu")
_IN_PLACE_METHODS = ("relu_", "add_")


@dataclass(eq=False)
class Op:
    """One operation; it also stands for the value it makes.

    Attributes:
        kind: ``"input"``, ``"conv"``, ``"bn"``, ``"relu"``, ``"add"``, ``"cat"``, ``"max_pool"``,
            ``"avg_pool"``, or ``"eager"``.
        name: where it stands in the network, ``"layer1.0.conv2"``.
        module: the module that it runs, if it is one.
        inputs: the values it reads.
        options: what else the operation needs.
        reason: of an eager one: why the engine has no operation for it.
    """

    kind: str
    name: str
    module: Any = None
    inputs: tuple[Op, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    overwritten: Op | None = None

    def __repr__(self) -> str:
        return f"<{self.kind} {self.name}>"


@dataclass(eq=False)
class Exit:
    """The moment at which a module that is not called itself has made its output."""

    module: nn.Module
    name: str
    position: int
    """How many operations had run."""
    inputs: Any
    output: Any


@dataclass
class Network:
    """A traced network."""

    inputs: list[Op]
    ops: list[Op]
    output: Any
    exits: list[Exit]
    traces: list[Traced]
    modules: list[tuple[nn.Module, bool]]
    """Every module that was looked at, with the mode it was in."""
    inside: set[Op] = field(default_factory=set)
    """What stages run; the plan fills it."""

    def called(self) -> set[nn.Module]:
        """Modules that are called themselves."""
        calls = (op for op in self.ops if op not in self.inside and "attribute" not in op.options)
        return {op.module for op in calls if op.module is not None}

    def holds(self) -> bool:
        """Whether nothing that was read has changed."""
        return all(m.training is mode for m, mode in self.modules) and all(
            traced.holds() for traced in self.traces
        )


def trace_network(model: nn.Module, shape: CallShape) -> Network:
    """Trace ``model`` in the modes its modules are in now.

    Raises:
        RefusedError: the forward of ``model`` itself cannot be traced.
    """
    return _Tracer().network(model, shape)


class _Tracer:
    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.exits: list[Exit] = []
        self.traces: list[Traced] = []
        self.modules: dict[nn.Module, bool] = {}

    def network(self, model: nn.Module, shape: CallShape) -> Network:
        leaves = [Op("input", f"input {i}") if c is None else c[1] for i, c in
                  enumerate(shape.constants)]  # fmt: skip
        inputs = [leaf for leaf in leaves if isinstance(leaf, Op)]
        args, kwargs = pytree.tree_unflatten(leaves, shape.structure)
        output = self.container(model, "", args, kwargs)
        return Network(
            inputs, self.ops, output, self.exits, self.traces, list(self.modules.items())
        )

    # -- containers ----------------------------------------------------------------------------

    def container(self, module: nn.Module, name: str, args: Any, kwargs: Any) -> Any:
        """Put the forward of ``module`` here; its value."""
        self._refuse_patched(module)
        leaves, structure = pytree.tree_flatten((args, kwargs))
        stand_ins = [torch.empty(0) if isinstance(leaf, Op) else leaf for leaf in leaves]
        shape = CallShape.of(*pytree.tree_unflatten(stand_ins, structure))[0]
        traced = trace(module, module.training, shape)
        lists: tuple[list[Any], ...] = (self.ops, self.exits, self.traces)
        mark = [len(kept) for kept in lists]
        self.traces.append(traced)
        self.modules[module] = module.training
        try:
            output = self._inline(traced, name, [leaf for leaf in leaves if isinstance(leaf, Op)])
        except RefusedError:
            for kept, length in zip(lists, mark, strict=True):
                del kept[length:]
            raise
        self.exits.append(Exit(module, name, len(self.ops), args, output))
        return output

    def _refuse_patched(self, module: nn.Module) -> None:
        installed = module.__dict__.get("forward")
        ours = isinstance(installed, RewrittenForward) or hasattr(installed, "is_engine")
        if installed is not None and not ours:
            raise RefusedError("its forward is patched on the instance")

    def _inline(self, traced: Traced, prefix: str, tensors: list[Op]) -> Any:
        values: dict[Node, Any] = {}
        pending = iter(tensors)

        def current(leaf: Any) -> Any:
            value = values[leaf] if isinstance(leaf, Node) else leaf
            return pytree.tree_map_only(Op, latest, value)

        for node in traced.graph.nodes:
            where = f"{prefix}.{node.name}" if prefix else node.name
            if node.op == "placeholder":
                values[node] = next(pending)
                continue
            args = map_aggregate(node.args, current)
            kwargs = map_aggregate(node.kwargs, current)
            if node.op == "output":
                return args[0]
            if node.op == "call_module":
                values[node] = self._module(traced, node, prefix, args, kwargs)
            elif node.op == "get_attr":
                values[node] = self._attribute(traced.container, str(node.target), where)
            else:
                values[node] = self._function(node, where, args, kwargs)
        raise AssertionError("a graph without output")

    # -- operations ----------------------------------------------------------------------------

    def _add(self, op: Op) -> Op:
        self.ops.append(op)
        return op

    def _module(self, traced: Traced, node: Node, prefix: str, args: Any, kwargs: Any) -> Any:
        module = traced.module(node)
        assert module is not None
        name = f"{prefix}.{node.target}" if prefix else str(node.target)
        self.modules[module] = module.training
        single = len(args) == 1 and isinstance(args[0], Op) and not kwargs
        found = _leaf(module) if single else None
        if found is not None:
            kind, options = found
            value = args[0]
            if kind != "identity":
                value = self._add(Op(kind, name, module, (args[0],), options))
                if getattr(module, "inplace", False):
                    args[0].overwritten = value
            self.exits.append(Exit(module, name, len(self.ops), args, value))
            return value
        reason = f"the engine has no operation for {type(module).__name__}"
        if _is_container(module):
            try:
                return self.container(module, name, args, kwargs)
            except RefusedError as refused:
                reason = str(refused)
        return self._eager(name, module, args, kwargs, lambda m: m, reason)

    def _attribute(self, container: nn.Module, target: str, where: str) -> Op:
        path, _, attribute = target.rpartition(".")

        def read(module: Any) -> Callable[[], Any]:
            holder = module.get_submodule(path) if path else module
            return lambda: getattr(holder, attribute)

        op = self._eager(where, container, (), {}, read, f"it reads {target}")
        op.options["attribute"] = True
        return op

    def _eager(
        self, name: str, module: Any, args: Any, kwargs: Any, call: Callable[..., Any], reason: str
    ) -> Op:
        inputs = tuple(v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Op))
        options = {"args": args, "kwargs": kwargs, "call": call}
        op = self._add(Op("eager", name, module, inputs, options, reason))
        if getattr(module, "inplace", False) and len(inputs) == 1:
            inputs[0].overwritten = op
        return op

    def _function(self, node: Node, where: str, args: Any, kwargs: Any) -> Any:
        ops = tuple(a for a in args if isinstance(a, Op))
        if len(ops) >= 1 and _is_relu(node):
            op = self._add(Op("relu", where, None, ops[:1]))
            if relu_is_in_place(node):
                ops[0].overwritten = op
            return op
        if is_add(node) and len(ops) == 2:
            op = self._add(Op("add", where, None, ops))
            if node.target in IN_PLACE.values() or node.target in _IN_PLACE_METHODS:
                ops[0].overwritten = op
            return op
        if node.op == "call_function":
            found = _pooling(node.target, args, kwargs) or _concatenation(node.target, args, kwargs)
            if found is not None:
                kind, inputs, options = found
                if kind == "cat" and len(inputs) == 1:
                    return inputs[0]
                return self._add(Op(kind, where, None, inputs, options))
        target: Any = node.target
        if node.op == "call_method":

            def method(self: Any, *rest: Any, **named: Any) -> Any:
                return getattr(self, target)(*rest, **named)

            call: Callable[..., Any] = method
        else:
            call = target
        reason = f"the engine has no operation for {getattr(target, '__name__', target)}"
        result = self._eager(where, None, args, kwargs, lambda _: call, reason)
        if _writes(node) and ops:
            ops[0].overwritten = result
        return result


def latest(op: Op) -> Op:
    """The value that the memory of ``op`` holds by now: in-place operations replace it."""
    while op.overwritten is not None:
        op = op.overwritten
    return op


def values_in(structure: Any) -> Iterator[Op]:
    """The values in nested lists, tuples and dicts."""
    return (leaf for leaf in pytree.tree_leaves(structure) if isinstance(leaf, Op))


def _is_relu(node: Node) -> bool:
    if node.op == "call_function":
        return node.target in RELU_FUNCTIONS
    return node.op == "call_method" and node.target in RELU_METHODS


def _writes(node: Node) -> bool:
    name = str(getattr(node.target, "__name__", node.target))
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or node.target in IN_PLACE.values() or bool(node.kwargs.get("inplace", False))


def _is_container(module: nn.Module) -> bool:
    kind: type[Any] = type(module)
    if kind.forward is nn.modules.module._forward_unimplemented:
        return False
    own = not kind.__module__.startswith(("torch.nn.modules", "camkernels.nn"))
    return own or isinstance(module, nn.Sequential)


def _leaf(module: Any) -> tuple[str, dict[str, Any]] | None:
    """Kind and options of a module that the engine runs itself."""
    kind = kind_of(module)
    if kind == "conv":
        padding = modules.symmetric_padding(module)
        return None if padding is None else ("conv", {"padding": padding})
    if kind in _BATCH_NORMS:
        return "bn", {"relu": kind == "bn_relu"}
    if type(module) is modules.BatchNormReLU2d:
        return "bn", {"relu": module.relu}
    if kind in ("relu", "identity"):
        return kind, {}
    if type(module) in (nn.MaxPool2d, modules.MaxPool2d) and not module.return_indices:
        return "max_pool", _max_pool(
            module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode
        )
    if type(module) is nn.AvgPool2d:
        return "avg_pool", _avg_pool(
            module.kernel_size, module.stride, module.padding, module.ceil_mode,
            module.count_include_pad, module.divisor_override,
        )  # fmt: skip
    return None


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[-1]))


def _max_pool(
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: Any = False,
) -> dict[str, Any]:
    size = _pair(kernel_size)
    own_stride = _pair(stride) if stride else size
    return {"arguments": (size, own_stride, _pair(padding), _pair(dilation), bool(ceil_mode))}


def _avg_pool(
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: Any = False,
    count_include_pad: Any = True,
    divisor_override: Any = None,
) -> dict[str, Any]:
    size = _pair(kernel_size)
    own_stride = _pair(stride) if stride else size
    flags = bool(ceil_mode), bool(count_include_pad)
    return {"arguments": (size, own_stride, _pair(padding), *flags, divisor_override)}


def _pooling(target: Any, args: Any, kwargs: Any) -> tuple[str, Any, dict[str, Any]] | None:
    """A functional pooling with plain arguments."""
    if not args or not isinstance(args[0], Op) or any(isinstance(a, Op) for a in args[1:]):
        return None
    named = {k: v for k, v in kwargs.items() if k != "return_indices" or v}
    try:
        if target in (F.max_pool2d, torch.max_pool2d):
            return "max_pool", (args[0],), _max_pool(*args[1:], **named)
        if target is F.avg_pool2d:
            return "avg_pool", (args[0],), _avg_pool(*args[1:], **named)
    except TypeError:  # return_indices, or arguments that are values of the forward
        return None
    return None


def _concatenation(target: Any, args: Any, kwargs: Any) -> tuple[str, Any, dict[str, Any]] | None:
    if target not in (torch.cat, torch.concat) or not args:
        return None
    parts, dim = args[0], kwargs.get("dim", args[1] if len(args) > 1 else 0)
    if dim not in (1, -3) or not parts or not all(isinstance(p, Op) for p in parts):
        return None
    return "cat", tuple(parts), {}
