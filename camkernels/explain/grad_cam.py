"""Grad-CAM of a forward that is made anyway."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from torch import Tensor, nn

from camkernels.functional import MapStatistics
from camkernels.taps.evaluate import Evaluation, Evaluator, ReshapeTransform
from camkernels.taps.modules import LayerLike
from camkernels.taps.tap import Tap
from camkernels.taps.targets import check_logits, class_indices


class GradCAM:
    """Differentiable Grad-CAM maps of a forward that training or inference makes anyway.

    M = relu(sum_k alpha_k A_k), alpha_k = 1/Z sum_ij d y_c / d A_kij, A the output of ``layer``.
    Hooks keep A; nothing else of the model is touched (mode, ``.grad``, buffers, random state),
    and :meth:`close` (or leaving the ``with`` block) removes them.

    Where the head behind the layer is global average pooling and a linear layer, or a stack of
    linear layers and ReLUs, alpha is computed in closed form, exactly and without a backward pass;
    otherwise by autograd with ``create_graph``. ``head`` of the object says which. Under
    ``no_grad`` and ``inference_mode`` maps come out all the same (for a head without closed form
    the part of the forward behind the layer runs with gradients on; in inference mode the
    activations are cloned for it).

    Args:
        model: the classifier; DistributedDataParallel and ``torch.compile`` wrappers are opened.
        layer: name or module, or several of them. Its output is (B, K, h, w).
        relu: keep the positive part of the maps only.
        reshape_transform: maps another output, such as tokens (B, N, D), to (B, K, h, w).
        head: ``"auto"``, ``"autograd"`` (never the closed form) or ``"closed_form"`` (raise where
            there is none).

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
    ) -> None:
        self._single = isinstance(layer, (str, nn.Module))
        self._tap = Tap(model, layer, head)
        self._evaluate = Evaluator(self._tap, relu, reshape_transform)

    def __call__(self, logits: Tensor, targets: Tensor | None = None) -> Tensor | list[Tensor]:
        """Maps of one class per sample.

        Args:
            logits: (B, C), of the latest forward of the model.
            targets: (B,) int64 class indices; the predicted classes where None.

        Returns:
            maps (B, h, w), float32, differentiable; a list of them where several layers were given.

        Raises:
            TapError: no forward, a stale forward, activations changed in place, a layer reached
            not once. IndexError: a class out of range. ValueError, TypeError: wrong shapes, dtypes.
        """
        maps = [evaluation.maps for evaluation in self._evaluations(logits, targets)]
        return maps[0] if self._single else maps

    def statistics(
        self, logits: Tensor, targets: Tensor | None = None
    ) -> MapStatistics | list[MapStatistics]:
        """Statistics of the maps, by the fused kernel; arguments and errors as for the call."""
        found = [evaluation.statistics for evaluation in self._evaluations(logits, targets)]
        return found[0] if self._single else found

    def _evaluations(self, logits: Tensor, targets: Tensor | None) -> list[Evaluation]:
        check_logits(logits)
        classes = logits.detach().argmax(1) if targets is None else class_indices(logits, targets)
        return self._evaluate(logits, classes)

    @property
    def head(self) -> str:
        """``"closed form: ..."`` or ``"autograd: <why>"``, as of the latest forward."""
        return self._tap.describe_head()

    def close(self) -> None:
        """Remove the hooks and let go of the kept activations."""
        self._tap.close()

    def __enter__(self) -> GradCAM:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
