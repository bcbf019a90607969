"""The image tap: the images of the latest forward, and a second batch in the same forward."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

from camkernels.taps.graph import is_copy
from camkernels.taps.input_tap import find_images
from camkernels.taps.modules import unwrap
from camkernels.taps.second import second_forward
from camkernels.taps.tap import TapError, _Hook

STALE = (
    "the logits are not those of the model's latest forward (a stale forward), or were changed on "
    "the way: call criterion(model(x), y) with what the model returned"
)


class ImageTap:
    """Keeps the images of the latest forward of ``model``, and runs a second one.

    Args:
        model: the user's model, also inside DistributedDataParallel.
        input: name or position of the argument that holds the images; None: the first positional
            tensor.
        join: None, or what makes a second batch of the images, which then goes through the model
            in the same forward, behind the first; the caller gets the output of the first. Forwards
            without gradients are left alone.
    """

    def __init__(
        self,
        model: nn.Module,
        input: int | str | None = None,
        join: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.model = unwrap(model)
        self.input = input
        self.join = join
        self.images: Tensor | None = None
        self.joined: Tensor | None = None
        """Logits of both batches, where they went through one forward."""
        self._call: tuple[tuple[Any, ...], dict[str, Any], int | str] | None = None
        self._given: tuple[weakref.ref[Tensor], Node | None] | None = None
        """What the user holds of a joined forward, and the node that made it."""
        self._quiet = self._joins = False
        self._handles: list[RemovableHandle] = [
            self.model.register_forward_pre_hook(_Hook(self, "_begin"), with_kwargs=True),  # type: ignore[arg-type]
            self.model.register_forward_hook(_Hook(self, "_end"), always_call=True),  # type: ignore[arg-type]
        ]

    def close(self) -> None:
        """Remove the hooks and let go of the images. May be called again."""
        while self._handles:
            self._handles.pop().remove()
        self.forget()

    def forget(self) -> None:
        """Let go of what the latest forward left."""
        self.images = self.joined = self._call = self._given = None
        self._joins = False

    def __deepcopy__(self, memo: dict[int, Any]) -> ImageTap:
        # A bound method is copied with its object: the copy joins what the copied owner draws.
        model, join = copy.deepcopy((self.model, self.join), memo)
        return ImageTap(model, self.input, join)

    def __reduce__(self) -> tuple[Any, ...]:
        return ImageTap, (self.model, self.input, self.join)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._quiet:
            return None
        self.forget()
        key, images = find_images(self.model, self.input, args, kwargs)
        self.images = images
        self._call = args, kwargs, key
        if self.join is None or not torch.is_grad_enabled():
            return None
        self._joins = True
        return _replaced(args, kwargs, key, torch.cat([images, self.join(images)]))

    def _end(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        if self._quiet:
            return None
        if not isinstance(output, Tensor):  # the forward raised, or returns something else
            if output is not None and self._joins:
                raise TapError(
                    f"the model returns {type(output).__name__}, expected logits (B, C): views in "
                    "one forward need a single tensor"
                )
            if output is None:
                self.forget()
            return None
        if not self._joins or self.images is None:
            return None
        self.joined = output
        first = output[: self.images.shape[0]]
        self._given = weakref.ref(first), first.grad_fn
        return first

    def _is_given(self, logits: Tensor) -> bool:
        """Whether ``logits`` are what the user was given of both batches, or a copy."""
        if self._given is None:
            return False
        given, node = self._given
        return given() is logits or is_copy(logits, node)

    def latest(self, logits: Tensor) -> Tensor:
        """The images whose ``logits`` these are.

        Raises:
            TapError: no forward yet, or a stale one.
        """
        if self.images is None:
            raise TapError("no forward has run since the last call: call model(x) first")
        if self.images.shape[0] != logits.shape[0] or (
            self.joined is not None and not self._is_given(logits)
        ):
            raise TapError(STALE)
        return self.images

    @contextmanager
    def _unseen(self) -> Any:
        self._quiet = True
        try:
            yield
        finally:
            self._quiet = False

    def again(self, images: Tensor) -> Tensor:
        """The model's output for other images, all other arguments as before."""
        assert self._call is not None
        args, kwargs, key = self._call
        args, kwargs = _replaced(args, kwargs, key, images)
        with self._unseen(), second_forward():
            output = self.model(*args, **kwargs)
        if not isinstance(output, Tensor):
            raise TapError(f"the model returns {type(output).__name__}, expected logits (B, C)")
        return output


def _replaced(
    args: tuple[Any, ...], kwargs: dict[str, Any], key: int | str, images: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(key, str):
        return args, {**kwargs, key: images}
    return (*args[:key], images, *args[key + 1 :]), kwargs
