"""The other gradient-weighted maps: Grad-CAM++, XGrad-CAM, LayerCAM, HiResCAM, and CAM."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from camkernels import cam_methods as M
from camkernels import functional as F
from camkernels.explain._images import Fusion
from camkernels.explain.grad_cam import GradCAM
from camkernels.taps.evaluate import ReshapeTransform
from camkernels.taps.modules import LayerLike


class _Weighted(GradCAM):
    _method: str
    _default_eps: float

    def __init__(
        self,
        model: nn.Module,
        layer: LayerLike | Sequence[LayerLike],
        *,
        eps: float | None = None,
        relu: bool = True,
        reshape_transform: ReshapeTransform | None = None,
        head: str = "auto",
        fusion: Fusion = None,
    ) -> None:
        added = self._default_eps if eps is None else eps
        if not added >= 0:
            raise ValueError(f"eps: expected a number of at least 0, got {eps}")
        super().__init__(
            model, layer, relu=relu, reshape_transform=reshape_transform, head=head, fusion=fusion
        )
        method = self._method

        def maps(activations: Tensor, gradients: Tensor) -> Tensor:
            weights = M.cam_weights(activations, gradients, method, eps=added)
            return F.class_activation_map(activations, weights, relu=relu)

        self._evaluate.maps = maps


class GradCAMPlusPlus(_Weighted):
    """Grad-CAM++: as :class:`GradCAM`, with channel weights that count positive gradients alone.

    w_k = sum over G > 0 of G / (2 + S_k G + eps / G^2), S_k = sum_ij A_kij.

    Args:
        model, layer, relu, reshape_transform, head, fusion: as for :class:`GradCAM`.
        eps: added to the denominator 2 G^2 + S_k G^3. 0, the default, is the paper's formula; 1e-6
            is what pytorch-grad-cam adds, which is not small beside typical gradients.

    Source: Chattopadhay et al., Grad-CAM++, eqs. 5 and 19.
    """

    _method, _default_eps = "gradcam++", 0.0


class XGradCAM(_Weighted):
    """XGrad-CAM: as :class:`GradCAM`, with gradients weighted by the activations' shares.

    w_k = sum_ij A_kij G_kij / (sum_ij A_kij + eps).

    Args:
        model, layer, relu, reshape_transform, head, fusion: as for :class:`GradCAM`.
        eps: 1e-7 by default, as pytorch-grad-cam adds it.

    Source: Fu et al., Axiom-based Grad-CAM, eq. 7.
    """

    _method, _default_eps = "xgradcam", 1e-7


class _Elementwise(GradCAM):
    _positive: bool

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
        super().__init__(
            model, layer, relu=relu, reshape_transform=reshape_transform, head=head, fusion=fusion
        )
        positive = self._positive

        def maps(activations: Tensor, gradients: Tensor) -> Tensor:
            return M.cam_pixels(activations, gradients, positive=positive, relu=relu)

        self._evaluate.maps = maps


class LayerCAM(_Elementwise):
    """LayerCAM: M = relu(sum_k relu(G_k) A_k); arguments as for :class:`GradCAM`.

    Source: Jiang et al., LayerCAM, eqs. 6 and 7.
    """

    _positive = True


class HiResCAM(_Elementwise):
    """HiResCAM: M = relu(sum_k G_k A_k); arguments as for :class:`GradCAM`.

    Source: Draelos and Carin, HiResCAM, eq. 8.
    """

    _positive = False


class CAM(GradCAM):
    """Class activation maps: :class:`GradCAM` by the closed form of the head.

    M = relu(sum_k W_ck A_k) / Z behind global average pooling and a linear layer. A head without
    closed form raises.

    Source: Zhou et al., Learning deep features for discriminative localization, eq. 2.
    """

    def __init__(self, model: nn.Module, layer: LayerLike, *, relu: bool = True) -> None:
        super().__init__(model, layer, relu=relu, head="closed_form")
