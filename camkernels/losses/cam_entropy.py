"""CAM entropy as a regulariser of cross-entropy training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from camkernels import functional as F
from camkernels.losses._common import check_choice, loss_of, reduce
from camkernels.taps.evaluate import Evaluation, Evaluator, ReshapeTransform
from camkernels.taps.modules import LayerLike
from camkernels.taps.tap import Tap
from camkernels.taps.targets import check_logits, class_indices
from camkernels.taps.uncompiled import uncompiled

# The sign with which each statistic is minimised: sharper maps have less entropy, less area and
# more dispersion.
_SIGNS = {"entropy": 1.0, "area": 1.0, "dispersion": -1.0}
_TARGETS = ("true", "predicted")
_REDUCTIONS = ("mean", "sum", "none")


class CAMEntropyLoss(nn.Module):
    """Cross-entropy plus a measure of how spread out the Grad-CAM maps of ``layer`` are.

        l = cross_entropy(logits, targets) + beta r(M_c)

    with r the CAM entropy ce, the ellipsoidal area ca, or minus the dispersion cd, and M_c the map
    of each sample's class. It stands in the place of ``nn.CrossEntropyLoss`` and uses the forward
    that training makes anyway::

        criterion = ck.CAMEntropyLoss(model, layer="layer4", beta=100.0)
        loss = criterion(model(x), y)
        loss.backward()

    The mean of r is taken over live maps: an all-zero map has r = 0, which would pass for
    success. ``terms["dead"]`` is the share of dead ones; watch it.

    Args:
        model: the classifier; DistributedDataParallel and ``torch.compile`` wrappers are opened. It
            is held, not registered: its parameters are not the criterion's.
        layer: name or module with output (B, K, h, w); r is averaged over several.
        beta: weight of r, settable later. With 0 the loss is the cross-entropy alone, to the bit,
            and the terms are still measured.
        regularizer: ``"entropy"``, ``"area"`` or ``"dispersion"``.
        target: the map of the ``"true"`` class or of the ``"predicted"`` one.
        other_classes: weight of the paper's negative term, for data where only the true class is
            present: minus ``other_classes`` times the mean of r over the maps of all other classes.
            In closed form it costs one matrix product, by autograd C backward passes of the head.
        normalize: divide the entropy by ln(h w), its largest value.
        weight, ignore_index, reduction, label_smoothing: as for ``nn.CrossEntropyLoss``; class
            weights and smoothing act on the cross-entropy, ignored samples have no map. With
            reduction ``"sum"`` and ``"none"`` r is summed, or kept per sample (0 for dead maps).
        reshape_transform: maps another output, such as tokens (B, N, D), to (B, K, h, w).
        head: ``"auto"``: the Jacobian of the head in closed form where it is pooling and a
            linear/ReLU stack, else autograd; ``"autograd"``; or ``"closed_form"``: raise where
            there is none.

    Raises:
        ValueError: an unknown layer (near names are told) or option.
        TypeError: ``nn.DataParallel``.

    Source: Schoettl, A light-weight method to foster the (Grad)CAM interpretability, eqs. 1 to 6.

    Example:
        >>> import torch, camkernels as ck
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.AdaptiveAvgPool2d(1),
        ...                           torch.nn.Flatten(), torch.nn.Linear(8, 5))
        >>> criterion = ck.CAMEntropyLoss(net, "0", beta=0.1)
        >>> criterion(net(torch.rand(2, 3, 8, 8)), torch.tensor([1, 4])).backward()
        >>> criterion.head
        'closed form: pool -> linear'
    """

    weight: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        layer: LayerLike | Sequence[LayerLike],
        beta: float = 1.0,
        regularizer: str = "entropy",
        target: str = "true",
        other_classes: float = 0.0,
        normalize: bool = False,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        reshape_transform: ReshapeTransform | None = None,
        head: str = "auto",
    ) -> None:
        super().__init__()
        check_choice("regularizer", regularizer, tuple(_SIGNS))
        check_choice("target", target, _TARGETS)
        check_choice("reduction", reduction, _REDUCTIONS)
        for name, value in (("beta", beta), ("other_classes", other_classes)):
            if not math.isfinite(value):
                raise ValueError(f"{name}: expected a finite number, got {value!r}")
        self.beta = beta
        self.regularizer = regularizer
        self.target = target
        self.other_classes = other_classes
        self.normalize = normalize
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.register_buffer("weight", weight)
        self._tap = Tap(model, layer, head)
        if other_classes and len(self._tap.names) > 1:
            self._tap.close()
            raise ValueError("other_classes: expected a single layer, got several")
        self._evaluate = Evaluator(self._tap, True, reshape_transform)
        self._single = isinstance(layer, (str, nn.Module))
        self._terms: _Terms | None = None

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss.

        Args:
            logits: (B, C), of the latest forward of the model.
            targets: (B,) int64 class indices; class probabilities (B, C) with
                ``target="predicted"``.

        Returns:
            the loss, 0-dim (per sample (B,) with reduction ``"none"``).

        Raises:
            TapError: no forward, a stale forward, activations changed in place, a layer that the
            forward reached not once. IndexError: a class out of range. ValueError, TypeError:
            wrong shapes or dtypes.
        """
        return loss_of(*self.parts(logits, targets))

    @uncompiled
    def parts(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """The loss as its cross-entropy and beta r, None where beta is 0; see :meth:`forward`."""
        check_logits(logits)
        self._evaluate.check_device(logits)
        classes, valid = self._classes(logits, targets)
        # With beta = 0 the maps are measured, and nothing may reach the gradient: not even 0 * NaN.
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.beta != 0):
            evaluations = self._evaluate(logits, classes)
            regularizer = self._regularizer(evaluations, valid)
            if self.other_classes:
                regularizer = regularizer - self.other_classes * self._others(
                    logits, classes, valid
                )
        cross_entropy = nn.functional.cross_entropy(
            logits,
            targets,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )
        self._terms = _Terms(cross_entropy, regularizer, evaluations, valid, self.normalize)
        return cross_entropy, None if self.beta == 0 else self.beta * regularizer

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

    def _measure(self, statistics: F.MapStatistics, pixels: int) -> Tensor:
        value: Tensor = getattr(statistics, self.regularizer)
        if self.normalize and self.regularizer == "entropy":
            value = F.normalize_entropy(value, pixels)
        return _SIGNS[self.regularizer] * value

    def _regularizer(self, evaluations: list[Evaluation], valid: Tensor) -> Tensor:
        found = []
        for evaluation in evaluations:
            value = self._measure(evaluation.statistics, _pixels(evaluation.maps))
            found.append(reduce(value, valid & evaluation.statistics.live, self.reduction))
        return found[0] if len(found) == 1 else torch.stack(found).mean(0)

    def _others(self, logits: Tensor, classes: Tensor, valid: Tensor) -> Tensor:
        statistics, pixels, counted = self._evaluate.other_classes(logits, classes)
        value = self._measure(statistics, pixels).view(counted.shape)
        counted = counted & valid[:, None] & statistics.live.view(counted.shape)
        if self.reduction == "mean":
            return reduce(value, counted, "mean")
        # per sample: the mean over its other classes
        kept = torch.where(counted, value, 0.0).sum(1) / counted.sum(1).clamp(min=1)
        return kept.sum() if self.reduction == "sum" else kept

    @property
    def terms(self) -> dict[str, Tensor]:
        """Parts of the last loss, detached and 0-dim, for logging.

        ``cross_entropy`` and ``regularizer`` (before beta) as reduced (their means for reduction
        ``"none"``); ``entropy``, ``area``, ``dispersion``: means over live maps; ``dead``: the
        share of maps that are all zero; ``live``: how many are not. Empty before the first call.
        """
        if self._terms is None:
            return {}
        self._evaluate.read_guard()
        return self._terms.compute()

    @property
    def maps(self) -> Tensor | list[Tensor]:
        """Maps (B, h, w) of the last call, detached; a list where several layers were given."""
        return self._last("maps")

    @property
    def statistics(self) -> F.MapStatistics | list[F.MapStatistics]:
        """:class:`MapStatistics` of the last call, per sample, detached."""
        return self._last("statistics")

    def _last(self, name: str):  # type: ignore[no-untyped-def]
        if self._terms is None:
            raise RuntimeError(f"{name}: the criterion has not been called yet")
        found = [getattr(evaluation, name) for evaluation in self._terms.evaluations]
        return found[0] if self._single else found

    @property
    def head(self) -> str:
        """``"closed form: ..."`` or ``"autograd: <why>"``, as of the latest forward."""
        return self._tap.describe_head()

    def close(self) -> None:
        """Remove the hooks from the model and let go of the kept activations."""
        self._tap.close()

    def extra_repr(self) -> str:
        return (
            f"layer={self._tap.names}, beta={self.beta}, regularizer={self.regularizer!r}, "
            f"target={self.target!r}, other_classes={self.other_classes}"
        )

    def __getstate__(self) -> Mapping[str, object]:
        return {**self.__dict__, "_terms": None}  # tensors of a graph neither copy nor pickle


class _Terms:
    """What the last call measured; means are taken when read, so that a step does not pay."""

    def __init__(
        self,
        cross_entropy: Tensor,
        regularizer: Tensor,
        evaluations: list[Evaluation],
        valid: Tensor,
        normalize: bool,
    ) -> None:
        # a copy: the loss may be it, and users divide losses in place
        self.cross_entropy = cross_entropy.detach().clone()
        self.regularizer = regularizer.detach()
        self.evaluations = [
            Evaluation(F.MapStatistics(*(s.detach() for s in e.statistics)), e.maps.detach())
            for e in evaluations
        ]
        self.valid = valid
        self.normalize = normalize

    def compute(self) -> dict[str, Tensor]:
        terms = {
            "cross_entropy": self.cross_entropy.mean(),
            "regularizer": self.regularizer.mean(),
        }
        per_layer = [dict(self._of_layer(e)) for e in self.evaluations]
        for name in per_layer[0]:
            terms[name] = torch.stack([values[name] for values in per_layer]).mean(0)
        return terms

    def _of_layer(self, evaluation: Evaluation) -> Iterator[tuple[str, Tensor]]:
        statistics = evaluation.statistics
        live = self.valid & statistics.live
        for name in _SIGNS:
            value = getattr(statistics, name)
            if name == "entropy" and self.normalize:
                value = F.normalize_entropy(value, _pixels(evaluation.maps))
            yield name, reduce(value, live, "mean")
        count = live.sum(dtype=statistics.mean.dtype)
        yield "dead", 1 - count / self.valid.sum().clamp(min=1)
        yield "live", count


def _pixels(maps: Tensor) -> int:
    return maps.shape[1] * maps.shape[2]
