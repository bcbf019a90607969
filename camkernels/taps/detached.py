"""Under no_grad a tap hands out detached tensors; what they are in its graph, for every other tap
on the same forward."""

from __future__ import annotations

import weakref

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# Weak on both sides: the tap that made a pair keeps the graph, until its next forward.
_graphs: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def remember(plain: Tensor, graph: Tensor) -> None:
    """``plain`` is what the user was given for ``graph``."""
    _graphs[plain] = weakref.ref(graph)


def graph_of(tensor: Tensor) -> Tensor:
    """The tensor of the graph that ``tensor`` was given for; itself where there is none now."""
    while (found := _graphs.get(tensor)) is not None and (graph := found()) is not None:
        tensor = graph
    return tensor
