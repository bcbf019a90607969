"""The input tap: a leaf of its own in place of the images, so that their gradient can be asked for.

The user's images never need ``requires_grad``, and their ``.grad`` is not written. Which forwards
get a leaf is decided before each: those that a regulariser will look at.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from camkernels import modes
from camkernels.nn._kinds import is_sharded
from camkernels.taps import detached
from camkernels.taps.modules import refuse_replica, refuse_sharded, unwrap
from camkernels.taps.second import in_second_forward
from camkernels.taps.tap import NO_FORWARD, TapError, _Hook

# What the latest forward was.
_TAPPED = "tapped"  # with gradients, and a leaf
_SKIPPED = "skipped"  # with gradients, and none: not this step's turn
_MEASURED = "measured"  # without gradients, and a leaf all the same
_BARE = "bare"  # without gradients


class _InputHook(_Hook):
    """Runs in recomputations too, which need the same kind of input."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any) -> Any:
        tap = self.tap()
        return None if tap is None else getattr(tap, self.method)(*args)


class JoinFunction(torch.autograd.Function):
    """x, with the leaf as its second parent: the gradient of x is that of the leaf."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, leaf: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad


@dataclass
class _Forward:
    """What one forward of the model left behind."""

    mode: str
    leaf: Callable[[], Tensor | None] = lambda: None
    """A weak reference: the graph of the forward owns the leaf."""
    replaced: bool = False
    float16: bool = False
    outputs: list[tuple[weakref.ref[Tensor], Tensor]] = field(default_factory=list)
    """What the user holds -> the tensor that is connected to the graph (measured forwards)."""
    counted: bool = False


@dataclass
class Connected:
    """The two ends of the latest forward's graph."""

    logits: Tensor
    leaf: Tensor
    float16: bool
    """The forward ran in float16."""
    training: bool
    """It ran with gradients enabled: the user will go backward through it."""


class InputTap:
    """Makes a leaf of the images in forwards of ``model``.

    Args:
        model: the user's model, also inside DistributedDataParallel.
        input: name or position of the argument that holds the images; None: the first positional
            tensor.
        every: tap every so-manieth of the forwards that are called with gradients and counted.
        calls: how many were counted before.
        without_grad: tap forwards under ``torch.no_grad()`` too; they then keep their graph until
            it has been read.
    """

    def __init__(
        self,
        model: nn.Module,
        input: int | str | None = None,
        every: int = 1,
        calls: int = 0,
        without_grad: bool = False,
    ) -> None:
        self.model = unwrap(model)
        refuse_sharded(self.model)
        self.input = input
        self.every = every
        self.calls = calls
        self.without_grad = without_grad
        self._forward: _Forward | None = None
        self._closed = False
        self._grad_mode: ExitStack | None = None
        begin, end = _InputHook(self, "_begin"), _InputHook(self, "_end")  # type: ignore[arg-type]
        self._handles: list[RemovableHandle] = [
            self.model.register_forward_pre_hook(begin, with_kwargs=True),
            self.model.register_forward_hook(end, always_call=True),
        ]

    def close(self) -> None:
        """Remove the hooks and let go of what is kept. May be called again."""
        while self._handles:
            self._handles.pop().remove()
        self._leave_grad_mode()
        self._forward = None
        self._closed = True

    def _options(self) -> tuple[Any, ...]:
        return self.input, self.every, self.calls, self.without_grad

    def __deepcopy__(self, memo: dict[int, Any]) -> InputTap:
        # The copied model (once, by the memo) carries inert hooks: tap it anew.
        return InputTap(copy.deepcopy(self.model, memo), *self._options())

    def __reduce__(self) -> tuple[Any, ...]:
        return InputTap, (self.model, *self._options())

    # -- hooks ---------------------------------------------------------------------------------

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        refuse_replica(module, self.model)
        if self._forward is None or is_sharded(self.model):
            refuse_sharded(self.model)  # wrapped since
        if torch._C._current_graph_task_id() != -1:
            # Inside a backward a forward is a recomputation (checkpointing) of one that was seen:
            # it gets the same kind of input.
            if self._forward is None or not self._forward.replaced:
                return None
            return self._replace(args, kwargs)[0]
        if in_second_forward():
            return None  # its images are nobody's to ask about
        self._leave_grad_mode()
        self._forward = _Forward(self._mode())
        if self._forward.mode not in (_TAPPED, _MEASURED):
            return None
        replaced, leaf = self._replace(args, kwargs)
        self._forward.leaf, self._forward.replaced = weakref.ref(leaf), True
        cast = modes.autocast_dtype(leaf.device)
        self._forward.float16 = torch.float16 in (leaf.dtype, cast)
        return replaced

    def _mode(self) -> str:
        if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            return _TAPPED if self.calls % self.every == 0 else _SKIPPED
        return _MEASURED if self.without_grad else _BARE

    def _replace(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Tensor]:
        """The arguments with a leaf in them, and the leaf."""
        key, images = find_images(self.model, self.input, args, kwargs)
        if not images.is_floating_point():
            raise TypeError(
                f"images: the model's argument {key!r} is {images.dtype}, which has no gradient; "
                "convert the images to floating point before the model, not inside it"
            )
        self._enter_grad_mode()
        plain = images.clone() if images.is_inference() else images.detach()
        leaf = plain.requires_grad_()
        # A final backward fills it although nobody asks: let go at once.
        leaf.register_post_accumulate_grad_hook(_drop_gradient)
        put = JoinFunction.apply(images, leaf) if images.requires_grad else leaf
        if put is leaf:
            modes.mark_unread(leaf)
        if isinstance(key, str):
            return (args, {**kwargs, key: put}), leaf
        return ((*args[:key], put, *args[key + 1 :]), kwargs), leaf

    def _end(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        if torch._C._current_graph_task_id() != -1 or in_second_forward():
            return None
        measured = self._grad_mode is not None
        self._leave_grad_mode()
        if output is None:  # the forward raised
            self._forward = None
        if self._forward is None or not measured:
            return None
        outputs = self._forward.outputs

        def detach(tensor: Tensor) -> Tensor:
            # Without gradients the user gets what no_grad promises; the graph stays here.
            plain = tensor.detach()
            outputs.append((weakref.ref(plain), tensor))
            detached.remember(plain, tensor)
            return plain

        return pytree.tree_map_only(Tensor, detach, output)

    def _enter_grad_mode(self) -> None:
        if self._forward is None or self._forward.mode != _MEASURED or self._grad_mode is not None:
            return
        self._grad_mode = ExitStack()
        if torch.is_inference_mode_enabled():
            self._grad_mode.enter_context(torch.inference_mode(False))
        self._grad_mode.enter_context(torch.enable_grad())

    def _leave_grad_mode(self) -> None:
        stack, self._grad_mode = self._grad_mode, None
        if stack is not None:
            stack.close()

    # -- reading -------------------------------------------------------------------------------

    def connected(self, logits: Tensor) -> Connected | None:
        """The graph of the latest forward, whose ``logits`` these are; None where it is not one to
        look at: skipped, or without gradients.

        Counts the forward, once.

        Raises:
            TapError: no forward yet, or a stale one.
        """
        if self._closed:
            raise TapError("the tap is closed")
        forward = self._forward
        if forward is None:
            raise TapError(NO_FORWARD)
        grad = torch.is_grad_enabled()
        if forward.mode in (_TAPPED, _SKIPPED) and grad and not forward.counted:
            self.calls, forward.counted = self.calls + 1, True
        graph, training = logits, forward.mode == _TAPPED
        if forward.mode == _MEASURED:  # one look: an idle criterion holds no graph
            own = (g for held, g in forward.outputs if held() is logits)
            graph = next(own, detached.graph_of(logits))
            forward.outputs, forward.mode = [], _BARE
        elif forward.mode == _SKIPPED or (
            not logits.requires_grad and (forward.mode == _BARE or not grad)
        ):
            return None
        leaf = forward.leaf()
        if leaf is None or not graph.requires_grad:
            raise TapError(UNCONNECTED)
        if leaf.shape[0] != logits.shape[0]:
            raise TapError(
                f"stale forward: the model last saw a batch of {leaf.shape[0]}, the logits hold "
                f"{logits.shape[0]}"
            )
        return Connected(graph, leaf, forward.float16, training)


def find_images(
    model: nn.Module, input: int | str | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[int | str, Tensor]:
    """Where the images are among the arguments of a model, and they."""
    key: int | str | None = input
    if key is None:
        tensors = [i for i, value in enumerate(args) if isinstance(value, Tensor)]
        named = [name for name, value in kwargs.items() if isinstance(value, Tensor)]
        if not tensors and len(named) != 1:
            raise TapError(
                f"the model was called with {len(args)} positional arguments, none of them a "
                f"tensor, and the tensors {named}: pass input= the name of the images"
            )
        key = tensors[0] if tensors else named[0]
    elif isinstance(key, str) and key not in kwargs:
        names = list(inspect.signature(model.forward).parameters)
        if key not in names or names.index(key) >= len(args):
            raise TapError(f"input={key!r}: the model was not called with such an argument")
        key = names.index(key)
    elif isinstance(key, int) and not 0 <= key < len(args):
        raise TapError(f"input={key}: the model was called with {len(args)} positional ones")
    value = kwargs[key] if isinstance(key, str) else args[key]
    if not isinstance(value, Tensor):
        raise TypeError(
            f"images: expected a tensor as argument {key!r} of the model, got "
            f"{type(value).__name__}"
        )
    return key, value


UNCONNECTED = (
    "the logits are not connected to the images of the model's latest forward: they are of another "
    "forward (a stale forward, or one without gradients), or detached, or a part of the model cuts "
    "the graph"
)


def _drop_gradient(leaf: Tensor) -> None:
    leaf.grad = None
