"""What autograd's graph between an image and the logits is made of."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

# Nodes that are a ReLU where the named attribute, the lower bound, is zero.
_LOWER_BOUND = {
    "HardtanhBackward0": "_saved_min_val",
    "ThresholdBackward0": "_saved_threshold",
    "ClampBackward1": "_saved_min",
    "ClampMinBackward0": "_saved_min",
}
# Nodes that cannot be differentiated twice, and what to do about them. A compiled region raises at
# the last backward, or drops its second order without a word where its weights are frozen.
_FIRST_ORDER_ONLY = {
    "CompiledFunctionBackward": "torch.compile cannot differentiate twice (AOT autograd has no "
    "double backward): leave this part of the model uncompiled",
    "CheckpointFunctionBackward": "a reentrant checkpoint cannot be differentiated with respect to "
    "what goes into it: pass use_reentrant=False to torch.utils.checkpoint",
    "SyncBatchNormBackward": "torch.nn.SyncBatchNorm has no double backward: call "
    "model = ck.swap_in(model), whose BatchNorm shares its statistics and has one",
}
# It takes the first backward it sees, an inner one, for that of the loss: gradients then differ
# between processes.
STATIC_GRAPH = (
    "DistributedDataParallel(static_graph=True) does not expect gradients inside the loss, and "
    "would reduce wrong ones: leave static_graph out"
)


@dataclass
class Survey:
    """The nodes on the way from the logits to the image."""

    plain: Counter[str] = field(default_factory=Counter)
    """ReLUs that do not know guided mode, by the name of their node."""
    guided: int = 0
    """ReLUs of camkernels."""
    obstacle: str | None = None
    """Why the way cannot be differentiated twice."""


def survey(output: Tensor, leaf: Tensor) -> Survey | None:
    """What lies between ``output`` and ``leaf``; None where no way leads there.

    Two walks over the graph, on the host.
    """
    between = _between(output, leaf)
    if not between:
        return None
    found = Survey()
    for node in between:
        _classify(node, found)
    return found


def obstacle(output: Tensor, source: Tensor) -> str | None:
    """Why the way from ``output`` to ``source`` cannot be differentiated twice; None where it can,
    or where there is none."""
    found = Survey()
    for node in _between(output, source):
        _classify(node, found)
    return found.obstacle


def _between(output: Tensor, source: Tensor) -> set[Node]:
    """The nodes on the way from ``output`` to ``source``, without the one that made ``source``."""
    if output.grad_fn is None:
        return set()
    with torch.inference_mode(False):
        end = get_gradient_edge(source).node
    users = _users(output.grad_fn, end)
    between: set[Node] = set()
    pending = [end]
    while pending:
        for user in users.get(pending.pop(), ()):
            if user not in between:
                between.add(user)
                pending.append(user)
    return between


def _users(root: Node, end: Node) -> dict[Node, list[Node]]:
    """Every node below ``root``, with the nodes that read what it stands for; not below ``end``."""
    users: dict[Node, list[Node]] = {}
    pending = [root]
    while pending:
        node = pending.pop()
        if node is end:
            continue
        for source, _ in node.next_functions:
            if source is None:
                continue
            if source in users:
                users[source].append(node)
            else:
                users[source] = [node]
                pending.append(source)
    return users


def _classify(node: Any, found: Survey) -> None:
    name = node.name()
    forward = getattr(node, "_forward_cls", None)  # of autograd.Functions written in Python
    if forward is not None and forward.__module__.startswith("camkernels."):
        found.guided += name == "ReLUFunctionBackward" or bool(getattr(node, "relu", False))
    elif name in _FIRST_ORDER_ONLY:
        found.obstacle = _FIRST_ORDER_ONLY[name]
    elif _is_static_sink(node):
        found.obstacle = STATIC_GRAPH
    elif name.startswith("ReluBackward"):
        found.plain[name] += 1
    elif name in _LOWER_BOUND:
        found.plain[name] += getattr(node, _LOWER_BOUND[name]) == 0


def _is_static_sink(node: Any) -> bool:
    """Whether a node is DistributedDataParallel's at the end of a static graph."""
    if node.name() != "_DDPSinkBackward":
        return False
    return bool(getattr(node.ddp_weakref(), "static_graph", False))


def has_static_graph(output: Tensor) -> bool:
    """Whether ``output`` comes out of DistributedDataParallel(static_graph=True): its node is the
    model's last, or a few operations on the logits below."""
    pending, seen = [output.grad_fn], 0
    while pending and seen < _NEAR:
        node = pending.pop(0)
        if node is None:
            continue
        if _is_static_sink(node):
            return True
        seen += 1
        pending += [source for source, _ in node.next_functions]
    return False


# Nodes that hand on what they are given, perhaps in another dtype or by DistributedDataParallel.
_COPIES = ("Clone", "ToCopy", "View", "UnsafeView", "Alias", "_DDPSink")


def is_copy(output: Tensor, source: Node | None) -> bool:
    """Whether ``output`` is a copy of what node ``source`` made, as autograd has recorded it."""
    node = output.grad_fn
    while node is not None and node is not source:
        name = node.name().removeprefix("torch::autograd::").partition("Backward")[0]
        if name not in _COPIES or len(node.next_functions) != 1:
            return False
        node = node.next_functions[0][0]
    return node is not None


# Nodes between the logits that a criterion is given and the end of the model.
_NEAR = 32


def total(counted: Counter[str]) -> int:
    return sum(counted.values())
