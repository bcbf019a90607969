"""Consistency and sparsity of explanations as regularisers of cross-entropy training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from camkernels import consistency as C
from camkernels import modes
from camkernels.losses._common import check_choice, loss_of, reduce
from camkernels.losses._contrast import contrast
from camkernels.losses._trivial import trivial
from camkernels.taps.evaluate import Evaluator, ReshapeTransform
from camkernels.taps.image_tap import ImageTap
from camkernels.taps.modules import LayerLike
from camkernels.taps.tap import Tap
from camkernels.taps.targets import check_logits, class_indices
from camkernels.taps.uncompiled import uncompiled
from camkernels.taps.views import Draw, RandomResizedCropFlip, View

_TARGETS = ("predicted", "true")
_DISTANCES = ("ssim", "contrastive")
_NORMALIZATIONS = ("minmax", "none")
_VIEWS = ("separate", "joint")


class CAMConsistencyLoss(nn.Module):
    """Cross-entropy, the inconsistency of Grad-CAM maps under a crop and flip, and their norm.

        L = L_CE + alpha (1 - SSIM(t(Phi(x)), Phi(t(x)))) + beta L^p(Phi(x))

    Phi(x) is the Grad-CAM map of ``layer``, without ReLU, scaled to [0, 1] and enlarged to the
    picture; t crops, resizes and mirrors each sample in its own way. It stands in the place of
    ``nn.CrossEntropyLoss``; the view t(x) and its forward are the criterion's own affair::

        criterion = ck.CAMConsistencyLoss(model, layer="layer4", alpha=0.1, beta=1e-6)
        loss = criterion(model(x), y)
        loss.backward()

    **The second forward** runs in the mode the model is in: in training BatchNorm normalises the
    views by their own statistics and moves its running statistics twice a step, and dropout draws
    again. ``views="joint"`` sends both through one forward of twice the batch: one update, of
    statistics over pictures and views together; the model must return a single tensor.

    **Trivial solutions.** A map that says the same everywhere is consistent with itself.
    ``terms["dead"]`` is the share of samples with an all-zero map in either view (lower ``beta`` or
    ``alpha``). ``terms["uniform"]`` is that of maps of the pictures which are nearly constant
    (their range is below a hundredth of their largest value) or cover the picture (their mean is
    above 0.8 once they are scaled to [0, 1]; raise ``beta``, or lower ``alpha``). Dead samples have
    no gradient and are left out of the means.

    Args:
        model: the classifier; DistributedDataParallel is opened. It is held, not registered.
        layer: name or module with output (B, K, h, w).
        alpha: weight of the consistency, settable later. With 0 no second view is made where
            gradients are on; without them the consistency is measured all the same.
        beta: weight of the sparsity, settable later; the norm is over all pixels of the enlarged
            map. p: its order, at least 1, or 0 (a count, which has no gradient).
        transform: what draws t: None for ``RandomResizedCropFlip()`` (scale 0.08 to 1, ratio 3/4
            to 4/3, flip 0.5), another one, or a callable (batch, height, width) -> (boxes, flips).
            Recorded parameters go to the call instead.
        target: the map of the ``"predicted"`` class of x, in both views, or of the ``"true"`` one.
        relu: keep the positive part of maps only; the paper found all maps dying of it.
        normalize: ``"minmax"`` or ``"none"``.
        size: (H, W) of the view and of the comparison; None: that of the images.
        distance: ``"ssim"``, or ``"contrastive"``: the InfoNCE loss of CGC over the batch, of the
            cosines of t(Phi(x_i)) and Phi(t(x_j)) over ``temperature``.
        views: ``"separate"`` or ``"joint"``, see above.
        window, window_size, sigma, padding: of :func:`camkernels.ssim`.
        data_range: of :func:`camkernels.ssim`, the range of the compared maps: 1 for maps scaled to
            [0, 1], as ``normalize="minmax"`` makes them. Raw maps (``"none"``) need their own, say
            the span of the first batches': with 1, small ones vanish beside SSIM's constants C1 and
            C2, look all alike, and have next to no gradient. Of the contrastive distance it changes
            only the SSIM that is reported.
        weight, ignore_index, reduction, label_smoothing: as for ``nn.CrossEntropyLoss``; ignored
            samples have no consistency. input: name or position of the model's argument that holds
            the images. reshape_transform, head: as for :class:`camkernels.GradCAM`.

    Raises:
        ValueError: an unknown layer or option, a negative p, a ``data_range`` that is not positive.
        TypeError: ``nn.DataParallel``.

    Source: Staying Consistent with GradCAM, eqs. 2 to 4; Pillai et al., Consistent Explanations by
    Contrastive Learning (the contrastive distance).

    Example:
        >>> import torch, camkernels as ck
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.AdaptiveAvgPool2d(1),
        ...                           torch.nn.Flatten(), torch.nn.Linear(8, 5))
        >>> criterion = ck.CAMConsistencyLoss(net, "0", alpha=0.1, beta=1e-3)
        >>> criterion(net(torch.rand(2, 3, 16, 16)), torch.tensor([1, 4])).backward()
        >>> sorted(criterion.terms)
        ['consistency', 'cross_entropy', 'dead', 'sparsity', 'uniform']
    """

    weight: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        layer: LayerLike,
        alpha: float = 0.1,
        beta: float = 1e-6,
        p: float = 1.0,
        transform: RandomResizedCropFlip | Draw | None = None,
        target: str = "predicted",
        relu: bool = False,
        normalize: str = "minmax",
        *,
        size: tuple[int, int] | None = None,
        distance: str = "ssim",
        temperature: float = 0.5,
        views: str = "separate",
        window: C.Window = "gaussian",
        window_size: int = 11,
        sigma: float = 1.5,
        padding: C.Padding = "valid",
        data_range: float = 1.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        input: int | str | None = None,
        reshape_transform: ReshapeTransform | None = None,
        head: str = "auto",
    ) -> None:
        super().__init__()
        check_choice("target", target, _TARGETS)
        check_choice("normalize", normalize, _NORMALIZATIONS)
        check_choice("distance", distance, _DISTANCES)
        check_choice("views", views, _VIEWS)
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        for name, value in (("alpha", alpha), ("beta", beta)):
            if not math.isfinite(value):
                raise ValueError(f"{name}: expected a finite number, got {value!r}")
        if not temperature > 0:
            raise ValueError(f"temperature: expected a positive number, got {temperature!r}")
        C.check_order(p)
        if not isinstance(layer, (str, nn.Module)):
            raise ValueError("layer: expected a single layer, got several")
        self._window: dict[str, Any] = {
            "window": window, "window_size": window_size, "sigma": sigma, "padding": padding,
        }  # fmt: skip
        C.check_window(**self._window, data_range=data_range)
        self.alpha, self.beta, self.p = alpha, beta, p
        self.data_range = data_range
        self.transform = RandomResizedCropFlip() if transform is None else transform
        self.target, self.relu, self.normalize = target, relu, normalize
        self.size, self.distance, self.temperature = size, distance, temperature
        self.views = views
        self.ignore_index, self.reduction = ignore_index, reduction
        self.label_smoothing = label_smoothing
        self.register_buffer("weight", weight)
        self._tap = Tap(model, layer, head)
        join = self._join if views == "joint" else None
        self._images = ImageTap(model, input, join)
        self._evaluate = Evaluator(self._tap, relu, reshape_transform)
        self._drawn: View | None = None
        self._next: tuple[Tensor, Tensor | None] | None = None
        self._terms: dict[str, Tensor] = {}
        self._scores: Tensor | None = None

    # -- views ---------------------------------------------------------------------------------

    def _draw(self, images: Tensor) -> View:
        found = self.transform(images.shape[0], images.shape[2], images.shape[3])
        if len(found) != 2 or not all(isinstance(part, Tensor) for part in found):
            got = ", ".join(type(part).__name__ for part in found)
            raise TypeError(
                f"transform: expected it to return two tensors, boxes and flips, got {got}"
            )
        return View(*found).to(images.device)

    def _view(
        self, images: Tensor, boxes: Tensor | None = None, flips: Tensor | None = None
    ) -> View:
        """Parameters for these images: of their joint forward, or given, or waiting, or drawn. The
        one place where they are checked, also where no view is made of them."""
        if images.dim() != 4:
            raise ValueError(f"images: expected (B, C, H, W), got {tuple(images.shape)}")
        if boxes is None and flips is not None:
            raise ValueError("flips: recorded parameters need boxes too, got none")
        if boxes is not None and self.views == "joint":
            raise ValueError(
                "boxes: with views='joint' they must be known before the forward; call "
                "criterion.use(boxes, flips) before model(x)"
            )
        if self._images.joined is not None:
            assert self._drawn is not None  # by _join
            return self._drawn
        given = self._next if boxes is None else (boxes, flips)
        try:
            return View(*C.check_view(*(self._draw(images) if given is None else given), images))
        except (TypeError, ValueError):
            self._next = None  # or a refused one would be refused at every later forward
            raise

    def _make(self, images: Tensor, view: View) -> Tensor:
        with torch.no_grad():
            made = C.warp(images.detach(), *view, size=self._size(images))
        if torch.is_grad_enabled() and images.requires_grad and not modes.is_unread(images):
            made.requires_grad_()  # reentrant checkpoints hand gradients on only then
        last = images.is_contiguous(memory_format=torch.channels_last)
        return made.contiguous(memory_format=torch.channels_last) if last else made

    def _size(self, images: Tensor) -> tuple[int, int]:
        return self.size or (images.shape[2], images.shape[3])

    def _join(self, images: Tensor) -> Tensor:
        """The views, for a forward of both."""
        view = self._view(images)
        if self._size(images) != tuple(images.shape[2:]):
            raise ValueError(
                f"size: views in one forward have the size of the images, {tuple(images.shape[2:])}"
                f", got {self.size}"
            )
        self._drawn = view
        return self._make(images, view)

    def use(self, boxes: Tensor, flips: Tensor | None = None) -> None:
        """Take these parameters at the next forward in place of drawn ones; for
        ``views="joint"``, where they must be known before the forward. That forward raises where
        they do not fit its images, and forgets them."""
        self._next = boxes, flips

    # -- the loss ------------------------------------------------------------------------------

    def forward(
        self,
        logits: Tensor,
        targets: Tensor,
        boxes: Tensor | None = None,
        flips: Tensor | None = None,
    ) -> Tensor:
        """The loss.

        Args:
            logits: (B, C), of the latest forward of the model.
            targets: (B,) int64 class indices; class probabilities (B, C) with
                ``target="predicted"``.
            boxes, flips: recorded parameters of this batch's views, see :func:`camkernels.warp`;
                None: drawn.

        Returns:
            the loss, 0-dim (per sample (B,) with reduction ``"none"``).

        Raises:
            TapError: no forward, or a stale one. ValueError, TypeError: wrong shapes or dtypes, or
            parameters of another batch.
        """
        return loss_of(*self.parts(logits, targets, boxes, flips))

    @uncompiled
    def parts(
        self,
        logits: Tensor,
        targets: Tensor,
        boxes: Tensor | None = None,
        flips: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The loss as its cross-entropy and the weighted rest, None where both weights are 0; see
        :meth:`forward`."""
        check_logits(logits)
        images = self._images.latest(logits)
        self._evaluate.check_device(logits)
        classes, valid = self._classes(logits, targets)
        view = self._view(images, boxes, flips)
        enabled = torch.is_grad_enabled()
        cross_entropy = nn.functional.cross_entropy(
            logits, targets, self.weight, ignore_index=self.ignore_index,
            reduction=self.reduction, label_smoothing=self.label_smoothing,
        )  # fmt: skip
        with torch.set_grad_enabled(enabled and (self.alpha != 0 or self.beta != 0)):
            compared = self.alpha != 0 or not enabled
            raw, other = self._maps(logits, classes, images, view, compared)
            first = self._normalized(raw)
            dead, uniform = trivial(raw)
            weighted: list[Tensor] = []
            terms = {"cross_entropy": cross_entropy.detach().clone().mean()}
            if other is not None:
                dead = dead | trivial(other)[0]
                distance, self._scores = self._distance(
                    first, self._normalized(other), view, images, valid & ~dead
                )
                weighted += [self.alpha * distance] if self.alpha != 0 else []
                terms["consistency"] = reduce(self._scores, valid & ~dead, "mean")
        with torch.set_grad_enabled(enabled and self.beta != 0):
            norms = C.lp_norm(first, self.p, size=(images.shape[2], images.shape[3]))
            sparsity = reduce(norms, valid & ~dead, self.reduction)
        if self.beta != 0:
            weighted.append(self.beta * sparsity)
        count = valid.sum().clamp(min=1)
        self._terms = terms | {
            "sparsity": reduce(norms.detach(), valid & ~dead, "mean"),
            "dead": (valid & dead).sum() / count,
            "uniform": (valid & uniform).sum() / count,
        }
        self._images.forget()
        self._next = self._drawn = None
        return cross_entropy, sum(weighted[1:], weighted[0]) if weighted else None

    def _classes(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Whose map: class per sample (B,), and which samples count (B,) bool."""
        indices = isinstance(targets, Tensor) and not targets.is_floating_point()
        valid = torch.ones(logits.shape[0], dtype=torch.bool, device=logits.device)
        if indices or self.target == "true":
            classes = class_indices(logits, targets, self.ignore_index)
            valid = targets != self.ignore_index
        if self.target == "predicted":
            classes = logits.detach().argmax(1)
        return classes, valid

    def _maps(
        self, logits: Tensor, classes: Tensor, images: Tensor, view: View, compared: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Maps of the pictures, and of the views where they are ``compared`` or there already."""
        joined = self._images.joined
        if joined is not None:
            maps = self._evaluate(joined, classes.repeat(2))[0].maps
            first, second = maps.chunk(2)
            return first, second
        first = self._evaluate(logits, classes)[0].maps
        if not compared:
            return first, None
        views = self._make(images, view)
        return first, self._evaluate(self._images.again(views), classes)[0].maps

    def _normalized(self, maps: Tensor) -> Tensor:
        return C.min_max_normalize(maps) if self.normalize == "minmax" else maps

    def _distance(
        self, first: Tensor, second: Tensor, view: View, images: Tensor, counted: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The distance, reduced, and the SSIM of each sample, detached."""
        source, size = (images.shape[2], images.shape[3]), self._size(images)
        contrastive = self.distance == "contrastive"
        with torch.set_grad_enabled(torch.is_grad_enabled() and not contrastive):
            scores = C.warped_ssim(
                first, second, *view, size,
                source_size=source, data_range=self.data_range, **self._window,
            )  # fmt: skip
        if contrastive:
            warped = C.warp(first, *view, size, source_size=source)
            values = contrast(warped, second, counted, self.temperature)
        else:
            values = 1 - scores
        return reduce(values, counted, self.reduction), scores.detach()

    # -- reading -------------------------------------------------------------------------------

    @property
    def terms(self) -> dict[str, Tensor]:
        """Parts of the last loss, detached and 0-dim, for logging.

        ``cross_entropy``; ``consistency``: mean SSIM over live samples (absent where ``alpha`` is
        0 and gradients were on); ``sparsity``: their mean norm, before beta; ``dead`` and
        ``uniform``: shares of samples.
        Empty before the first call.
        """
        if self._terms:
            self._evaluate.read_guard()
        return dict(self._terms)

    @property
    def consistency(self) -> Tensor:
        """SSIM of each sample of the last call, (B,), detached."""
        if self._scores is None:
            raise RuntimeError("consistency: the criterion has not compared any views yet")
        return self._scores

    @property
    def head(self) -> str:
        """``"closed form: ..."`` or ``"autograd: <why>"``, as of the latest forward."""
        return self._tap.describe_head()

    def close(self) -> None:
        """Remove the hooks from the model and let go of what is kept."""
        self._tap.close()
        self._images.close()

    def extra_repr(self) -> str:
        return (
            f"layer={self._tap.names}, alpha={self.alpha}, beta={self.beta}, p={self.p}, "
            f"target={self.target!r}, distance={self.distance!r}, views={self.views!r}"
        )

    def __getstate__(self) -> Mapping[str, object]:
        return {**self.__dict__, "_terms": {}, "_scores": None, "_drawn": None, "_next": None}
