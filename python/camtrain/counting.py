"""What a training step takes, counted without running it on a device.

The step of a configuration is run on the meta device, where tensors have shapes and no numbers, and
every allocation is counted (``camkernels/engine/ledger.py``). What a batch adds does not need that
batch to exist, so the peak at the largest batch is counted at that very batch, not continued from
small ones.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from camkernels.engine.ledger import Ledger
from camtrain.config import FitConfig
from camtrain.errors import CamtrainError
from camtrain.models import build_model
from camtrain.training import Classifier, make_classifier
from camtrain.weighting import norm_of_gradient

# A batch of one may be refused (BatchNorm of one value per channel), and a large one comes first,
# because the engine chooses what it keeps at the first batch it sees.
PROBES = (32, 8)
_LARGEST = 1 << 24
_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}

Loss = Callable[[dict[str, Any]], Tensor]


class Step:
    """A training step as Lightning runs it, on any device.

    Gradients are freed once the optimiser has used them (``Classifier.optimizer_step``); where they
    are accumulated, those of the batch before live through forward and backward. A step makes these
    itself, so that a loop of one step is like any other.

    Args:
        loss: of a batch of ``images`` and ``targets``. model: whose parameters it trains.
        config: of the run. device: where the batch is made.
    """

    def __init__(self, loss: Loss, model: nn.Module, config: FitConfig, device: str) -> None:
        self.loss, self.config, self.device = loss, config, torch.device(device)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.accumulates = config.accumulate > 1
        self.traced = False

    def run(self, batch: int) -> None:
        """One step on ``batch`` pictures."""
        side = self.config.image_size
        shape, where = (batch, 3, side, side), self.device
        pictures = torch.zeros(shape, dtype=torch.uint8, device=where)
        images = torch.zeros(shape, device=where)
        made = {
            "images": images,
            "targets": torch.zeros(batch, dtype=torch.long, device=where),
            "pictures": pictures,  # Lightning holds the batch as it came until the step is over
        }
        if self.accumulates:
            for p in self.parameters:
                p.grad = torch.zeros_like(p)
        # a forward that the engine traces must not run through casts, which are no part of it
        with autocast(self.config.precision, where, casts=self.traced):
            loss = self.loss(made)
        self.traced = True
        loss.backward()
        for p in self.parameters:
            p.grad = None


def step_of(config: FitConfig, classes: int, device: str = "meta") -> tuple[Step, nn.Module]:
    """The step of ``config``, and its network.

    Raises:
        CamtrainError: whatever keeps ``camtrain fit`` from training so.
    """
    # the regulariser at every step: where it comes seldom, the peak is that of the steps with it
    config = dataclasses.replace(config, weights=None, every=1)
    model = network(config, classes, device)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    module = make_classifier(model, config, classes).train()
    if module.balance is not None:
        # a step that measures the balance, but does not read the norms, which have no values here
        module._balanced = _balancing(module)  # type: ignore[method-assign]
    return Step(
        lambda batch: module.loss_of(batch, "train")[1], module.model, config, device
    ), model


def network(config: FitConfig, classes: int, device: str) -> nn.Module:
    """The network of ``config`` on ``device``; on meta no weights are made."""
    try:
        with torch.device(device):
            return build_model(config, classes)
    except CamtrainError:
        # some libraries compute numbers of a network's shape with tensors, which have none here
        return build_model(config, classes).to(device)


def _balancing(module: Classifier) -> Callable[[tuple[Tensor, Tensor]], float]:
    def measure(parts: tuple[Tensor, Tensor]) -> float:
        weights = [p for p in module.model.parameters() if p.requires_grad]
        for part in parts:
            norm_of_gradient(part, weights)
        return 1.0

    return measure


# --- autocast -----------------------------------------------------------------------------------

_LOW = {torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose2d, nn.functional.linear,
        torch.matmul, torch.mm, torch.bmm, torch.addmm, Tensor.matmul, Tensor.__matmul__,
        nn.functional.scaled_dot_product_attention}  # fmt: skip
_FULL = {nn.functional.cross_entropy, nn.functional.softmax, nn.functional.log_softmax,
         nn.functional.layer_norm, nn.functional.group_norm, torch.softmax,
         torch.log_softmax}  # fmt: skip


@contextmanager
def autocast(precision: str, device: torch.device, casts: bool = True) -> Iterator[None]:
    """Autocast as Lightning's ``precision`` means it.

    PyTorch has none for the meta device: its casts are made here. Our own ops follow the CPU's
    autocast there, with or without ``casts``.
    """
    dtype = _AUTOCAST.get(precision)
    if dtype is None:
        yield
        return
    on_meta = device.type == "meta"
    with (
        torch.autocast("cpu" if on_meta else device.type, dtype),
        _Casts(dtype) if on_meta and casts else nullcontext(),
    ):
        yield


class _Casts(TorchFunctionMode):
    """Convolutions and products in ``dtype``, losses and some norms in float32; of a weight one
    copy per block."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.weights: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # off inside of ops that see to their precision themselves
        if torch.is_autocast_enabled("cpu") and (func in _LOW or func in _FULL):
            cast = self._low if func in _LOW else _full
            args = tuple(cast(a) for a in args)
            kwargs = {name: cast(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def _low(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype not in (torch.float32, torch.float64):
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(self.dtype)
        if id(value) not in self.weights:
            self.weights[id(value)] = value.to(self.dtype)
        return self.weights[id(value)]


def _full(value: Any) -> Any:
    low = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if low else value


# --- one mode -----------------------------------------------------------------------------------


class Peaks:
    """The peak by the batch, of one step; each batch is counted once.

    Attributes:
        fixed: bytes that lie there all the time: parameters, buffers, the optimiser's state.
    """

    def __init__(self, step: Step, model: nn.Module, device: str = "cuda") -> None:
        self.step, self.device = step, device
        self.known: dict[int, int] = {}
        trained = bytes_of(step.parameters)
        config = step.config
        if config.optimizer == "adam":
            states, temporary = 2, 1  # both moments; the root of the second
        else:
            states, temporary = int(config.momentum != 0), 0
        temporary += int(config.weight_decay != 0)  # gradients with the decay added
        self.fixed = bytes_of([*model.parameters(), *model.buffers()]) + states * trained
        self.update = (1 + temporary) * trained  # gradients and what the optimiser's step makes

    def free_in_backward(self) -> None:
        """Count a step whose optimiser uses and frees each gradient as soon as it is made."""
        for p in self.step.parameters:
            p.register_post_accumulate_grad_hook(_free)
        whole = sum(p.numel() for p in self.step.parameters)
        largest = max((p.numel() for p in self.step.parameters), default=0)
        self.update = self.update * largest // max(whole, 1)

    def at(self, batch: int) -> int:
        """Bytes of a run at the highest moment of its steps of ``batch`` pictures."""
        if batch not in self.known:
            self.known[batch] = self.fixed + max(self.without_update(batch), self.update)
        return self.known[batch]

    def without_update(self, batch: int) -> int:
        """Bytes that a step takes above :attr:`fixed`, before the optimiser's part."""
        if not self.step.traced:  # buffers and plans that stay are made at the first step
            self.step.run(batch)
        ledger = Ledger(self.device)
        with ledger.running():
            self.step.run(batch)
        return ledger.peak

    def line(self, below: float = math.inf) -> tuple[float, float]:
        """Bytes at batch 0 and per sample, by the two largest batches that fit."""
        points = sorted(self.known)
        fitting = [b for b in points if self.known[b] <= below]
        return self._through(*(fitting if len(fitting) > 1 else points)[-2:])

    def _through(self, first: int, second: int) -> tuple[float, float]:
        rise = self.known[second] - self.known[first]
        slope = rise / (second - first) if second > first else 0.0
        return self.known[second] - slope * second, slope

    def largest(self, budget: float) -> int:
        """The largest batch whose peak is within ``budget`` bytes; 0: none is.

        The peak is the largest of several straight lines, one per moment of the step. So the line
        through two batches that fit, or through two that do not, lies below the peak outside of
        them: no batch beyond the line's fits. The line from a batch that fits to one that does not
        lies above it: what it lets in does fit.
        """
        for batch in PROBES:
            self.at(batch)
        if min(self.known.values()) > budget and self.least()[1] > budget:
            return 0
        while True:
            fitting = sorted(b for b, peak in self.known.items() if peak <= budget)
            failing = sorted(self.known.keys() - fitting)
            below, above = fitting[-1], failing[0] if failing else _LARGEST
            lines = [p for p in (fitting[-2:], failing[:2]) if len(p) == 2]
            most = min([above - 1, *(self._within(budget, *points) for points in lines)])
            if most <= below:
                return below
            guess = min(most, 16 * below)  # one moment may hide all others at first
            if guess in self.known or (failing and guess == above - 1):
                sure = self._within(budget, below, above) if failing else below
                guess = sure if below < sure < above else (below + above) // 2
            self.at(guess)

    def _within(self, budget: float, first: int, second: int) -> int:
        """The batch at which the line through two reaches ``budget``."""
        constant, slope = self._through(first, second)
        return int((budget - constant) // slope) if slope > 0 else _LARGEST

    def least(self) -> tuple[int, int]:
        """The smallest batch that can be trained, and its peak."""
        try:
            return 1, self.at(1)
        except ValueError:  # BatchNorm of maps of one pixel
            return 2, self.at(2)


def _free(parameter: Tensor) -> None:
    parameter.grad = None


def bytes_of(tensors: Any) -> int:
    return sum(t.numel() * t.itemsize for t in tensors)
