"""Several regularisers in one loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from camkernels.losses._common import loss_of
from camkernels.losses.cam_consistency import CAMConsistencyLoss
from camkernels.losses.cam_entropy import CAMEntropyLoss
from camkernels.losses.interpretable_gradient import InterpretableGradientLoss
from camkernels.taps.modules import unwrap
from camkernels.taps.uncompiled import uncompiled

Criterion = CAMEntropyLoss | CAMConsistencyLoss | InterpretableGradientLoss
# Of the cross-entropy: the same in all, since it is counted once.
_SHARED = ("reduction", "label_smoothing", "ignore_index")


class CombinedLoss(nn.Module):
    """The cross-entropy once, plus the weighted regularisers of several criteria.

        L = L_CE + sum_i w_i R_i

    of criteria of one model, by one forward of it::

        criterion = ck.CombinedLoss({
            "entropy": ck.CAMEntropyLoss(model, "layer4", beta=0.1),
            "consistency": ck.CAMConsistencyLoss(model, "layer4", alpha=0.1),
            "gradient": ck.InterpretableGradientLoss(model, weight=1e-2),
        })
        loss = criterion(model(x), y)

    The weights stay those of the criteria (``criterion["entropy"].beta = 0.2``). A
    :class:`CAMConsistencyLoss` makes a second forward and is asked last, so that the others see the
    user's; with ``views="joint"`` the others would be given twice the batch, which is refused.

    Args:
        criteria: name to criterion, of :class:`CAMEntropyLoss`, :class:`CAMConsistencyLoss` and
            :class:`InterpretableGradientLoss`, several of one class among them if need be. Class
            weights, ``ignore_index``, ``label_smoothing`` and ``reduction`` must agree.

    Raises:
        ValueError: no criterion, criteria of several models, options that disagree, two criteria
        with a second forward, ``views="joint"`` beside others. TypeError: something else among
        them.

    Example:
        >>> import torch, camkernels as ck
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.AdaptiveAvgPool2d(1),
        ...                           torch.nn.Flatten(), torch.nn.Linear(8, 5))
        >>> criterion = ck.CombinedLoss({"sharp": ck.CAMEntropyLoss(net, "0", beta=0.1),
        ...                              "small": ck.CAMEntropyLoss(net, "0", 0.1, "area")})
        >>> criterion(net(torch.rand(2, 3, 8, 8)), torch.tensor([1, 4])).backward()
        >>> sorted(criterion.terms)[:3]
        ['cross_entropy', 'sharp/area', 'sharp/dead']
    """

    def __init__(self, criteria: Mapping[str, Criterion]) -> None:
        super().__init__()
        _check(criteria)
        last = [name for name, c in criteria.items() if isinstance(c, CAMConsistencyLoss)]
        names = [name for name in criteria if name not in last]
        # in the order they are asked
        self.criteria = nn.ModuleDict({name: criteria[name] for name in names + last})

    def __getitem__(self, name: str) -> Any:
        """The criterion of a name."""
        return self.criteria[name]

    def __iter__(self) -> Iterator[str]:
        """Names, in the order in which they are asked."""
        return iter(self.criteria)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss.

        Args:
            logits: (B, C), of the latest forward of the model.
            targets: (B,) int64 class indices, or what every criterion takes.

        Returns:
            the loss, 0-dim (per sample (B,) with reduction ``"none"``).

        Raises:
            what the criteria raise.
        """
        return loss_of(*self.parts(logits, targets))

    @uncompiled
    def parts(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """The loss as its cross-entropy and the sum of the weighted regularisers, None where none
        has a weight; see :meth:`forward`."""
        found = [criterion.parts(logits, targets) for criterion in self.criteria.values()]  # type: ignore[operator]
        regularizers = [regularizer for _, regularizer in found if regularizer is not None]
        total = sum(regularizers[1:], regularizers[0]) if regularizers else None
        return found[0][0], total

    @property
    def terms(self) -> dict[str, Tensor]:
        """``cross_entropy``, and every other term of a criterion under ``name/term``."""
        terms: dict[str, Tensor] = {}
        for name, criterion in self.criteria.items():
            for term, value in criterion.terms.items():  # type: ignore[union-attr,operator]
                terms[term if term == "cross_entropy" else f"{name}/{term}"] = value
        return terms

    def close(self) -> None:
        """Close every criterion."""
        for criterion in self.criteria.values():
            criterion.close()  # type: ignore[operator]


def _check(criteria: Mapping[str, Criterion]) -> None:
    if not criteria:
        raise ValueError("criteria: expected at least one, got none")
    for name, criterion in criteria.items():
        if not isinstance(criterion, Criterion):
            raise TypeError(
                f"criteria: expected CAMEntropyLoss, CAMConsistencyLoss or "
                f"InterpretableGradientLoss, got {type(criterion).__name__} as {name!r}"
            )
    first_name, first = next(iter(criteria.items()))
    for name, criterion in criteria.items():
        if _model(criterion) is not _model(first):
            raise ValueError(
                f"criteria: {first_name!r} and {name!r} are criteria of different models"
            )
        for option in _SHARED:
            one, other = getattr(first, option), getattr(criterion, option)
            if one != other:
                raise ValueError(
                    f"{option}: the cross-entropy is counted once, so all criteria must agree; "
                    f"{first_name!r} has {one!r}, {name!r} has {other!r}"
                )
        if not _equal(_class_weight(first), _class_weight(criterion)):
            raise ValueError(
                f"weight: {first_name!r} and {name!r} have different class weights, and the "
                "cross-entropy is counted once"
            )
    again = {n: c for n, c in criteria.items() if isinstance(c, CAMConsistencyLoss)}
    if len(again) > 1:
        raise ValueError(
            f"criteria: {', '.join(map(repr, again))} would each make a second forward of their "
            "own; take one CAMConsistencyLoss"
        )
    for name, criterion in again.items():
        if criterion.views == "joint" and len(criteria) > 1:
            raise ValueError(
                f"views: {name!r} joins pictures and views in one forward, in which the other "
                "criteria would see both; take views='separate'"
            )


def _model(criterion: Criterion) -> nn.Module:
    return unwrap(criterion._tap.model)


def _class_weight(criterion: Criterion) -> Tensor | None:
    if isinstance(criterion, InterpretableGradientLoss):
        return criterion.class_weight
    return criterion.weight


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)
