"""What the criterion of a running script sees, and the same training in plain PyTorch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from eager_losses import Loss
from torch import Tensor, nn

import camkernels as ck
from camkernels.taps.modules import unwrap

STEPS = 20
LR = 0.01
RELATIVE = 1e-6


class Watched:
    """Of the one criterion of a kind that a script makes: the model before, and the calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: type[nn.Module]) -> None:
        self.images: list[Tensor] = []
        self.targets: list[Tensor] = []
        self.losses: list[float] = []
        self.views: list[tuple[Tensor, Tensor]] = []
        self.without_grad = 0
        watched = self

        class Recording(kind):  # type: ignore[misc, valid-type]
            def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
                watched.model = unwrap(model)
                watched.before = copy.deepcopy(watched.model.state_dict())
                watched.twin = copy.deepcopy(watched.model)
                # A function and not the method: copies of the model would copy what that holds.
                watched.model.register_forward_pre_hook(
                    lambda *call: watched._see(*call), with_kwargs=True
                )
                super().__init__(model, *args, **kwargs)
                watched.criterion = self
                if isinstance(self, ck.CAMConsistencyLoss):
                    draw = self.transform
                    self.transform = lambda *sizes: watched._drew(draw(*sizes))

            def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
                images = watched.latest
                loss: Tensor = super().forward(logits, targets)
                if torch.is_grad_enabled():
                    watched.images.append(images)
                    watched.targets.append(targets)
                    watched.losses.append(float(loss.detach()))
                else:
                    watched.without_grad += 1
                    watched.views = watched.views[: len(watched.losses)]
                return loss

        monkeypatch.setattr(ck, kind.__name__, Recording)

    model: nn.Module
    twin: nn.Module
    before: dict[str, Tensor]
    criterion: Any
    latest: Tensor

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        (self.latest,) = (v.detach() for v in (*args, *kwargs.values()) if _is_images(v))

    def _drew(self, view: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        self.views.append(view)
        return view


def _is_images(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4


def train_eagerly(
    model: nn.Module,
    loss_of: Loss,
    watched: Watched,
    accumulate: int = 1,
    momentum: float = 0.9,
    divide: int | None = None,
) -> list[float]:
    """The losses; ``divide``: by what each is divided, None: the number of batches per step."""
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=momentum)
    losses: list[float] = []
    model.train()
    views = watched.views or [None] * STEPS
    for images, targets, drawn in zip(watched.images, watched.targets, views, strict=True):
        loss = loss_of(model, images, targets, drawn)
        (loss / (divide or accumulate)).backward()
        losses.append(float(loss.detach()))
        if len(losses) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return losses


def assert_alike(watched: Watched, model: nn.Module, losses: list[float]) -> None:
    assert len(watched.losses) == STEPS
    assert losses == pytest.approx(watched.losses, rel=RELATIVE)
    start = watched.before
    for (name, found), wanted in zip(
        watched.model.named_parameters(), model.parameters(), strict=True
    ):
        # What training did is alike, not only what it started from.
        error = float((found - wanted).detach().norm())
        assert error <= RELATIVE * float((wanted - start[name]).detach().norm()), name
