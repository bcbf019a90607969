"""Grad-CAM of a forward that is made anyway."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from camkernels import functional
from camkernels.explain._images import Fusion, ImageMaps, check_fusion, fuse
from camkernels.explain._run import Logits, Targets, chosen, logits_of, make_scores, scores
from camkernels.functional import MapStatistics
from camkernels.taps.evaluate import Evaluation, Evaluator, ReshapeTransform
from camkernels.taps.modules import LayerLike
from camkernels.taps.tap import Tap
from camkernels.taps.targets import check_logits, class_indices
from camkernels.taps.uncompiled import uncompiled


class GradCAM(ImageMaps):
    """Differentiable Grad-CAM maps of a forward that training or inference makes anyway, or of
    images (:meth:`explain`).

    M = relu(sum_k alpha_k A_k), alpha_k = 1/Z sum_ij d y_c / d A_kij, A the output of ``layer``.
    Hooks keep A; nothing else of the model is touched (mode, ``.grad``, buffers, random state),
    and :meth:`close` (or leaving the ``with`` block) removes them.

    Where the head behind the layer is global average pooling and a linear layer, or a stack of
    linear layers and ReLUs, alpha is computed in closed form, exactly and without a backward pass;
    otherwise by autograd with ``create_graph``. ``head`` of the object says which. Under
    ``no_grad`` and ``inference_mode`` maps come out all the same (for a head without closed form
    the part of the forward behind the layer runs with gradients on, on a copy of the activations,
    which a model may write over, as torchvision's DenseNet does).

    Args:
        model: the classifier; DistributedDataParallel and ``torch.compile`` wrappers are opened.
        layer: name or module, or several of them. Its output is (B, K, h, w).
        relu: keep the positive part of the maps only.
        reshape_transform: maps another output, such as tokens (B, N, D), to (B, K, h, w).
        head: ``"auto"``, ``"autograd"`` (never the closed form) or ``"closed_form"`` (raise where
            there is none).
        fusion: how maps of several layers become one: ``"mean"`` or ``"max"`` of them, each scaled
            to [0, 1] and enlarged to the largest, or a callable from maps (L, B, h, w) to
            (B, h, w); None for a list of maps.

    Raises:
        ValueError: an unknown layer (near names are told). TypeError: ``nn.DataParallel``.

    Source: Selvaraju et al., Grad-CAM, eqs. 1 and 2.

    Example:
        >>> import torch, camkernels as ck
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.AdaptiveAvgPool2d(1),
        ...                           torch.nn.Flatten(), torch.nn.Linear(8, 5))
        >>> with ck.GradCAM(net, "0") as cam:
        ...     cam(net(torch.rand(2, 3, 8, 8)), torch.tensor([1, 4])).shape
        torch.Size([2, 6, 6])
    """

    def __init__(
        self,
        model: nn.Module,
        layer: LayerLike | Sequence[LayerLike],
        *,
        relu: bool = True,
        reshape_transform: ReshapeTransform | None = None,
        head: str = "auto",
        fusion: Fusion = None,
    ) -> None:
        check_fusion(fusion)
        self.fusion = fusion
        self._single = isinstance(layer, (str, nn.Module))
        self._tap = Tap(model, layer, head)
        self._evaluate = Evaluator(self._tap, relu, reshape_transform)
        self.model = self._tap.model

    def __call__(self, logits: Tensor, targets: Targets = None) -> Tensor | list[Tensor]:
        """Maps of one score per sample.

        Args:
            logits: (B, C), of the latest forward of the model.
            targets: class indices (B,), a tensor or a sequence; one class for all; the predicted
                classes where None; by autograd, a callable from logits (B, C) to scores (B,), or a
                sequence of callables from an image's logits (C,) to its score.

        Returns:
            maps (B, h, w), float32, differentiable; a list of them where several layers were given
            and no fusion.

        Raises:
            TapError: no forward, a stale forward, activations changed in place, a layer reached
            not once. IndexError: a class out of range. ValueError, TypeError: wrong shapes, dtypes.
        """
        maps = [evaluation.maps for evaluation in self._evaluations(logits, targets)]
        if self.fusion is not None:
            return fuse(maps, self.fusion)
        return maps[0] if self._single else maps

    def statistics(
        self, logits: Tensor, targets: Targets = None
    ) -> MapStatistics | list[MapStatistics]:
        """Statistics of the maps, by the fused kernel; arguments and errors as for the call."""
        found = self._evaluations(logits, targets)
        if self.fusion is not None:
            return functional.map_statistics(fuse([one.maps for one in found], self.fusion))
        statistics = [evaluation.statistics for evaluation in found]
        return statistics[0] if self._single else statistics

    @uncompiled
    def _evaluations(self, logits: Tensor, targets: Targets) -> list[Evaluation]:
        check_logits(logits)
        if isinstance(targets, Tensor):
            return self._evaluate(logits, class_indices(logits, targets))
        if make_scores(targets):
            return self._evaluate(logits, lambda values: scores(values, targets))
        return self._evaluate(logits, chosen(logits, targets))

    def _explain(
        self, images: Tensor, targets: Targets, logits: Logits | None, batch_size: int | None
    ) -> list[Tensor]:
        output = logits_of(self.model(images), logits)
        targets = targets if make_scores(targets) else chosen(output, targets)
        return [evaluation.maps for evaluation in self._evaluations(output, targets)]

    def _forget(self) -> None:
        self._tap.forget()

    @property
    def head(self) -> str:
        """``"closed form: ..."`` or ``"autograd: <why>"``, as of the latest forward."""
        return self._tap.describe_head()

    def close(self) -> None:
        """Remove the hooks and let go of the kept activations."""
        self._tap.close()
