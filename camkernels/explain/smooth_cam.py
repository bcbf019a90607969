"""Smooth Grad-CAM++: the gradients of Grad-CAM++ averaged over noisy copies of the image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from camkernels import functional
from camkernels.explain._images import Fusion, ImageMaps
from camkernels.explain._noise import check_noise, noisy_copies
from camkernels.explain._run import Logits, Targets, chosen, logits_of, make_scores
from camkernels.explain.grad_cam import GradCAM
from camkernels.taps.evaluate import ReshapeTransform
from camkernels.taps.modules import LayerLike


class SmoothGradCAMPlusPlus(ImageMaps):
    """Smooth Grad-CAM++ maps of images; called by :meth:`explain`.

    With G_s the gradients to the layer for the s-th of n noisy copies, m_p = 1/n sum_s G_s^p their
    mean powers, A the activations of the image itself and S_k = sum_ij A_kij::

        w_k = sum_ij relu(m_1) m_2 / (2 m_2 + S_k m_3 + eps),    M = relu(sum_k w_k A_k)

    where m_1 > 0, which is Grad-CAM++ without noise. One noisy copy of the batch is held at a time;
    classes that ``targets`` leaves open are predicted for the images themselves.

    Args:
        model, layer, relu, reshape_transform, head, fusion: as for :class:`GradCAM`.
        samples, noise, seed: as for :class:`SmoothGrad`.
        eps: at least 0.

    torch-cam's differs: noise in units of the image, relu of the last copy's gradient in place of
    m_1, eps 1e-8.

    Source: Omeiza et al., Smooth Grad-CAM++, eqs. 6 to 8, with m_2 in the numerator, as the
    gradients of Grad-CAM++ have it (eq. 6 prints m_1, which has another unit than its denominator).
    """

    def __init__(
        self,
        model: nn.Module,
        layer: LayerLike | Sequence[LayerLike],
        *,
        samples: int = 25,
        noise: float = 0.15,
        seed: int = 0,
        eps: float = 0.0,
        relu: bool = True,
        reshape_transform: ReshapeTransform | None = None,
        head: str = "auto",
        fusion: Fusion = None,
    ) -> None:
        check_noise(samples, noise)
        if not eps >= 0:
            raise ValueError(f"eps: expected a number of at least 0, got {eps}")
        self._cam = GradCAM(
            model, layer, relu=relu, reshape_transform=reshape_transform, head=head, fusion=fusion
        )
        self._cam._evaluate.maps = self._keep
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self.model, self._single, self.fusion = self._cam.model, self._cam._single, fusion
        self.samples, self.noise, self.seed = samples, noise, seed
        self._eps, self._relu = eps, relu

    def _keep(self, activations: Tensor, gradients: Tensor) -> Tensor:
        self._pairs.append((activations, gradients))
        return activations.new_zeros(len(activations), *activations.shape[2:])

    def _explain(
        self, images: Tensor, targets: Targets, logits: Logits | None, batch_size: int | None
    ) -> list[Tensor]:
        output = logits_of(self.model(images), logits)
        targets = targets if make_scores(targets) else chosen(output, targets)
        clean = self._of(output, targets)
        units = [_unit(gradients) for _, gradients in clean]
        powers: list[list[Tensor]] = [[] for _ in clean]
        for copy in noisy_copies(images, self.samples, self.noise, self.seed):
            output = logits_of(self.model(copy), logits)
            noisy = self._of(output, targets)
            for sums, unit, (_, gradients) in zip(powers, units, noisy, strict=True):
                _add_powers(sums, gradients / unit)
        return [
            self._map(activations, [total / self.samples for total in sums], unit)
            for (activations, _), sums, unit in zip(clean, powers, units, strict=True)
        ]

    def _of(self, output: Tensor, targets: Targets) -> list[tuple[Tensor, Tensor]]:
        """Activations and gradients (B, K, h, w) per layer of the latest forward."""
        self._cam._evaluations(output, targets)
        pairs, self._pairs = self._pairs, []
        self._cam._forget()
        return pairs

    def _map(self, activations: Tensor, means: list[Tensor], unit: Tensor) -> Tensor:
        first, second, third = means
        total = activations.to(first.dtype).sum((2, 3), keepdim=True)
        below = 2 * second + total * third * unit + self._eps / unit**2
        some = (first > 0) & (below != 0)
        share = torch.where(some, first * second / torch.where(some, below, 1.0), 0.0)
        weights = (share * unit).sum((2, 3))
        return functional.class_activation_map(activations, weights, relu=self._relu)

    def _forget(self) -> None:
        self._pairs = []
        self._cam._forget()

    def close(self) -> None:
        """Remove the hooks."""
        self._cam.close()


def _unit(gradients: Tensor) -> Tensor:
    """The largest gradient of each image (B, 1, 1, 1): what powers of them are counted in, lest
    they underflow."""
    wide = gradients if gradients.dtype == torch.float64 else gradients.float()
    highest = wide.abs().amax((1, 2, 3), keepdim=True)
    return torch.where(highest > 0, highest, 1.0)


def _add_powers(sums: list[Tensor], gradients: Tensor) -> None:
    square = gradients * gradients
    powers = (gradients, square, square * gradients)
    if not sums:
        sums.extend(torch.zeros_like(square) for _ in powers)
    for total, power in zip(sums, powers, strict=True):
        total += power
