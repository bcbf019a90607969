"""What explainers that are called with images share: modes put back, scores, batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from camkernels.taps.targets import check_logits, class_indices

OneScore = Callable[[Tensor], Tensor]
Targets = Tensor | int | Sequence[int] | Sequence[OneScore] | OneScore | None
"""Class per image as a tensor or a sequence; one class for all; what makes scores (B,) of logits
(B, C); a sequence of what makes one score of an image's logits (C,); or None: the predicted
class."""
Logits = Callable[[Any], Tensor]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def own_forwards(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, in which compiled parts of the model run as they are written: a region that
    was compiled before knows nothing of our hooks, and its ReLUs cannot be guided."""
    with evaluating(model), torch.compiler.set_stance("force_eager"):
        yield


def check_images(images: object) -> Tensor:
    """Raise unless ``images`` is a floating-point tensor (B, C, H, W)."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images: expected a tensor (B, C, H, W), got {type(images).__name__}")
    if not images.is_floating_point():
        raise TypeError(f"images: expected a floating-point dtype, got {images.dtype}")
    if images.dim() != 4:
        raise ValueError(f"images: expected (B, C, H, W), got {tuple(images.shape)}")
    return images


def logits_of(output: Any, accessor: Logits | None) -> Tensor:
    """The logits (B, C) in what a model returned."""
    if accessor is None and not isinstance(output, Tensor):
        raise TypeError(
            f"model: returned {type(output).__name__}; pass logits=, which takes the logits (B, C) "
            "out of it"
        )
    found: Tensor = output if accessor is None else accessor(output)
    check_logits(found)
    return found


def chosen(logits: Tensor, targets: Targets) -> Tensor:
    """Class per image (B,) int64, of targets that are no callable."""
    if targets is None:
        return logits.detach().argmax(1)
    if isinstance(targets, (bool, str)) or not isinstance(targets, (Tensor, int, Sequence)):
        raise TypeError(
            "targets: expected class indices as a tensor, a sequence or one integer, a callable "
            f"from logits to scores (B,), or None; got {type(targets).__name__}"
        )
    if isinstance(targets, int):
        targets = [targets] * len(logits)
    if not isinstance(targets, Tensor):
        targets = torch.tensor(list(targets), dtype=torch.long, device=logits.device)
    return class_indices(logits, targets.to(logits.device))


def make_scores(targets: Targets) -> bool:
    """Whether targets are callables: one, or one per image."""
    if isinstance(targets, (Tensor, str)):
        return False
    some = isinstance(targets, Sequence) and len(targets) > 0
    return callable(targets) or (some and all(callable(target) for target in targets))  # type: ignore[union-attr]


def scores(logits: Tensor, targets: Targets) -> Tensor:
    """What is explained, (B,)."""
    if make_scores(targets):
        if isinstance(targets, Sequence):
            if len(targets) != len(logits):
                raise ValueError(
                    f"targets: expected one per image, {len(logits)}, got {len(targets)}"
                )
            rows = [
                target(row)  # type: ignore[operator]
                for target, row in zip(targets, logits, strict=True)
            ]
            found = torch.stack([torch.as_tensor(row) for row in rows])
        else:
            assert callable(targets)
            found = targets(logits)
        if not isinstance(found, Tensor) or found.shape != logits.shape[:1]:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"targets: expected scores ({len(logits)},) of the callable, got {got}"
            )
        return found
    return logits.gather(1, chosen(logits, targets)[:, None])[:, 0]


def in_batches(
    images: Tensor, targets: Targets, batch_size: int | None
) -> Iterator[tuple[Tensor, Targets]]:
    """Images and their targets, ``batch_size`` at a time (all at once where None)."""
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size: expected a positive number, got {batch_size}")
    per_image = isinstance(targets, (Tensor, Sequence)) and not isinstance(targets, str)
    if per_image and len(targets) != len(images):  # type: ignore[arg-type]
        raise ValueError(
            f"targets: expected one per image, {len(images)}, got {len(targets)}"  # type: ignore[arg-type]
        )
    step = batch_size or max(len(images), 1)
    for start in range(0, max(len(images), 1), step):
        part = slice(start, start + step)
        yield images[part], targets[part] if per_image else targets  # type: ignore[index]
