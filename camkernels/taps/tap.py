"""The tap: hooks that keep a layer's output of each forward, and let go when closed."""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from camkernels.taps import detached
from camkernels.taps.head import ClosedFormHead, Step, examine, version_of
from camkernels.taps.modules import LayerLike, find_layers, leaves, refuse_replica, unwrap

COMPILED_BEFORE = (
    " (what was compiled and run before the tap was made does not see it: make it first, or call "
    "torch._dynamo.reset())"
)
NO_FORWARD = f"no forward has run since the tap was made: call model(x) first{COMPILED_BEFORE}"
HEADS = ("auto", "autograd", "closed_form")


class TapError(RuntimeError):
    """The tapped forward cannot serve: there was none, it is stale, or it was altered."""


def _inert(*args: Any, **kwargs: Any) -> None:
    """What a hook becomes in a copied or unpickled model: nothing."""


def _make_inert() -> Callable[..., None]:
    return _inert


class _Hook:
    """A hook that holds its tap weakly and does not travel with copies of the model."""

    def __init__(self, tap: Tap, method: str, *arguments: Any) -> None:
        self.tap = weakref.ref(tap)
        self.method = method
        self.arguments = arguments

    @property
    def engine_needs(self) -> str:
        """What the engine must serve it: modules inside a stage are no part of the head, which the
        recording hooks look at."""
        return "output" if self.method == "_see" else "nothing"

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any) -> Any:
        tap = self.tap()
        # Inside a backward a forward is a recomputation (checkpointing), not a new forward.
        if tap is None or torch._C._current_graph_task_id() != -1:
            return None
        return getattr(tap, self.method)(*self.arguments, *args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _inert

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _make_inert, ()


@dataclass
class _Seen:
    """One layer's output in the current forward."""

    tensor: Tensor
    version: int
    calls: int = 1
    handed: Tensor | None = None  # while it is examined: what the model went on with, if another


@dataclass
class _Forward:
    """What one forward of the model left behind."""

    layers: dict[int, _Seen] = field(default_factory=dict)
    outputs: list[tuple[weakref.ref[Tensor], Tensor]] = field(default_factory=list)
    """What the user holds -> the tensor that is connected to the graph (under no_grad)."""
    began: bool = False
    grad_enabled: bool = True
    steps: list[Step] | None = None


class Tap:
    """Keeps the outputs of ``layers`` of the latest forward of ``model``.

    Args:
        model: the user's model, also inside DistributedDataParallel or ``torch.compile``.
        layers: names or modules.
        head: ``"auto"``, ``"autograd"`` or ``"closed_form"``, see :class:`camkernels.GradCAM`.
        connect: under ``no_grad`` run what lies behind the layers with gradients on, on a copy of
            their outputs. Without it copies are kept, for who needs no gradient. (Copies, since
            what follows may write over the outputs.)

    Nothing else of the model is touched: not its mode, ``.grad``, buffers or random state. Copies
    and pickles of the model carry no tap.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: LayerLike | Sequence[LayerLike],
        head: str = "auto",
        connect: bool = True,
    ) -> None:
        if head not in HEADS:
            raise ValueError(f"head: expected one of {', '.join(HEADS)}, got {head!r}")
        self.model = unwrap(model)
        found = find_layers(self.model, layers)
        self.names = [name for name, _ in found]
        self.modules = [module for _, module in found]
        self.head_choice, self._connects = head, connect
        self.head: ClosedFormHead | None = None
        self.head_reason = "no forward has run yet"
        self._examined = head == "autograd"
        if head == "autograd":
            self.head_reason = "asked for by head='autograd'"
        elif len(found) > 1:
            self._examined, self.head_reason = True, "several layers are tapped"
        self._forward = _Forward()
        self._ever = False
        self._grad_mode: ExitStack | None = None
        self._handles: list[RemovableHandle] = []
        self._head_handles: list[RemovableHandle] = []
        self._examining: list[RemovableHandle] = []
        self._install()

    def _install(self) -> None:
        add = self._handles.append
        add(self.model.register_forward_pre_hook(_Hook(self, "_begin")))
        for index, module in enumerate(self.modules):
            add(module.register_forward_hook(_Hook(self, "_see", index)))
        add(self.model.register_forward_hook(_Hook(self, "_end"), always_call=True))

    def close(self) -> None:
        """Remove every hook and let go of the kept tensors. May be called again."""
        for handles in (self._handles, self._head_handles, self._examining):
            while handles:
                handles.pop().remove()
        self._leave_grad_mode()
        self._forward = _Forward()
        self._closed = True

    def forget(self) -> None:
        """Let go of the latest forward; the hooks stay."""
        self._leave_grad_mode()
        self._forward = _Forward()
        self._ever = False
        if self.head is not None:
            self.head.inputs.clear()

    _closed = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Tap:
        # The copied model (once, by the memo) carries inert hooks: tap it anew.
        model = copy.deepcopy(self.model, memo)
        return Tap(model, self.names, self.head_choice, self._connects)

    def __reduce__(self) -> tuple[Any, ...]:
        return Tap, (self.model, self.names, self.head_choice, self._connects)

    # -- hooks ---------------------------------------------------------------------------------

    def _begin(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        refuse_replica(module, self.model)
        self._leave_grad_mode()
        self._forward = _Forward(began=True, grad_enabled=torch.is_grad_enabled())
        self._ever = True
        if self.head is not None:
            self.head.inputs.clear()
        if not self._examined:
            self._forward.steps = []
            for leaf in leaves(self.model):
                hook = leaf.register_forward_hook(_Hook(self, "_record"))
                self._examining.append(hook)

    def _see(self, index: int, module: nn.Module, inputs: Any, output: Any) -> Tensor | None:
        refuse_replica(module, self.modules[index])
        self._ever = True
        seen = self._forward.layers.get(index)
        if seen is not None:
            seen.calls += 1
            return None
        if not isinstance(output, Tensor):
            raise TapError(
                f"layer {self.names[index]!r} returns {type(output).__name__}, expected a tensor"
            )
        if (
            not torch.is_grad_enabled()
            and self._forward.grad_enabled
            and _inside_reentrant_checkpoint()
        ):
            raise TapError(
                f"layer {self.names[index]!r} runs inside a reentrant checkpoint, which hides its "
                "graph; pass use_reentrant=False, or tap the checkpointed module itself"
            )
        kept, handed = self._connect(output) if self._connects else (output.clone(), None)
        self._forward.layers[index] = seen = _Seen(kept, version_of(kept))
        if self._forward.steps is not None:
            seen.handed = handed
            self._forward.steps.clear()  # what ran before the layer is no part of the head
        return handed

    def _record(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if self._forward.steps is not None and module not in self.modules:
            self._forward.steps.append(Step.of(module, inputs, output))

    def _keep_linear_input(self, position: int, module: nn.Module, inputs: Any) -> None:
        if self.head is not None and self._forward.layers:
            self.head.inputs[position] = inputs[0]

    def _end(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        while self._examining:
            self._examining.pop().remove()
        connected = self._grad_mode is not None
        self._leave_grad_mode()
        if output is None:  # the forward raised
            self._forward = _Forward()
            return None
        if self._forward.steps is not None:
            self._examine(output)
        if not connected:
            return None

        def detach(tensor: Tensor) -> Tensor:
            # Under no_grad the user gets what no_grad promises; the graph stays here.
            plain = tensor.detach()
            self._forward.outputs.append((weakref.ref(plain), tensor))
            detached.remember(plain, tensor)
            return plain

        return pytree.tree_map_only(Tensor, detach, output)

    # -- gradient mode -------------------------------------------------------------------------

    def _connect(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """What to keep, and what the model gets in place of ``output`` where autograd must reach it
        but could not."""
        if self._closed_form_holds() or output.requires_grad or not output.is_floating_point():
            return output, None
        if torch.is_inference_mode_enabled():
            if not self._forward.began:
                return output, None
            self._grad_mode = ExitStack()
            self._grad_mode.enter_context(torch.inference_mode(False))
            leaf = output.clone().requires_grad_()  # an inference tensor cannot enter a graph
            return leaf, leaf.clone()
        leaf = output.detach().requires_grad_()
        if torch.is_grad_enabled():
            return leaf, leaf
        if not self._forward.began or self._forward.grad_enabled:
            return output, None  # the model itself turned gradients off: its own choice
        self._grad_mode = ExitStack()
        self._grad_mode.enter_context(torch.enable_grad())
        return leaf, leaf.clone()  # what follows may write into it

    def _leave_grad_mode(self) -> None:
        stack, self._grad_mode = self._grad_mode, None
        if stack is not None:
            stack.close()

    def _closed_form_holds(self) -> bool:
        head = self.head
        return head is not None and not any(d.training and d.p > 0 for d in head.dropouts)  # type: ignore[operator]

    # -- the head ------------------------------------------------------------------------------

    def _examine(self, output: Any) -> None:
        steps, self._forward.steps = self._forward.steps, None
        seen = self._forward.layers.get(0)
        if steps is None or seen is None:
            return
        if seen.tensor.dim() != 4:
            head, reason = None, "the layer's output is not (B, K, h, w)"
        else:
            logits = output if isinstance(output, Tensor) else _logits_in(output)
            after = seen.tensor if seen.handed is None else seen.handed
            head, reason = examine(after, steps, logits)
        seen.handed = None
        self._examined = True
        self._set_head(head, reason)
        if head is not None:
            positions = {id(linear): i for i, linear in enumerate(head.linears)}
            for step in steps:
                if id(step.module) in positions and step.input is not None:
                    head.inputs[positions[id(step.module)]] = step.input

    def _set_head(self, head: ClosedFormHead | None, reason: str) -> None:
        while self._head_handles:
            self._head_handles.pop().remove()
        self.head, self.head_reason = head, reason
        if head is not None:
            for position, linear in enumerate(head.linears):
                hook = _Hook(self, "_keep_linear_input", position)
                self._head_handles.append(linear.register_forward_pre_hook(hook))

    def usable_head(self) -> ClosedFormHead | None:
        """The closed form of the latest forward's head; None where autograd must do it."""
        if self.head is None:
            if self.head_choice == "closed_form":
                raise TapError(f"head='closed_form' was asked for, but {self.head_reason}")
            return None
        reason = self.head.unusable()
        if reason is None:
            return self.head
        if self.head_choice == "closed_form":
            raise TapError(f"head='closed_form' was asked for, but {reason}")
        self.head_reason = reason
        if "changed" in reason:
            self.examine_again()
        return None

    def examine_again(self) -> None:
        """Forget what is known of the head; the next forward is examined anew."""
        if self.head_choice != "autograd" and len(self.modules) == 1:
            self._examined = False
            self._set_head(None, self.head_reason)

    def give_up_head(self, reason: str) -> None:
        """Take autograd from now on."""
        self._examined = True
        self._set_head(None, reason)

    def describe_head(self) -> str:
        """``closed form: ...`` or ``autograd: <why>``."""
        if self.head is not None and (reason := self.head.unusable()) is None:
            return f"closed form: {self.head.description}"
        return f"autograd: {self.head_reason if self.head is None else reason}"

    # -- reading -------------------------------------------------------------------------------

    def activations(self) -> list[Tensor]:
        """The layers' outputs in the latest forward, as the user's graph holds them.

        Raises:
            TapError: no forward yet, a layer that it never reached, or reached twice, or whose
                output a later operation changed in place.
        """
        if self._closed:
            raise TapError("the tap is closed")
        if not self._ever:
            raise TapError(NO_FORWARD)
        result = []
        for index, name in enumerate(self.names):
            seen = self._forward.layers.get(index)
            if seen is None:
                raise TapError(
                    f"layer {name!r} was not reached by the latest forward of the model"
                    f"{COMPILED_BEFORE}"
                )
            if seen.calls > 1:
                raise TapError(
                    f"layer {name!r} was reached {seen.calls} times in one forward; a tap needs a "
                    "layer that runs once (or call the model itself, so that forwards are told "
                    "apart)"
                )
            if version_of(seen.tensor) != seen.version:
                raise TapError(
                    f"the output of layer {name!r} was changed in place after the tap; tap the "
                    "module that does it or one before, or make it inplace=False"
                )
            result.append(seen.tensor)
        return result

    def connected(self, logits: Tensor) -> Tensor:
        """``logits`` as the tapped graph holds them (they differ under no_grad only).

        Of several taps the first in a forward makes the graph, for all of them.
        """
        for held, graph in self._forward.outputs:
            if held() is logits:
                return graph
        return detached.graph_of(logits)


def _logits_in(output: Any) -> Tensor | None:
    """``logits`` of a ModelOutput or a dict, as Hugging Face's models return them."""
    mapping = isinstance(output, Mapping)
    found = output.get("logits") if mapping else getattr(output, "logits", None)
    return found if isinstance(found, Tensor) else None


def _inside_reentrant_checkpoint() -> bool:
    """Whether a frame of torch.utils.checkpoint's reentrant Function is on the stack."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_filename.endswith("torch/utils/checkpoint.py"):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
