"""The graph of one container's own forward: children are single nodes."""

from __future__ import annotations

import inspect
import math
import operator
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node, Proxy, Tracer
from torch.fx.proxy import Attribute
from torch.utils import _pytree as pytree

from camkernels.nn._watch import Read, RefusedError, Watch

_SIMPLE_ARGUMENTS = (type(None), bool, int, float, str)
_IN_PLACE = (
    "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior",
    "ixor", "ilshift", "irshift",
)  # fmt: skip


def _in_place(name: str) -> Callable[[Any, Any], Any]:
    """``a op= b`` as a function, where torch.fx would record the operator out of place."""
    function = getattr(operator, name)

    def apply(a: Any, b: Any) -> Any:
        return function(a, b)

    apply.__name__ = f"in_place_{name}"
    return apply


IN_PLACE: dict[str, Callable[[Any, Any], Any]] = {name: _in_place(name) for name in _IN_PLACE}


class _Answering:
    """Makes ``isinstance(proxy, T)`` in a user's forward answer by the traced argument's type."""

    known: type | None
    tracer: Any

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        if sys._getframe(1).f_code not in self.tracer.watch.frames:
            return type(self)
        if self.known is None:
            raise RefusedError("forward asks for the type of an intermediate value")
        return self.known


class _Attribute(_Answering, Attribute):
    known = None


class _Value(_Answering, Proxy):
    def __init__(self, node: Node, tracer: Any, known: type | None = None) -> None:
        super().__init__(node, tracer)
        self.known = known

    def __getattr__(self, name: str) -> Attribute:
        return _Attribute(self, name)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


def _add_in_place_methods() -> None:
    for name, function in IN_PLACE.items():

        def method(self: Proxy, other: Any, function: Any = function) -> Proxy:
            return self.tracer.create_proxy("call_function", function, (self, other), {})

        for cls in (_Value, _Attribute):
            setattr(cls, f"__{name}__", method)


_add_in_place_methods()


@dataclass(frozen=True)
class CallShape:
    """The structure of a call: which arguments are tensors, and the values of all others."""

    structure: Any
    constants: tuple[Any, ...]
    """Per leaf: a type and value, or None where the leaf is a tensor."""

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[CallShape, list[Any]]:
        """The shape of a call and its tensors.

        Raises:
            RefusedError: an argument of another type.
        """
        leaves, structure = pytree.tree_flatten((args, kwargs))
        constants: list[Any] = []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                constants.append(None)
            elif type(leaf) in _SIMPLE_ARGUMENTS:
                constants.append((type(leaf), leaf))
            else:
                raise RefusedError(f"an argument of type {type(leaf).__name__}")
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        return cls(structure, tuple(constants)), tensors


class _ContainerTracer(Tracer):
    proxy_buffer_attributes = True

    def __init__(self, shape: CallShape, watch: Watch) -> None:
        super().__init__(autowrap_modules=(math,))
        self.shape, self.watch = shape, watch

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: Node) -> Proxy:
        return _Value(node, self, Tensor if node.op == "placeholder" else None)

    def create_arg(self, a: Any) -> Any:
        return a.node if isinstance(a, Proxy) else super().create_arg(a)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        leaves: list[Any] = []
        proxies: list[Any] = []
        for index, constant in enumerate(self.shape.constants):
            if constant is None:
                proxies.append(self.create_proxy("placeholder", f"input_{index}", (), {}))
            leaves.append(proxies[-1] if constant is None else constant[1])
        args, kwargs = pytree.tree_unflatten(leaves, self.shape.structure)

        def call(*_: Any) -> Any:
            with self.watch.watching(self.root):
                return root_fn(self.root, *args, **kwargs)

        return call, proxies


@dataclass
class Traced:
    """A graph, and what must hold for it to be the forward."""

    container: nn.Module
    function: types.FunctionType
    training: bool | None
    """The mode it was traced in; None where the forward does not ask for it."""
    shape: CallShape
    graph: Graph
    reads: list[Read]
    children: list[tuple[nn.Module, list[tuple[str, nn.Module | None]]]]

    def is_for(self, shape: CallShape) -> bool:
        """Whether it was traced for such a call, in the container's present mode."""
        return self.shape == shape and self.training in (None, self.container.training)

    def holds(self) -> bool:
        """Whether nothing that the traced forward read has changed."""
        if type(self.container).forward is not self.function:
            return False
        for holder, items in self.children:
            if list(holder._modules.items()) != items:
                return False
        return all(read.holds() for read in self.reads)

    def module(self, node: Node) -> nn.Module | None:
        """The module that ``node`` calls."""
        if node.op != "call_module":
            return None
        return self.container.get_submodule(str(node.target))


def default_shape(container: nn.Module) -> CallShape:
    """The likely call: a tensor for each argument without a default."""
    args: list[Tensor] = []
    kwargs: dict[str, Tensor] = {}
    parameters = list(inspect.signature(type(container).forward).parameters.values())
    for parameter in parameters[1:]:
        if parameter.default is not parameter.empty:
            continue
        if parameter.kind is parameter.KEYWORD_ONLY:
            kwargs[parameter.name] = torch.empty(0)
        elif parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            args.append(torch.empty(0))
    return CallShape.of(tuple(args), kwargs)[0]


def trace(container: nn.Module, training: bool, shape: CallShape) -> Traced:
    """The graph of ``container``'s forward in the given mode.

    Raises:
        RefusedError: torch.fx cannot trace it, or its graph would not be the whole of it.
    """
    function = type(container).forward
    if not isinstance(function, types.FunctionType):
        raise RefusedError("forward is no plain function")
    watch = Watch()
    tracer = _ContainerTracer(shape, watch)
    mode, attributes = container.training, set(container.__dict__)
    container.training = training
    try:
        graph = tracer.trace(container)
    except RefusedError:
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise RefusedError(f"torch.fx cannot trace it: {reason}") from None
    finally:
        container.training = mode
        constants = set(container.__dict__) - attributes
        for name in constants:
            del container.__dict__[name]
    if constants:
        raise RefusedError("forward makes a tensor that does not depend on its input")
    asks_mode = watch.reads.pop((id(container), "training"), None) is not None
    traced = Traced(
        container, function, training if asks_mode else None, shape, graph,
        list(watch.reads.values()), [],
    )  # fmt: skip
    traced.children = _children(traced)
    return traced


def _children(traced: Traced) -> list[tuple[nn.Module, list[tuple[str, nn.Module | None]]]]:
    """Holders of modules whose contents the forward may have walked, and those contents."""
    container = traced.container
    holders = {id(container): container}
    pending = [container]
    while pending:
        for child in pending.pop()._modules.values():
            if isinstance(child, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
                if id(child) not in holders:
                    pending.append(child)
                holders[id(child)] = child
    for node in traced.graph.nodes:
        if node.op == "call_module":
            holder = container.get_submodule(str(node.target).rpartition(".")[0])
            holders[id(holder)] = holder
    return [(holder, list(holder._modules.items())) for holder in holders.values()]
