"""conv_bn_act on the CPU where no gradient is recorded and the statistics are constants.

    relu(bn(conv(x, W) + b) + s) = relu(conv(x, k W) + (b - mean) k + beta + s),  k = gamma rstd

BatchNorm is in the weights, sum and ReLU are written over the output: so the convolution's output
is the only memory that is taken, and one pass over it is left where there is no residual. Where
weights outnumber the images' elements, to scale them would cost more than it saves, and BatchNorm
comes after the convolution.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from camkernels.ops.batch_norm_relu import norm
from camkernels.ops.conv2d.op import ConvSpec, convolve

_DTYPES = (torch.float32, torch.float64)  # others would round the weights once more


@dataclasses.dataclass(frozen=True)
class Constants:
    """What evaluation mode normalises by, (K,) each."""

    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor
    var: Tensor
    eps: float


def is_suited(x: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
    """Whether nothing is recorded.

    On a GPU the BatchNorm kernel takes sum and ReLU along, and nothing is gained.
    """
    if x.device.type != "cpu" or x.dtype not in _DTYPES:
        return False
    given = (x, weight, *others)
    return not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given))


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    constants: Constants,
    residual: Tensor | None,
    relu: bool,
    conv: ConvSpec,
) -> Tensor:
    """x (N, C, H, W), weight (K, C / groups, kh, kw), bias (K,), residual of the output's shape.

    Raises:
        ValueError: a residual of another shape.
    """
    gamma, beta, mean, var = (
        None if value is None else value.to(x.dtype)
        for value in (constants.gamma, constants.beta, constants.mean, constants.var)
    )
    assert mean is not None
    assert var is not None
    if weight.numel() > x.numel():
        y = convolve(x, weight, bias, conv)
        y = F.batch_norm(y, mean, var, gamma, beta, training=False, eps=constants.eps)
    else:
        scale = (var + constants.eps).rsqrt()
        scale = scale if gamma is None else scale * gamma
        shift = (-mean if bias is None else bias - mean) * scale
        shift = shift if beta is None else shift + beta
        y = convolve(x, weight * scale.view(-1, 1, 1, 1), shift, conv)
    y = norm.dense(y)
    norm.check_residual(residual, y)
    if residual is not None:
        y = y.add_(residual)
    return y.relu_() if relu else y
