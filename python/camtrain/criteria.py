"""The criteria of a configuration."""

from __future__ import annotations

from typing import Any

from torch import nn

import camkernels as ck
from camtrain.config import FitConfig
from camtrain.data.sampling import generator
from camtrain.errors import CamtrainError


def entropy(model: nn.Module, layer: str, config: FitConfig) -> ck.CAMEntropyLoss:
    """Of the maps of ``layer``."""
    return ck.CAMEntropyLoss(
        model,
        layer,
        beta=config.beta,
        regularizer=config.regularizer,
        target=config.target,
        other_classes=config.other_classes,
        normalize=config.normalize,
        label_smoothing=config.label_smoothing,
        head=config.head_path,
    )


def ssim_options(config: FitConfig) -> dict[str, Any]:
    """How maps are compared, as :func:`camkernels.ssim` takes it."""
    return {name: getattr(config, name) for name in ("window", "window_size", "sigma", "padding")}


def views(config: FitConfig, *key: int) -> ck.RandomResizedCropFlip:
    """What draws the second view, by seed and ``key`` alone, so that a resumed run repeats it."""
    seed = int(generator(config.seed, 9, *key).integers(1 << 62))
    return ck.RandomResizedCropFlip((config.view_scale, 1.0), seed=seed)


def consistency(
    model: nn.Module, layer: str, config: FitConfig, norm_weight: float
) -> ck.CAMConsistencyLoss:
    """Of the maps of ``layer`` and of a second view."""
    return ck.CAMConsistencyLoss(
        model,
        layer,
        alpha=config.alpha,
        beta=norm_weight,
        p=config.norm,
        target=config.target,
        relu=config.map_relu,
        transform=views(config, 0),
        size=(config.image_size, config.image_size),
        distance=config.distance,
        temperature=config.temperature,
        views=config.views,
        label_smoothing=config.label_smoothing,
        **ssim_options(config),
    )


def interpretable(model: nn.Module, config: FitConfig) -> ck.InterpretableGradientLoss:
    """Of the input gradient of a model that was :func:`swapped`."""
    return ck.InterpretableGradientLoss(
        model,
        config.error,  # type: ignore[arg-type]
        config.gradient_weight,
        every=config.every,
        label_smoothing=config.label_smoothing,
    )


def swapped(model: nn.Module, config: FitConfig) -> nn.Module:
    """``model`` with camkernels' modules in place of its own, or on the engine.

    Raises:
        CamtrainError: a network that no engine can run.
    """
    options = {} if config.engine == "off" else {"engine": True, "memory": config.engine}
    try:
        return ck.swap_in(model, **options)  # type: ignore[arg-type]
    except ck.EngineError as error:
        raise CamtrainError(f"engine: {error}") from error
