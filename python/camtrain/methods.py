"""Explainers by the names that the command line has for them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from camtrain.errors import CamtrainError

if TYPE_CHECKING:
    from camtrain.trained import Trained

# The classes are named and not imported: flags are described without torch.
METHODS = {
    "cam": "CAM",
    "gradcam": "GradCAM",
    "gradcam++": "GradCAMPlusPlus",
    "xgradcam": "XGradCAM",
    "layercam": "LayerCAM",
    "hirescam": "HiResCAM",
    "smoothgradcam++": "SmoothGradCAMPlusPlus",
    "scorecam": "ScoreCAM",
}


def check_methods(names: Sequence[str]) -> list[str]:
    """The names, once each.

    Raises:
        CamtrainError: an unknown one, with the near ones; none.
    """
    for name in names:
        if name not in METHODS:
            near = difflib.get_close_matches(name, METHODS, n=3) or list(METHODS)
            raise CamtrainError(f"methods: unknown {name!r}; did you mean {' or '.join(near)}?")
    if not names:
        raise CamtrainError(f"methods: expected at least one of {', '.join(METHODS)}")
    return list(dict.fromkeys(names))


def explainer(trained: Trained, name: str, layer: str | None = None) -> Any:
    """The explainer of a network, of its own layer or another.

    Raises:
        CamtrainError: no such layer.
    """
    import torch

    import camkernels as ck

    options = {"memory_format": torch.channels_last} if name == "scorecam" else {}
    try:
        return getattr(ck, METHODS[name])(trained.model, layer or trained.layer, **options)
    except ValueError as error:
        raise CamtrainError(f"{trained.name}: {error}") from error
