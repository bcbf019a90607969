"""Modes of a backward pass: guided ReLU, and no weight gradients.

Both are read where a backward runs. CUDA backwards run in threads of autograd's own, which do not
see Python's thread-locals or context variables; they do inherit the thread state that PyTorch
itself propagates from the thread that called backward, and so the modes are kept there. Two threads
that run backwards at the same time therefore never see each other's modes.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch

_GUIDED = "camkernels_guided"
_NO_WEIGHT_GRADIENTS = "camkernels_no_weight_gradients"


def _depth(key: str) -> int:
    return int(torch._C._get_obj_in_tls(key)) if torch._C._is_key_in_tls(key) else 0


class _Mode:
    """Counts entries, so that a mode entered twice ends with its outermost block."""

    key: str

    def __enter__(self) -> Any:
        torch._C._stash_obj_in_tls(self.key, _depth(self.key) + 1)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        torch._C._stash_obj_in_tls(self.key, _depth(self.key) - 1)


class guided(_Mode):  # noqa: N801 - reads as a function: with ck.guided():
    """Backward passes inside this block use the guided rule at every ReLU of camkernels.

        plain: grad_u = 1[u > 0] grad_v        guided: grad_u = 1[u > 0] max(grad_v, 0)

    The rule is chosen when the backward runs, not when the graph is made: the same graph serves
    both. The mode belongs to the calling thread and to the autograd threads that work for it.

    The guided signal is no derivative, so it has none: a backward in this block with
    ``create_graph=True`` raises.

    Source: Springenberg et al., Striving for Simplicity: The All Convolutional Net, sec. 3.4.

    Example:
        >>> import torch, camkernels as ck
        >>> u = torch.tensor([-1.0, 2.0, 3.0], requires_grad=True)
        >>> v = ck.nn.functional.relu(u)
        >>> with ck.guided():
        ...     torch.autograd.grad(v, u, torch.tensor([1.0, -1.0, 1.0]))[0].tolist()
        [0.0, 0.0, 1.0]
    """

    key = _GUIDED


class no_weight_gradients(_Mode):  # noqa: N801
    """Backward passes inside this block leave out the gradients of weights, biases and BatchNorm
    parameters at every network op of camkernels, and hand on only those of activations.

    For passes that ask for an input gradient: inside ``torch.autograd.grad(loss, x)`` autograd
    tells a Function that its weights need gradients although nobody will read them, and a third of
    the pass would be spent on them. In the block such gradients are absent (None), not zero: asking
    ``torch.autograd.grad`` for one raises there.

    Example:
        >>> import torch, camkernels as ck
        >>> net = ck.swap_in(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()))
        >>> x = torch.rand(1, 3, 8, 8, requires_grad=True)
        >>> with ck.no_weight_gradients():
        ...     (delta,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    """

    key = _NO_WEIGHT_GRADIENTS


def weight_gradients_wanted() -> bool:
    """Whether a backward that runs now shall make gradients of weights."""
    return _depth(_NO_WEIGHT_GRADIENTS) == 0


def guided_now() -> bool:
    """Whether the backward that runs now is guided.

    Raises:
        RuntimeError: if a graph of the guided signal is asked for.
    """
    if _depth(_GUIDED) == 0:
        return False
    if torch.is_grad_enabled():
        raise RuntimeError(
            "guided backward with create_graph=True: the guided signal is not a derivative and has "
            "none; take it without create_graph (it is the detached teacher), and the plain "
            "gradient with create_graph outside ck.guided()"
        )
    return True


_UNREAD = "_camkernels_unread"


def mark_unread(leaf: torch.Tensor) -> None:
    """Say of a leaf of our own that its gradient is read by ``torch.autograd.grad`` alone: a last
    backward, the one with weight gradients, need not make it."""
    setattr(leaf, _UNREAD, True)


def is_unread(tensor: torch.Tensor) -> bool:
    """Whether :func:`mark_unread` was called on this very tensor."""
    return hasattr(tensor, _UNREAD)


# --- autocast -------------------------------------------------------------------------------------


def _autocast_kind(device: torch.device | str) -> str:
    """The meta device, on which memory is predicted, has no autocast: it follows the CPU's."""
    kind = device if isinstance(device, str) else device.type
    return "cpu" if kind == "meta" else kind


def autocast_dtype(device: torch.device | str) -> torch.dtype | None:
    """The dtype that autocast would run a convolution in on this device; None where it is off."""
    kind = _autocast_kind(device)
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def no_autocast(device: torch.device | str) -> torch.autocast:
    """A block without autocast on this device."""
    return torch.autocast(_autocast_kind(device), enabled=False)
