"""Maps of images: the forwards, batches, sizes and fusion that all CAM explainers share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from camkernels import consistency as C
from camkernels.explain._memory import Budget, images_within
from camkernels.explain._run import Logits, Targets, check_images, in_batches, own_forwards
from camkernels.taps.uncompiled import uncompiled

Fusion = str | Callable[[Tensor], Tensor] | None
"""``"mean"``, ``"max"``, or a callable from maps (L, B, h, w) of L layers to (B, h, w)."""
FUSIONS = ("mean", "max")
Own = TypeVar("Own", bound="ImageMaps")


def check_fusion(fusion: Fusion) -> None:
    if fusion is not None and not callable(fusion) and fusion not in FUSIONS:
        raise ValueError(
            f"fusion: expected one of {', '.join(FUSIONS)}, a callable or None, got {fusion!r}"
        )


def fuse(maps: Sequence[Tensor], fusion: Fusion) -> Tensor:
    """One map (B, h, w) of those of several layers, of the size of the largest, differentiable.

    Each is scaled to [0, 1] first, since layers' maps have scales of their own, and enlarged.
    """
    height, width = (max(m.shape[d] for m in maps) for d in (1, 2))
    alike = torch.stack([resized(C.min_max_normalize(m), (height, width)) for m in maps])
    if callable(fusion):
        fused = fusion(alike)
        if not isinstance(fused, Tensor) or fused.shape != alike.shape[1:]:
            got = tuple(fused.shape) if isinstance(fused, Tensor) else type(fused).__name__
            raise ValueError(
                f"fusion: expected maps {tuple(alike.shape[1:])} of the callable, got {got}"
            )
        return fused
    return alike.mean(0) if fusion == "mean" else alike.amax(0)


def resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (B, h, w), bilinearly at another size."""
    if tuple(maps.shape[1:]) == size:
        return maps
    if not len(maps):
        return maps.new_empty(0, *size)
    return F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]


class ImageMaps(ABC):
    """An explainer that makes maps of images with forwards of its own."""

    model: nn.Module
    _single: bool
    fusion: Fusion = None
    _usual_batch: int | None = None

    @uncompiled
    def explain(
        self,
        images: Tensor,
        targets: Targets = None,
        *,
        size: str | tuple[int, int] = "layer",
        batch_size: int | None = None,
        memory_budget: Budget | None = None,
        logits: Logits | None = None,
    ) -> Tensor | list[Tensor]:
        """Maps of images, by forwards in evaluation mode; every module gets its own mode back.

        Nothing else of the model changes, nothing leaves the device, and nothing is kept: a forward
        that was made before can no longer be explained by this object's call.

        Args:
            images: (B, C, H, W), what the model takes.
            targets: classes (B,), a tensor or a sequence; one class for all; None for the predicted
                classes; a callable from logits (B, C) to scores (B,), or a sequence of callables
                from an image's logits (C,) to its score.
            size: ``"layer"``, ``"input"`` (H, W), or a height and width: maps are enlarged
                bilinearly.
            batch_size: images of one forward; None for all (masked ones of Score-CAM: 32).
            memory_budget: instead of ``batch_size``: bytes, or a text such as ``"512MiB"``, that
                the tensors of one batch may take, as measured on one image. Not counted are the
                images, the maps returned, and workspaces inside a library's call.
            logits: takes the logits (B, C) out of what the model returns, where that is no tensor.

        Returns:
            maps (B, h, w), float32 (float64 for float64), detached; a list of them where several
            layers were given and no fusion.

        Raises:
            TypeError, ValueError: images, targets or options of another kind or shape; a budget
            that one image exceeds. IndexError: a class out of range.
        """
        check_images(images)
        layer_size = _size(size, images)
        if batch_size is not None and memory_budget is not None:
            raise ValueError("batch_size, memory_budget: expected one of them, got both")
        if memory_budget is not None:
            # memory_budget is said to raise where one image does not fit: measured always
            batch_size = self._within(memory_budget, images, targets, logits)
        found: list[list[Tensor]] = []
        with own_forwards(self.model), torch.inference_mode(False), torch.no_grad():
            try:
                for part, classes in in_batches(images, targets, self._images_at_once(batch_size)):
                    maps = self._explain(part, classes, logits, batch_size or self._usual_batch)
                    maps = [fuse(maps, self.fusion)] if self.fusion is not None else maps
                    found.append(
                        maps if layer_size is None else [resized(m, layer_size) for m in maps]
                    )
            finally:
                self._forget()
        joined = [torch.cat(parts).detach() for parts in zip(*found, strict=True)]
        return joined[0] if self._single or self.fusion is not None else joined

    def _within(
        self, budget: Budget, images: Tensor, targets: Targets, logits: Logits | None
    ) -> int | None:
        if not len(images):
            return None
        (one, first), *_ = in_batches(images, targets, 1)
        try:
            with own_forwards(self.model), torch.inference_mode(False), torch.no_grad():
                return images_within(budget, lambda: self._explain(one, first, logits, 1))
        finally:
            self._forget()

    def _images_at_once(self, batch_size: int | None) -> int | None:
        return batch_size

    @abstractmethod
    def _explain(
        self, images: Tensor, targets: Targets, logits: Logits | None, batch_size: int | None
    ) -> list[Tensor]:
        """Maps per layer of a batch; called in evaluation mode and under ``no_grad``."""

    @abstractmethod
    def _forget(self) -> None:
        """Let go of what the last forward left."""

    @abstractmethod
    def close(self) -> None:
        """Remove the hooks and let go of the kept activations."""

    def __enter__(self: Own) -> Own:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _size(size: str | tuple[int, int], images: Tensor) -> tuple[int, int] | None:
    if size == "layer":
        return None
    if size == "input":
        return images.shape[2], images.shape[3]
    if isinstance(size, str) or len(size) != 2 or not all(int(n) == n and n > 0 for n in size):
        raise ValueError(f"size: expected 'layer', 'input' or (height, width), got {size!r}")
    return int(size[0]), int(size[1])
