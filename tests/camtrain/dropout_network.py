"""A network with dropout, for processes that tests start: ``--arch dropout_network:make``."""

from __future__ import annotations

from camtrain.models.smallresnet import SmallResNet
from torch import nn


def make() -> SmallResNet:
    """Before the head, where it also shuts out the closed form."""
    model = SmallResNet(width=16)
    model.flatten = nn.Sequential(nn.Flatten(), nn.Dropout(0.3))  # type: ignore[assignment]
    return model
