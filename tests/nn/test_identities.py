"""Identities of the two orders that need no oracle, in float32 at real sizes.

With J the map from a cotangent to the input's gradient (linear at a fixed point) and H the Hessian
of the loss to the input: <h, J g> = <J^T h, g>, and <u, H v> = <v, H u>.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import camkernels as ck
from camkernels import backends
from camkernels.nn import functional as ours

pytestmark = pytest.mark.skipif(
    backends.unavailable_reason("cpu") is not None or backends.triton_interpreted(),
    reason="needs the C++ kernels, in a process that does not interpret Triton",
)
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def inner(a: Tensor, b: Tensor) -> float:
    return float((a.double() * b.double()).sum())


def size(a: Tensor, b: Tensor) -> float:
    return float(a.double().norm() * b.double().norm())


def ops(layout: str, dtype: torch.dtype) -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    x = torch.randn(8, 64, 28, 28).to(dtype).contiguous(memory_format=FORMATS[layout])
    gamma, beta = torch.randn(64), torch.randn(64)
    weight = (torch.randn(64, 64, 3, 3) / 24).to(dtype)
    residual = torch.randn_like(x)
    mean, var = torch.randn(64), torch.rand(64) + 0.5
    return {
        "batch_norm_relu": (
            lambda v: ours.batch_norm_relu(
                v, None, None, gamma, beta, True, residual=residual
            ), x,
        ),
        "batch_norm_relu, evaluation": (
            lambda v: ours.batch_norm_relu(v, mean, var, gamma, beta), x,
        ),
        "conv_bn_act": (
            lambda v: ours.conv_bn_act(
                v, weight, None, None, None, gamma, beta, padding=1, training=True
            ), x,
        ),
        "conv2d": (lambda v: ours.conv2d(v, weight, padding=1, stride=2), x),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(
    "op", ["batch_norm_relu", "batch_norm_relu, evaluation", "conv_bn_act", "conv2d"]
)
def test_the_second_order_is_the_adjoint_of_the_first(
    op: str, layout: str, dtype: torch.dtype
) -> None:
    function, x = ops(layout, dtype)[op]
    x = x.requires_grad_()
    y = function(x)
    g = torch.randn_like(y).requires_grad_()
    (jg,) = torch.autograd.grad(y, x, g, create_graph=True)
    # towards J g, so that the inner product is no sum of noise that cancels
    h = (jg.detach() + 0.1 * jg.detach().std() * torch.randn_like(jg)).requires_grad_(False)
    (adjoint,) = torch.autograd.grad(jg, g, h)
    one, two = inner(h, jg), inner(adjoint, g)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert abs(one) > 0.1 * size(h, jg)
    assert abs(one - two) <= tolerance * size(h, jg), (one, two)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("op", ["batch_norm_relu", "conv_bn_act"])
def test_the_second_order_knows_that_scale_does_not_matter(op: str, layout: str) -> None:
    """L(t x) = L(x) for t > 0 where BatchNorm comes first, so that <g, x> = 0 and H x = -g.

    A Hessian without BatchNorm's own curvature would be symmetric too.
    """
    x = torch.randn(8, 64, 28, 28).contiguous(memory_format=FORMATS[layout]).requires_grad_()
    gamma, beta, weight = torch.randn(64), torch.randn(64), torch.randn(64, 64, 3, 3) / 24
    if op == "conv_bn_act":
        y = ours.conv_bn_act(
            x, weight, None, None, None, gamma, beta, padding=1, training=True, eps=0.0
        )
    else:
        y = ours.batch_norm_relu(x, None, None, gamma, beta, True, eps=0.0)
    loss = (y * torch.randn_like(y)).sum() + y.pow(3).sum() / 3
    (g,) = torch.autograd.grad(loss, x, create_graph=True)
    (hx,) = torch.autograd.grad(g, x, x.detach())
    g = g.detach()
    assert bool(g.any())
    x = x.detach()
    assert abs(inner(g, x)) <= 1e-4 * size(g, x)
    assert float((hx + g).norm()) <= 1e-4 * float(g.norm())


@pytest.mark.parametrize("layout", FORMATS)
def test_the_hessian_of_a_network_is_symmetric(layout: str) -> None:
    torchvision = pytest.importorskip("torchvision", reason="the network is torchvision's")
    model = ck.swap_in(torchvision.models.resnet18(num_classes=10).train())
    model = model.to(memory_format=FORMATS[layout])
    x = torch.randn(8, 3, 96, 96).contiguous(memory_format=FORMATS[layout]).requires_grad_()
    target = torch.arange(8)
    with ck.no_weight_gradients():
        (delta,) = torch.autograd.grad(F.cross_entropy(model(x), target), x, create_graph=True)
        base = delta.detach() / delta.detach().norm()
        u, v = (base + 0.5 * torch.randn_like(x) / x.numel() ** 0.5 for _ in range(2))
        hu, hv = (torch.autograd.grad(delta, x, d, retain_graph=True)[0] for d in (u, v))
    one, two = inner(u, hv), inner(v, hu)
    print(f"{layout}: <u, H v> = {one:.8g}, <v, H u> = {two:.8g}")
    assert bool(hu.any())
    assert abs(one - two) <= 1e-4 * max(size(u, hv), size(v, hu)), (one, two)
