"""BatchNorm, residual add and ReLU in plain PyTorch: the oracle of the kernels beside it.

Shapes: z (N, C, H, W); everything per channel is (C,), in float32 (float64 for float64 z);
M = the count of values that the statistics were taken over (inv_count = 1/M; 0 in evaluation mode,
where they are constants), mean and rstd = (variance + eps)^(-1/2); gamma, beta None: no affine.

    zhat = (z - mean) rstd,  u = gamma zhat + beta (+ residual),  a = relu(u) or u

First order, g the cotangent of a (guided: its positive part where there is a ReLU):
    g_u = 1[u > 0] g,  S_g = sum g_u (= dbeta),  S_gz = sum g_u zhat (= dgamma)
    g'  = g_u - (S_g + zhat S_gz) / M,  cotangent of z: gamma rstd g',  of residual: g_u
Second order, h the cotangent of the cotangent of z, h_s that of the residual's, c_gamma and c_beta
those of dgamma and dbeta:
    S_h = sum h, S_hz = sum h zhat, Q = sum h g',  h' = h - (S_h + zhat S_hz) / M
    cotangent of g:     1[u > 0] (gamma rstd h' + h_s + c_gamma zhat + c_beta)
    cotangent of z:     -(gamma rstd^2 / M) (S_gz h' + S_hz g' + Q zhat) + rstd c_gamma g'
    cotangent of gamma: rstd Q

As in PyTorch a NaN counts as positive in 1[u > 0], so that it stays visible.

A mask keeps 1[u > 0] where u cannot be recomputed from z alone (a residual was added): one bit per
element, least significant bit first, each row of memory padded to whole bytes. A row is one plane
of H W pixels of contiguous z, one pixel of C channels of channels_last z; the mask is uint8
(rows, ceil(length / 8)).

Source: Ioffe and Szegedy, Batch Normalization; He et al., Deep Residual Learning.
"""

from __future__ import annotations

import torch
from torch import Tensor

from camkernels.ops import _layout


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def channelwise(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)


def rows(z: Tensor) -> Tensor:
    """z dense in its layout, as (rows, length) in the order of memory."""
    if _layout.is_channels_last(z):
        return z.permute(0, 2, 3, 1).flatten(0, 2)
    return z.reshape(z.shape[0] * z.shape[1], z.shape[2] * z.shape[3])


def pack_mask(positive: Tensor) -> Tensor:
    """Bits of a bool tensor (N, C, H, W), row by row of its memory."""
    flat = rows(positive)
    padded = torch.nn.functional.pad(flat, (0, -flat.shape[1] % 8)).unflatten(1, (-1, 8))
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], device=flat.device)
    return (padded.long() * weights).sum(2).to(torch.uint8)


def unpack_mask(mask: Tensor, like: Tensor) -> Tensor:
    """1[u > 0] as a bool tensor of the shape and layout of ``like``."""
    shifts = torch.arange(8, device=mask.device)
    bits = (mask[:, :, None].long() >> shifts) & 1
    n, c, h, w = like.shape
    if _layout.is_channels_last(like):
        flat = bits.flatten(1)[:, :c].reshape(n, h, w, c).permute(0, 3, 1, 2)
    else:
        flat = bits.flatten(1)[:, : h * w].reshape(n, c, h, w)
    return flat.bool()


def like_layout(values: Tensor, z: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``values`` in the dtype and dense layout of z."""
    layout = _layout.memory_format(_layout.is_channels_last(z))
    return values.to(dtype or z.dtype).contiguous(memory_format=layout)


def normalized(z: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """zhat."""
    return (wide(z) - channelwise(mean)) * channelwise(rstd)


def affine(zhat: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    u = zhat if gamma is None else zhat * channelwise(gamma)
    return u if beta is None else u + channelwise(beta)


def batch_norm_relu(
    z: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    relu: bool,
) -> Tensor:
    """The op as a formula that autograd differentiates to any order. mean None: batch statistics,
    the variance biased, as PyTorch normalises with it."""
    values = wide(z)
    if mean is None or var is None:
        mean = values.mean((0, 2, 3))
        var = (values - channelwise(mean)).square().mean((0, 2, 3))
    u = affine((values - channelwise(mean)) * channelwise((var + eps).rsqrt()), gamma, beta)
    u = u if residual is None else u + wide(residual)
    return (u.relu() if relu else u).to(z.dtype)


def bn_stats(z: Tensor) -> tuple[Tensor, Tensor]:
    """mean (C,), and the sum of squared deviations from it (C,); both 0 of an empty batch."""
    values = wide(z)
    mean = values.mean((0, 2, 3)) if z.numel() else values.sum((0, 2, 3))
    return mean, (values - channelwise(mean)).square().sum((0, 2, 3))


def bn_fwd(
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    want_mask: bool,
) -> tuple[Tensor, Tensor]:
    """a, in dtype and layout of z; and the mask (an empty uint8 tensor unless wanted)."""
    u = affine(normalized(z, mean, rstd), gamma, beta)
    u = u if residual is None else u + wide(residual)
    open_ = like_layout(~(u <= 0), z, torch.bool)
    mask = pack_mask(open_) if want_mask else u.new_empty(0)
    return like_layout(u.relu() if relu else u, z), mask.to(torch.uint8)


def _masked(
    grad: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mask: Tensor | None,
    relu: bool,
    guided: bool,
) -> Tensor:
    values = wide(grad)
    if not relu:
        return values
    if mask is not None and mask.numel():
        positive = unpack_mask(mask, z)
    else:
        positive = ~(affine(normalized(z, mean, rstd), gamma, beta) <= 0)
    values = values.clamp(min=0) if guided else values
    return torch.where(positive, values, 0.0)


def bn_bwd_reduce(
    grad: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mask: Tensor | None,
    relu: bool,
    guided: bool,
) -> Tensor:
    """(2, C): S_g and S_gz."""
    grad_u = _masked(grad, z, mean, rstd, gamma, beta, mask, relu, guided)
    zhat = normalized(z, mean, rstd)
    return torch.stack([grad_u.sum((0, 2, 3)), (grad_u * zhat).sum((0, 2, 3))])


def bn_bwd(
    grad: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mask: Tensor | None,
    sums: Tensor,
    inv_count: float,
    relu: bool,
    guided: bool,
    scaled: bool,
    addend: Tensor | None,
    want_residual: bool,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """The cotangent of z: g', or gamma rstd g' if ``scaled``, plus ``addend``; and g_u, the
    cotangent of the residual (empty unless wanted). In dtype and layout of z.

    Args:
        sums: (2, C) of bn_bwd_reduce (summed over processes where statistics are shared).
        addend: another cotangent of z, of its shape; only with ``scaled``.
        inplace: grad is in dtype and layout of z, and nobody else's: one of the results, that of
            the residual where it is wanted, is written over it.
    """
    grad_u = _masked(grad, z, mean, rstd, gamma, beta, mask, relu, guided)
    zhat = normalized(z, mean, rstd)
    out = grad_u - (channelwise(sums[0]) + zhat * channelwise(sums[1])) * inv_count
    if scaled:
        out = out * channelwise(rstd if gamma is None else gamma * rstd)
    if addend is not None:
        out = out + wide(addend)
    residual = like_layout(grad_u, z) if want_residual else z.new_empty(0)
    out = like_layout(out, z)
    if inplace and want_residual:
        residual = grad.copy_(residual)
    elif inplace:
        out = grad.copy_(out)
    return out, residual


def bn_bwd_bwd_reduce(
    grad_grad: Tensor, grad_prime: Tensor, z: Tensor, mean: Tensor, rstd: Tensor
) -> Tensor:
    """(3, C): S_h, S_hz, Q of h = grad_grad and g' = grad_prime."""
    h, zhat = wide(grad_grad), normalized(z, mean, rstd)
    products = (h, h * zhat, h * wide(grad_prime))
    return torch.stack([p.sum((0, 2, 3)) for p in products])


def bn_bwd_bwd(
    grad_grad: Tensor,
    grad_grad_residual: Tensor | None,
    grad_prime: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mask: Tensor | None,
    sums: Tensor,
    grad_sums: Tensor,
    inv_count: float,
    c_gamma: Tensor | None,
    c_beta: Tensor | None,
    relu: bool,
    inplace: bool,
    reuse_prime: bool = False,
) -> tuple[Tensor, Tensor]:
    """Cotangents of g and of z, both in dtype and layout of z.

    Args:
        grad_grad: h, of the dtype and layout of z; with ``inplace`` the first result takes its
            memory.
        reuse_prime: the second result takes the memory of ``grad_prime``.
        sums: (2, C) of the first backward.
        grad_sums: (3, C) of bn_bwd_bwd_reduce.
        c_gamma, c_beta: (C,) cotangents of dgamma and dbeta, or None.
    """
    zhat, scale = normalized(z, mean, rstd), rstd if gamma is None else gamma * rstd
    h = wide(grad_grad)
    h = h - (channelwise(grad_sums[0]) + zhat * channelwise(grad_sums[1])) * inv_count
    to_grad = h * channelwise(scale)
    if grad_grad_residual is not None:
        to_grad = to_grad + wide(grad_grad_residual)
    if c_gamma is not None:
        to_grad = to_grad + zhat * channelwise(c_gamma)
    if c_beta is not None:
        to_grad = to_grad + channelwise(c_beta)
    to_grad = _masked(to_grad, z, mean, rstd, gamma, beta, mask, relu, False)
    to_z = channelwise(sums[1]) * h + channelwise(grad_sums[1]) * wide(grad_prime)
    to_z = (to_z + channelwise(grad_sums[2]) * zhat) * channelwise(-scale * rstd * inv_count)
    if c_gamma is not None:
        to_z = to_z + channelwise(rstd * c_gamma) * wide(grad_prime)
    to_grad, to_z = like_layout(to_grad, z), like_layout(to_z, z)
    to_z = grad_prime.copy_(to_z) if reuse_prime else to_z
    return (grad_grad.copy_(to_grad) if inplace else to_grad), to_z
