"""How consistent a model's Grad-CAM maps are under a crop and flip: the score, not a loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from camkernels import consistency as C
from camkernels.explain._run import check_images, own_forwards
from camkernels.explain.grad_cam import GradCAM
from camkernels.taps.modules import LayerLike


def consistency_scores(
    model: nn.Module,
    layer: LayerLike,
    images: Tensor,
    boxes: Tensor,
    flips: Tensor | None = None,
    *,
    size: tuple[int, int] | None = None,
    targets: Tensor | None = None,
    relu: bool = False,
    normalize: str = "minmax",
    **ssim_options: Any,
) -> Tensor:
    """SSIM(t(Phi(x)), Phi(t(x))) of each picture: 1 where crop and map commute.

    Runs the model twice, in evaluation mode and without gradients; the mode of every module is put
    back. Maps are without ReLU and scaled to [0, 1], see :class:`camkernels.CAMConsistencyLoss`.

    Args:
        model: the classifier. layer: name or module with output (B, K, h, w).
        images: (B, C, H, W), what the model takes.
        boxes, flips: t, see :func:`camkernels.warp`.
        size: (H, W) of t(x) and of the comparison; None: that of the images.
        targets: (B,) int64, whose maps; None: the classes predicted for x, in both views.
        relu: keep the positive part of maps only. normalize: ``"minmax"`` or ``"none"``.
        ssim_options: ``window``, ``window_size``, ``sigma``, ``padding`` of
            :func:`camkernels.ssim`, and with ``normalize="none"`` its ``data_range``, that of the
            maps.

    Returns:
        (B,) float32, detached. A constant map, which is consistent with itself, counts as it is.

    Raises:
        As :func:`camkernels.warp` and :class:`camkernels.GradCAM`.

    Source: Staying Consistent with GradCAM, section 3.2.2.
    """
    check_images(images)
    if normalize not in ("minmax", "none"):
        raise ValueError(f"normalize: expected 'minmax' or 'none', got {normalize!r}")
    source = (images.shape[2], images.shape[3])
    size = source if size is None else size
    with own_forwards(model), torch.no_grad(), GradCAM(model, layer, relu=relu) as cam:
        views = C.warp(images, boxes, flips, size)
        logits = model(images)
        classes = logits.argmax(1) if targets is None else targets
        found = []
        for output, inputs in ((logits, None), (None, views)):
            maps = cam(model(inputs) if output is None else output, classes)
            assert isinstance(maps, Tensor)
            found.append(C.min_max_normalize(maps) if normalize == "minmax" else maps)
        return C.warped_ssim(
            found[0], found[1], boxes, flips, size, source_size=source, **ssim_options
        )
