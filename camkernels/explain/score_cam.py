"""Score-CAM: channels weighed by what the model thinks of the image that each leaves visible."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from camkernels import functional
from camkernels.explain._images import Fusion, ImageMaps, check_fusion, resized
from camkernels.explain._run import Logits, Targets, chosen, logits_of, make_scores, scores
from camkernels.taps.evaluate import ReshapeTransform, spatial
from camkernels.taps.modules import LayerLike, find_layers, unwrap
from camkernels.taps.tap import Tap

SCORES = ("logit", "softmax")


class ScoreCAM(ImageMaps):
    """Score-CAM maps of images; called by :meth:`explain`, without a gradient.

    M = relu(sum_k w_k A_k),  w = softmax over k of y_c(x H_k),  H_k = A_k scaled to [0, 1] and then
    enlarged bilinearly to the image. (Softmax takes out the baseline that the paper subtracts from
    every score.) A channel that is constant over the image leaves nothing of it visible: all of
    them together cost one image.

    Costs one forward of an image per channel. ``memory_format`` is that of the masked images: with
    ``torch.channels_last`` convolutions may run faster (a model that calls ``view`` on feature maps
    cannot take it), and on the CPU, with BatchNorm, those of :func:`camkernels.swap_in` more so.

    Args:
        model: the classifier; DistributedDataParallel and ``torch.compile`` wrappers are opened.
        layer: name or module, or several of them. Its output is (B, K, h, w).
        relu, reshape_transform, fusion: as for :class:`GradCAM`.
        score: what y_c is: the ``"logit"``, as torch-cam and pytorch-grad-cam have it, or the
            ``"softmax"`` score.
        memory_format: of the masked images, None for that of contiguous ones.

    pytorch-grad-cam's differs: it enlarges with corners aligned and scales after that.

    Source: Wang et al., Score-CAM, eqs. 3 to 7 (which scale after enlarging), and torch-cam.

    Example:
        >>> import torch, camkernels as ck
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.AdaptiveAvgPool2d(1),
        ...                           torch.nn.Flatten(), torch.nn.Linear(8, 5))
        >>> with ck.ScoreCAM(net, "0") as cam:
        ...     cam.explain(torch.rand(2, 3, 8, 8), [1, 4]).shape
        torch.Size([2, 6, 6])
    """

    _usual_batch = 32

    def __init__(
        self,
        model: nn.Module,
        layer: LayerLike | Sequence[LayerLike],
        *,
        relu: bool = True,
        reshape_transform: ReshapeTransform | None = None,
        score: str = "logit",
        memory_format: torch.memory_format | None = None,
        fusion: Fusion = None,
    ) -> None:
        check_fusion(fusion)
        if score not in SCORES:
            raise ValueError(f"score: expected one of {', '.join(SCORES)}, got {score!r}")
        self._single = isinstance(layer, (str, nn.Module))
        self.model = unwrap(model)
        self._layers = [name for name, _ in find_layers(self.model, layer)]
        self.fusion, self._relu, self._reshape = fusion, relu, reshape_transform
        self._softmax, self._format = score == "softmax", memory_format or torch.contiguous_format

    def _explain(
        self, images: Tensor, targets: Targets, logits: Logits | None, batch_size: int | None
    ) -> list[Tensor]:
        assert batch_size is not None
        tap = Tap(self.model, self._layers, "autograd", connect=False)
        try:
            output = logits_of(self.model(images), logits)
            pairs = zip(tap.activations(), self._layers, strict=True)
            activations = [spatial(a, name, self._reshape) for a, name in pairs]
        finally:
            tap.close()  # masked images are nobody's forward
        score = self._score(targets if make_scores(targets) else chosen(output, targets))
        maps = []
        for values in activations:
            after = self._masked_scores(images, values, score, logits, batch_size)
            weighted = functional.class_activation_map(values, after.softmax(1), relu=self._relu)
            maps.append(weighted)
        return maps

    def _score(self, targets: Any) -> Callable[[Tensor, Tensor], Tensor]:
        """Scores (N,) in float32 of logits (N, C) and whose they are, (N,)."""

        def score(output: Tensor, owner: Tensor) -> Tensor:
            wide = output if output.dtype == torch.float64 else output.float()
            wide = wide.softmax(1) if self._softmax else wide
            if isinstance(targets, Tensor):
                return scores(wide, targets[owner])
            if isinstance(targets, Sequence):
                return scores(wide, [targets[i] for i in owner.tolist()])
            return scores(wide, targets)

        return score

    def _masked_scores(
        self,
        images: Tensor,
        activations: Tensor,
        score: Callable[[Tensor, Tensor], Tensor],
        logits: Logits | None,
        batch_size: int,
    ) -> Tensor:
        """Scores (B, K) of images (B, C, H, W) of which a channel of (B, K, h, w) leaves a part."""
        batch, channels = activations.shape[:2]
        size = (images.shape[2], images.shape[3])
        low, high = activations.flatten(2).aminmax(dim=2)
        span = high - low
        masks = ((activations - low[..., None, None]) / (span + 1e-8)[..., None, None]).flatten(
            0, 1
        )
        seen = (span != 0).flatten().nonzero()[:, 0]  # NaN too
        blank = logits_of(self.model(images.new_zeros(1, *images.shape[1:])), logits)
        everyone = torch.arange(batch, device=images.device)
        found = score(blank.expand(batch, -1), everyone)[:, None].repeat(1, channels).flatten()
        for part in seen.split(batch_size):
            owner = part // channels
            shape = (len(part), *images.shape[1:])
            masked = torch.empty(
                shape, dtype=images.dtype, device=images.device, memory_format=self._format
            )
            large = resized(masks[part], size).to(images.dtype)[:, None]
            torch.mul(images[owner], large, out=masked)
            found[part] = score(logits_of(self.model(masked), logits), owner)
        return found.view(batch, channels)

    def _images_at_once(self, batch_size: int | None) -> int | None:
        return batch_size or self._usual_batch

    def _forget(self) -> None:
        """Nothing is kept between forwards."""

    def close(self) -> None:
        """Nothing to do: hooks are there during a forward only."""
