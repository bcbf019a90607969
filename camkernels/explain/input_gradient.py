"""Explanations in the pixels of the image: input gradients, plain, guided, averaged over noise."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from camkernels import modes
from camkernels.explain._memory import Budget, bytes_of, images_within
from camkernels.explain._noise import check_noise, noisy_copies
from camkernels.explain._run import (
    Logits,
    Targets,
    check_images,
    chosen,
    in_batches,
    logits_of,
    make_scores,
    own_forwards,
    scores,
)
from camkernels.explain.grad_cam import GradCAM
from camkernels.nn._guided import GuidedReLUs, has_guidable
from camkernels.taps.evaluate import ReshapeTransform
from camkernels.taps.modules import LayerLike, unwrap
from camkernels.taps.uncompiled import uncompiled


class InputGradient:
    """d score / d image of a classifier.

    Runs a forward of its own in evaluation mode, and leaves nothing behind: every module's mode,
    ``.grad``, BatchNorm's statistics and the random state are as before. No gradient of a weight is
    computed.

    Args:
        model: the classifier; DistributedDataParallel and ``torch.compile`` wrappers are opened.
        batch_size: images of one forward, None for all. memory_budget: instead of it, see
            :meth:`GradCAM.explain`.
        logits: takes the logits (B, C) out of what the model returns, where that is no tensor.

    Source: Simonyan et al., Deep inside convolutional networks, section 3.

    Example:
        >>> import torch, camkernels as ck
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(),
        ...                           torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        >>> ck.InputGradient(net)(torch.rand(2, 3, 8, 8), [1, 4]).shape
        torch.Size([2, 3, 8, 8])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        batch_size: int | None = None,
        memory_budget: Budget | None = None,
        logits: Logits | None = None,
    ) -> None:
        if batch_size is not None and memory_budget is not None:
            raise ValueError("batch_size, memory_budget: expected one of them, got both")
        self.model = unwrap(model)
        self.batch_size = batch_size
        self.memory_budget = memory_budget if memory_budget is None else bytes_of(memory_budget)
        self._logits = logits

    @uncompiled
    def __call__(self, images: Tensor, targets: Targets = None) -> Tensor:
        """Gradients of one score per image.

        Args:
            images: (B, C, H, W), what the model takes.
            targets: as for :meth:`GradCAM.explain`.

        Returns:
            (B, C, H, W) in the dtype of the images, detached.

        Raises:
            TypeError, ValueError: images or targets of another kind or shape. IndexError: a class
            out of range. RuntimeError: the score does not depend on the images.
        """
        check_images(images)
        found = []
        with own_forwards(self.model), torch.inference_mode(False), torch.enable_grad():
            for part, classes in in_batches(images, targets, self._batch(images, targets)):
                found.append(self._gradients(part, classes))
        return torch.cat(found)

    def _batch(self, images: Tensor, targets: Targets) -> int | None:
        if self.memory_budget is None or not len(images):
            return self.batch_size
        (one, first), *_ = in_batches(images, targets, 1)
        return images_within(self.memory_budget, lambda: self._gradients(one, first))

    def _gradients(self, images: Tensor, targets: Targets) -> Tensor:
        leaf = images.detach().clone().requires_grad_()
        return self._backward(self._forward(leaf), leaf, targets)

    def _forward(self, leaf: Tensor) -> Tensor:
        return logits_of(self.model(leaf), self._logits)

    def _backward(self, logits: Tensor, leaf: Tensor, targets: Targets) -> Tensor:
        score = scores(logits, targets).sum()
        if not score.requires_grad:
            raise RuntimeError(
                "the score does not depend on the images: the model, or targets, detaches them"
            )
        with modes.no_weight_gradients():
            (gradient,) = torch.autograd.grad(score, leaf)
        return gradient


class GuidedBackprop(InputGradient):
    """Input gradients by guided backpropagation: at each ReLU 1[u > 0] max(grad, 0).

    Works on any model whose ReLUs are modules or functions called from Python: they are replaced
    during its forward only, and nothing of the model is changed. A network without ReLU is told by
    a warning: its guided gradient is the plain one. Arguments and errors as for
    :class:`InputGradient`.

    Source: Springenberg et al., Striving for Simplicity: The All Convolutional Net, sec. 3.4.
    """

    def _forward(self, leaf: Tensor) -> Tensor:
        with GuidedReLUs() as relus:
            logits = super()._forward(leaf)
        if relus.count == 0 and not has_guidable(self.model):
            warnings.warn(
                f"{type(self.model).__name__} calls no ReLU from Python: its guided gradient is "
                "the plain one",
                stacklevel=5,
            )
        return logits

    def _backward(self, logits: Tensor, leaf: Tensor, targets: Targets) -> Tensor:
        with modes.guided():
            return super()._backward(logits, leaf, targets)


class GuidedGradCAM(GuidedBackprop):
    """Guided gradients times the Grad-CAM map, enlarged to the image; both of one forward.

    Args:
        model, batch_size, memory_budget, logits: as for :class:`InputGradient`.
        layer, reshape_transform, head: as for :class:`GradCAM`; one layer.

    Source: Selvaraju et al., Grad-CAM, section 3.2.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: LayerLike,
        *,
        batch_size: int | None = None,
        memory_budget: Budget | None = None,
        logits: Logits | None = None,
        reshape_transform: ReshapeTransform | None = None,
        head: str = "auto",
    ) -> None:
        super().__init__(model, batch_size=batch_size, memory_budget=memory_budget, logits=logits)
        self._layer, self._reshape, self._head = layer, reshape_transform, head
        GradCAM(self.model, layer, head=head).close()  # an unknown layer is told here

    def _gradients(self, images: Tensor, targets: Targets) -> Tensor:
        leaf = images.detach().clone().requires_grad_()
        with GradCAM(
            self.model, self._layer, reshape_transform=self._reshape, head=self._head
        ) as cam:
            logits = self._forward(leaf)
            if not make_scores(targets):
                targets = chosen(logits, targets)
            maps = cam(logits, targets)
            assert isinstance(maps, Tensor)
        guided = self._backward(logits, leaf, targets)
        size = (images.shape[2], images.shape[3])
        enlarged = F.interpolate(maps.detach()[:, None], size, mode="bilinear", align_corners=False)
        return guided * enlarged.to(guided.dtype)


class SmoothGrad:
    """The mean of another explainer's gradients over noisy copies of each image.

    Args:
        explainer: :class:`InputGradient`, :class:`GuidedBackprop`, or a model, for the first.
        samples: noisy copies.
        noise: standard deviation of the Gaussian noise, as a share of each image's range.
        seed: of a generator of its own, on the device of the images; the same call gives the same
            result, and an image the same in any batch.

    One copy of the batch is held at a time. Where ``targets`` is None the classes predicted for
    the clean images are taken.

    Source: Smilkov et al., SmoothGrad: removing noise by adding noise, eq. 1 and section 3.1.
    """

    def __init__(
        self,
        explainer: InputGradient | nn.Module,
        *,
        samples: int = 25,
        noise: float = 0.15,
        seed: int = 0,
    ) -> None:
        check_noise(samples, noise)
        if isinstance(explainer, nn.Module):
            explainer = InputGradient(explainer)
        if not isinstance(explainer, InputGradient):
            raise TypeError(
                "explainer: expected InputGradient, GuidedBackprop or a model, got "
                f"{type(explainer).__name__}"
            )
        self.explainer = explainer
        self.samples, self.noise, self.seed = samples, noise, seed

    @uncompiled
    def __call__(self, images: Tensor, targets: Targets = None) -> Tensor:
        """As the explainer's call; the mean is taken in float32 (float64 for float64)."""
        check_images(images)
        if targets is None:
            targets = self._predicted(images)
        wide = images.dtype if images.dtype == torch.float64 else torch.float32
        total = torch.zeros_like(images, dtype=wide)
        for copy in noisy_copies(images, self.samples, self.noise, self.seed):
            total += self.explainer(copy, targets)
        return (total / self.samples).to(images.dtype)

    def _predicted(self, images: Tensor) -> Tensor:
        explainer = self.explainer
        found = []
        with own_forwards(explainer.model), torch.no_grad():
            for part, _ in in_batches(images, None, explainer._batch(images, None)):
                logits = logits_of(explainer.model(part), explainer._logits)
                found.append(logits.argmax(1))
        return torch.cat(found)
