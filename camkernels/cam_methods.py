"""The public functions behind Grad-CAM++, XGrad-CAM, LayerCAM and HiResCAM, over tensors."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from camkernels import backends
from camkernels.ops import _validate
from camkernels.ops.cam_pixels import reference as _pixels_reference
from camkernels.ops.cam_pixels.op import cam_pixels_fwd
from camkernels.ops.cam_weights import reference as _weights_reference
from camkernels.ops.cam_weights.op import cam_weights_fwd


def _pair(activations: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    a, g = _validate.activations_and_gradients(activations, gradients)
    if a.dtype != g.dtype:
        raise TypeError(
            f"gradients: expected the dtype of the activations, {a.dtype}, got {g.dtype}"
        )
    return a, g


def cam_weights(
    activations: Tensor, gradients: Tensor, method: str = "gradcam++", *, eps: float = 0.0
) -> Tensor:
    """Channel weights of Grad-CAM++ and XGrad-CAM; a map is ``class_activation_map`` of them.

    With S_k = sum_ij A_kij::

        "gradcam++"   w_k = sum over G > 0 of G / (2 + S_k G + eps / G^2)
        "xgradcam"    w_k = sum_ij A_kij G_kij / (S_k + eps)

    Args:
        activations: A (B, K, h, w), float32, bfloat16, float16, or float64 (CPU).
        gradients: G, of the shape and dtype of A.
        method: one of the names above.
        eps: at least 0; 1e-6 and 1e-7 are what pytorch-grad-cam adds.

    Returns:
        weights (B, K), float32 (float64 for float64), differentiable in both; NaN where a value of
        the channel is not finite.

    Raises:
        TypeError: dtypes without a kernel, or that differ. ValueError: an unknown method, shapes or
        devices that disagree, a negative eps. BackendUnavailableError: the backend named by
        ``ck.backend`` cannot take the tensors.

    Source: Chattopadhay et al., Grad-CAM++, eqs. 5 and 19; Fu et al., Axiom-based Grad-CAM, eq. 7.

    Example:
        >>> import torch, camkernels as ck
        >>> ck.cam_weights(torch.ones(1, 1, 1, 2), torch.tensor([[[[1.0, -1.0]]]]))
        tensor([[0.2500]])
    """
    if method not in _weights_reference.METHODS:
        allowed = ", ".join(_weights_reference.METHODS)
        raise ValueError(f"method: unknown {method!r}, allowed are {allowed}")
    if not eps >= 0:
        raise ValueError(f"eps: expected a number of at least 0, got {eps}")
    a, g = _pair(activations, gradients)
    chosen = "" if torch.compiler.is_compiling() else backends.resolve(a.device, a.dtype)
    if chosen == "reference":
        return _weights_reference.cam_weights(a, g, method, float(eps))
    return cast(Tensor, cam_weights_fwd(a, g, method, float(eps), backend=chosen))


def cam_pixels(
    activations: Tensor, gradients: Tensor, *, positive: bool = True, relu: bool = True
) -> Tensor:
    """Maps of LayerCAM (``positive``) and HiResCAM: sum_k f(G_k) A_k, f(g) = max(g, 0) or g.

    Args:
        activations: A (B, K, h, w), float32, bfloat16, float16, or float64 (CPU).
        gradients: G, of the shape and dtype of A.
        positive: keep positive gradients only.
        relu: keep the positive part of the maps only.

    Returns:
        maps (B, h, w), float32 (float64 for float64), differentiable in both.

    Raises:
        As :func:`cam_weights`.

    Source: Jiang et al., LayerCAM, eqs. 6 and 7; Draelos and Carin, HiResCAM, eq. 8.

    Example:
        >>> import torch, camkernels as ck
        >>> ck.cam_pixels(torch.ones(1, 2, 1, 1), torch.tensor([[[[3.0]], [[-1.0]]]]))
        tensor([[[3.]]])
    """
    a, g = _pair(activations, gradients)
    chosen = "" if torch.compiler.is_compiling() else backends.resolve(a.device, a.dtype)
    if chosen == "reference":
        return _pixels_reference.cam_pixels_fwd(a, g, positive, relu)
    return cast(Tensor, cam_pixels_fwd(a, g, positive, relu, backend=chosen))
