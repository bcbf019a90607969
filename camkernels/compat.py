"""pytorch-grad-cam's call, made by this package's explainers: switch by the import.

::

    from camkernels.compat import ClassifierOutputTarget, GradCAM  # was: from pytorch_grad_cam ...

    with GradCAM(model=model, target_layers=[model.layer4[-1]]) as cam:
        maps = cam(input_tensor=x, targets=[ClassifierOutputTarget(281)])  # NumPy (B, H, W)

Maps are what that library returns: positive parts, scaled to [0, 1], enlarged to the image, the
mean over layers, scaled again. Other than there, the model's mode, its ``.grad`` and its hooks are
as before after the call, and images are explained in one batch. Score-CAM's masks are enlarged
without aligned corners, see :class:`camkernels.ScoreCAM`. ``eigen_smooth`` is not supported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from camkernels import explain
from camkernels.explain._images import ImageMaps, resized
from camkernels.explain._run import Targets
from camkernels.taps.evaluate import ReshapeTransform

__all__ = [
    "ClassifierOutputSoftmaxTarget",
    "ClassifierOutputTarget",
    "GradCAM",
    "GradCAMPlusPlus",
    "HiResCAM",
    "LayerCAM",
    "ScoreCAM",
    "XGradCAM",
]

FACTORS = (0.9, 1.0, 1.1)
"""By which ``aug_smooth`` multiplies images, and their mirror images."""


class ClassifierOutputTarget:
    """The logit of class ``category``."""

    def __init__(self, category: int) -> None:
        self.category = category

    def __call__(self, model_output: Tensor) -> Tensor:
        return model_output[..., self.category]


class ClassifierOutputSoftmaxTarget(ClassifierOutputTarget):
    """The softmax score of class ``category``."""

    def __call__(self, model_output: Tensor) -> Tensor:
        return model_output.softmax(-1)[..., self.category]


class _Compatible:
    _options: ClassVar[dict[str, Any]] = {}
    batch_size: int | None = None
    """Images of one forward, None for all (Score-CAM's masked ones: 32); may be set."""
    outputs: Tensor | None
    """Logits (B, C) of the latest call; None for Score-CAM."""

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module],
        reshape_transform: ReshapeTransform | None = None,
    ) -> None:
        method = getattr(explain, type(self).__name__)
        self.model, self.target_layers = model, list(target_layers)
        self.outputs = None
        self._explainer: ImageMaps = method(
            model, self.target_layers, reshape_transform=reshape_transform, **self._options
        )

    def __call__(
        self,
        input_tensor: Tensor,
        targets: Sequence[Callable[[Tensor], Tensor]] | None = None,
        aug_smooth: bool = False,
        eigen_smooth: bool = False,
    ) -> npt.NDArray[np.float32]:
        """Maps (B, H, W) in [0, 1] of images.

        Args:
            input_tensor: (B, C, H, W); moved to the device of the model.
            targets: per image, what makes a score of its logits (C,); None for the classes
                predicted for it (``aug_smooth``: for each view of it).
            aug_smooth: the mean over the images, three brightnesses of them, and their mirror
                images.
            eigen_smooth: not supported.

        Raises:
            ValueError: eigen_smooth. Else as :meth:`camkernels.GradCAM.explain`.
        """
        if eigen_smooth:
            raise ValueError("eigen_smooth: not supported, got True; expected False")
        parameter = next(self.model.parameters(), None)
        images = input_tensor if parameter is None else input_tensor.to(parameter.device)
        views = [(1.0, False)]
        if aug_smooth:
            views = [(factor, mirrored) for mirrored in (False, True) for factor in FACTORS]
        chosen = _chosen(targets)
        maps = torch.stack([self._maps(images, chosen, *view) for view in views]).mean(0)
        found: npt.NDArray[np.float32] = maps.float().cpu().numpy()
        return found

    def _maps(self, images: Tensor, targets: Targets, factor: float, mirrored: bool) -> Tensor:
        seen: list[Tensor] = []

        def keep(output: Tensor) -> Tensor:
            seen.append(output)
            return output

        view = images if factor == 1.0 else images * factor
        view = view.flip(3) if mirrored else view
        layers = self._explainer.explain(view, targets, batch_size=self.batch_size, logits=keep)
        if not isinstance(self, ScoreCAM):
            self.outputs = torch.cat(seen).detach()
        size = (images.shape[2], images.shape[3])
        alike = [resized(_scaled(one), size) for one in layers]
        fused = _scaled(torch.stack(alike).mean(0))
        return fused.flip(2) if mirrored else fused

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exc: object) -> None:
        self._explainer.close()


def _scaled(maps: Tensor) -> Tensor:
    """As that library scales: in small maps its 1e-7 is seen."""
    if not maps.numel():
        return maps
    above = maps - maps.amin((1, 2), keepdim=True)
    return above / (1e-7 + above.amax((1, 2), keepdim=True))


def _chosen(targets: Sequence[Callable[[Tensor], Tensor]] | None) -> Targets:
    """Classes, whose maps may have a closed form, where all targets are of that kind."""
    if targets is None:
        return None
    if all(type(target).__name__ == "ClassifierOutputTarget" for target in targets):
        return [int(target.category) for target in targets]  # type: ignore[attr-defined]
    return list(targets)


class GradCAM(_Compatible):
    """See :class:`camkernels.GradCAM`."""


class GradCAMPlusPlus(_Compatible):
    """See :class:`camkernels.GradCAMPlusPlus`; with pytorch-grad-cam's eps of 1e-6."""

    _options: ClassVar[dict[str, Any]] = {"eps": 1e-6}


class XGradCAM(_Compatible):
    """See :class:`camkernels.XGradCAM`."""


class LayerCAM(_Compatible):
    """See :class:`camkernels.LayerCAM`."""


class HiResCAM(_Compatible):
    """See :class:`camkernels.HiResCAM`."""


class ScoreCAM(_Compatible):
    """See :class:`camkernels.ScoreCAM`."""
