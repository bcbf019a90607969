"""Finds what a container's graph lets run as one: convolution, BatchNorm, sum, ReLU."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from camkernels.nn._kinds import kind_of
from camkernels.nn._trace import IN_PLACE, Traced

RELU_FUNCTIONS = (F.relu, torch.relu, F.relu_, torch.relu_)
RELU_METHODS = ("relu", "relu_")
_ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add, IN_PLACE["iadd"])
_ADD_METHODS = ("add", "add_", "__add__", "__iadd__")
# What keeps its input for its own backward (max-pooling: where it is left PyTorch's).
_KEEPERS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.Linear, nn.MaxPool2d,
)  # fmt: skip
# Their outputs are new memory and their inputs are left alone.
_FRESH_KINDS = {"conv", "bn", "sync_bn", "max_pool"}


@dataclass
class Group:
    """Nodes that run as one, in their order; ``links`` says what each is."""

    nodes: list[Node]
    links: list[str]
    residual: Node | None = None

    @property
    def input(self) -> Node:
        return self.nodes[0].args[0]  # type: ignore[return-value]

    def modules(self) -> list[str]:
        return [str(node.target) for node in self.nodes if node.op == "call_module"]

    def describe(self) -> str:
        """``conv1 + bn1 + relu``."""
        names = {"add": "add", "relu": "relu()"}
        parts = [
            str(n.target) if n.op == "call_module" else names[k]
            for n, k in zip(self.nodes, self.links, strict=True)
            if k != "identity"
        ]
        return " + ".join(parts)


@dataclass
class Findings:
    """What there is to rewrite in one graph."""

    groups: list[Group] = field(default_factory=list)
    functional_relus: list[Node] = field(default_factory=list)
    relu_outputs_kept: dict[nn.Module, bool] = field(default_factory=dict)
    """Per ReLU module that is called outside groups: whether every consumer keeps its input."""

    def worth_rewriting(self) -> bool:
        return bool(self.groups or self.functional_relus)


def analyse(traced: Traced) -> Findings:
    """Groups, functional ReLUs and consumers of ReLUs in a graph."""
    kinds = {node: _kind(traced, node) for node in traced.graph.nodes}
    calls: dict[nn.Module | None, int] = {}
    for node in kinds:
        module = traced.module(node)
        calls[module] = calls.get(module, 0) + 1
    found = Findings()
    order = {node: position for position, node in enumerate(traced.graph.nodes)}
    roots = _alias_roots(traced, kinds)
    for node, kind in kinds.items():
        # The order in which one module updates its running statistics twice is kept.
        if kind in ("bn", "sync_bn", "bn_act", "bn_relu") and calls[traced.module(node)] == 1:
            group = _grow(node, kinds)
            if group is not None and _undisturbed(traced, group, kinds, order, roots):
                found.groups.append(group)
    grouped = {node for group in found.groups for node in group.nodes}
    for node, kind in kinds.items():
        if node in grouped or kind != "relu":
            continue
        module = traced.module(node)
        if module is None:
            found.functional_relus.append(node)
        else:
            kept = output_is_kept(traced, node)
            found.relu_outputs_kept[module] = kept and found.relu_outputs_kept.get(module, True)
    return found


def output_is_kept(traced: Traced, node: Node) -> bool:
    """Whether some consumer of ``node`` keeps it for its own backward anyway."""
    for user in node.users:
        module = traced.module(user)
        if isinstance(module, _KEEPERS) and kind_of(module) != "max_pool":
            weight = getattr(module, "weight", None)
            if weight is None or weight.requires_grad:
                return True
    return False


# --- kinds of nodes -------------------------------------------------------------------------------


def _kind(traced: Traced, node: Node) -> str:
    module = traced.module(node)
    if module is not None:
        plain_call = len(node.args) == 1 and isinstance(node.args[0], Node) and not node.kwargs
        return kind_of(module) or "" if plain_call else ""
    if _is_relu(node):
        return "relu"
    return "add" if is_add(node) else ""


def _is_relu(node: Node) -> bool:
    if node.op == "call_function" and node.target in RELU_FUNCTIONS:
        return bool(node.args) and isinstance(node.args[0], Node)
    return node.op == "call_method" and node.target in RELU_METHODS


def is_add(node: Node) -> bool:
    if node.op == "call_function":
        if node.target not in _ADD_FUNCTIONS:
            return False
    elif node.op != "call_method" or node.target not in _ADD_METHODS:
        return False
    alpha = node.kwargs.get("alpha", 1)
    two = len(node.args) == 2 and all(isinstance(a, Node) for a in node.args)
    return two and alpha in (1, 1.0) and not set(node.kwargs) - {"alpha"}


def relu_is_in_place(node: Node) -> bool:
    """Whether a functional ReLU writes into its input."""
    if node.target in (F.relu_, torch.relu_, "relu_"):
        return True
    return bool(node.kwargs.get("inplace", node.args[1] if len(node.args) > 1 else False))


def _only_user(node: Node) -> Node | None:
    users = list(node.users)
    if len(users) != 1:
        return None
    uses = sum(argument is node for argument in users[0].all_input_nodes)
    return users[0] if uses == 1 else None


# --- groups ---------------------------------------------------------------------------------------


def _grow(bn: Node, kinds: dict[Node, str]) -> Group | None:
    """The longest chain around a BatchNorm, each link with one user; None for it alone."""
    group = Group([bn], [kinds[bn]])
    source = bn.args[0]
    if isinstance(source, Node) and kinds[source] == "conv" and _only_user(source) is bn:
        group.nodes.insert(0, source)
        group.links.insert(0, "conv")
    if kinds[bn] != "bn_relu":
        _extend(group, kinds)
    while group.links[-1] == "identity":
        group.nodes.pop()
        group.links.pop()
    return group if len(group.nodes) > 1 else None


def _extend(group: Group, kinds: dict[Node, str]) -> None:
    """Sum and ReLU behind the BatchNorm, with identities in between."""
    while (user := _only_user(group.nodes[-1])) is not None:
        kind = kinds[user]
        if kind == "add" and group.residual is None:
            other = _residual(user, group.nodes[-1])
            if other is None:
                return
            group.residual = other
        elif kind not in ("identity", "relu"):
            return
        group.nodes.append(user)
        group.links.append(kind)
        if kind == "relu":
            return


def _residual(add: Node, mine: Node) -> Node | None:
    """The other operand, unless the sum is written into it."""
    first, second = add.args
    if first is second:
        return None
    in_place = add.target in (operator.iadd, IN_PLACE["iadd"], "add_", "__iadd__")
    if in_place and first is not mine:
        return None
    return second if first is mine else first  # type: ignore[return-value]


def _undisturbed(
    traced: Traced,
    group: Group,
    kinds: dict[Node, str],
    order: dict[Node, int],
    roots: dict[Node, frozenset[Node]],
) -> bool:
    """Whether the group may run at the place of its last node: until then nobody writes into what
    its first reads, nor, from the sum on, into the residual."""
    last = order[group.nodes[-1]]
    windows = [(group.input, order[group.nodes[0]])]
    if group.residual is not None:
        windows.append((group.residual, order[group.nodes[group.links.index("add")]]))
    for node, position in order.items():
        if position > last or node in group.nodes or not _may_write(traced, node, kinds):
            continue
        written = frozenset().union(*(roots[a] for a in node.all_input_nodes), frozenset())
        for source, since in windows:
            if position > since and written & roots[source]:
                return False
        if any(root.op == "get_attr" for root in written):
            return False  # a forward that writes into parameters
    return True


def is_spread(group: Group, order: Iterable[Node]) -> bool:
    """Whether other nodes that call modules stand between those of the group."""
    nodes = list(order)
    start, stop = nodes.index(group.nodes[0]), nodes.index(group.nodes[-1])
    return any(n.op == "call_module" and n not in group.nodes for n in nodes[start:stop])


# --- who shares memory with whom, and who writes --------------------------------------------------


def _alias_roots(traced: Traced, kinds: dict[Node, str]) -> dict[Node, frozenset[Node]]:
    """For each node the nodes whose memory it may share: more than in truth, never fewer."""
    roots: dict[Node, frozenset[Node]] = {}
    inputs = frozenset(n for n in traced.graph.nodes if n.op == "placeholder")
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            roots[node] = inputs
        elif node.op == "get_attr" or _is_fresh(traced, node, kinds):
            roots[node] = frozenset((node,))
        else:
            shared = (roots[a] for a in node.all_input_nodes)
            roots[node] = frozenset((node,)).union(*shared)
    return roots


def _is_fresh(traced: Traced, node: Node, kinds: dict[Node, str]) -> bool:
    module = traced.module(node)
    if module is not None:
        if kinds[node] in _FRESH_KINDS:
            return True
        return isinstance(module, (nn.ReLU, *_KEEPERS)) and not getattr(module, "inplace", False)
    if kinds[node] == "add":
        in_place = (operator.iadd, IN_PLACE["iadd"], "add_", "__iadd__")
        return node.target not in in_place
    return node.op == "call_function" and node.target is torch.cat


def _may_write(traced: Traced, node: Node, kinds: dict[Node, str]) -> bool:
    """Whether a node may write into its inputs; unknown modules may."""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    module = traced.module(node)
    if module is not None:
        return kinds[node] not in _FRESH_KINDS and _module_may_write(module)
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not (name.startswith("__") and not name.startswith("__i"))
    if node.target in (operator.setitem, *IN_PLACE.values()) or "out" in node.kwargs:
        return True
    name = str(getattr(node.target, "__name__", ""))
    return (
        (name.endswith("_") and not name.endswith("__"))
        or bool(node.kwargs.get("inplace", False))
        or any(a is True for a in node.args[1:])  # F.dropout(x, p, training, True)
        or not _is_torch(node.target)
    )


def _is_torch(function: Any) -> bool:
    module = getattr(function, "__module__", None) or "torch"
    return module.partition(".")[0] in ("torch", "_operator", "operator", "math", "builtins")


def _module_may_write(module: nn.Module) -> bool:
    """PyTorch's own write only where they say ``inplace``; a custom forward may do anything."""
    for part in module.modules():
        if getattr(part, "inplace", False):
            return True
        if kind_of(part) is None and not type(part).__module__.startswith("torch.nn."):
            return True
    return False
