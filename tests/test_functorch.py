"""torch.func over the public functions, cell by cell: right, or a clear refusal; never zeros.

``TABLE`` is the table of the documentation: (transform, backend) to what happens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import camkernels as ck
from camkernels import backends

A = torch.rand(2, 3, 3, 4, generator=torch.Generator().manual_seed(0)).double()
G = torch.rand(2, 3, 3, 4, generator=torch.Generator().manual_seed(1)).double()
STACK = torch.stack((A, 2 * A + 0.1, A.square()))


def score(a: Tensor, g: Tensor = G) -> Tensor:
    """All of the public functions in one number."""
    statistics, maps = ck.cam_statistics(a, g, return_maps=True)
    weighted = ck.class_activation_map(a, g.mean((2, 3)))
    return (
        statistics.entropy.sum()
        + statistics.area.sum()
        + maps.square().sum()
        + ck.map_statistics(weighted).dispersion.sum()
    )


def per_map(a: Tensor, g: Tensor) -> Tensor:
    return ck.cam_statistics(a, g).area + ck.cam_entropy(ck.grad_cam(a, g))


def dual(a: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(score(forward_ad.make_dual(a, A))).tangent


TRANSFORMS: dict[str, Callable[[], Any]] = {
    "grad": lambda: grad(score, argnums=(0, 1))(A, G),
    "grad of grad": lambda: grad(lambda a: grad(score, argnums=1)(a, G).square().sum())(A),
    "jacrev": lambda: jacrev(ck.grad_cam)(A, G),
    "jacrev of jacrev": lambda: jacrev(jacrev(score))(A),
    "vmap": lambda: vmap(per_map)(STACK, torch.stack((G, G + 1, G.sqrt()))),
    "vmap over activations only": lambda: vmap(per_map, in_dims=(0, None))(STACK, G),
    "vmap over gradients only": lambda: vmap(per_map, in_dims=(None, 0))(A, STACK),
    "vmap over an inner dimension": lambda: vmap(per_map, in_dims=(2, None))(
        STACK.movedim(0, 2), G
    ),
    "per-sample gradients": lambda: vmap(grad(lambda a, g: score(a[None], g[None])))(A, G),
    "jvp": lambda: jvp(score, (A,), (A,))[1],
    "jacfwd": lambda: jacfwd(score)(A),
    "hessian": lambda: hessian(score)(A),
    "dual numbers": lambda: dual(A),
}
FORWARD_MODE = ("jvp", "jacfwd", "hessian", "dual numbers")
TABLE = {
    (transform, backend): "raises"
    if transform in FORWARD_MODE and backend != "reference"
    else "right"
    for transform in TRANSFORMS
    for backend in ("reference", "cpu")
}


def eager_loop(transform: str) -> Any:
    """The same by the plain formula, where a loop or autograd can say it."""
    with ck.backend("reference"):
        if transform.startswith("vmap"):
            pairs = {
                "vmap": zip(STACK, (G, G + 1, G.sqrt()), strict=True),
                "vmap over activations only": ((a, G) for a in STACK),
                "vmap over gradients only": ((A, g) for g in STACK),
                "vmap over an inner dimension": ((a, G) for a in STACK),
            }[transform]
            return torch.stack([per_map(a, g) for a, g in pairs])
        if transform == "per-sample gradients":
            rows = []
            for a, g in zip(A, G, strict=True):
                leaf = a[None].clone().requires_grad_()
                rows.append(torch.autograd.grad(score(leaf, g[None]), leaf)[0][0])
            return torch.stack(rows)
        a, g = A.clone().requires_grad_(), G.clone().requires_grad_()
        if transform == "grad":
            return torch.autograd.grad(score(a, g), (a, g))
        if transform in ("jvp", "dual numbers"):
            return (torch.autograd.grad(score(a, g), a)[0] * A).sum()
        if transform == "jacfwd":
            return torch.autograd.grad(score(a, g), a)[0]
        if transform == "jacrev":
            return torch.autograd.functional.jacobian(lambda x: ck.grad_cam(x, G), A)
        if transform == "grad of grad":
            (to_g,) = torch.autograd.grad(score(a, g), g, create_graph=True)
            return torch.autograd.grad(to_g.square().sum(), a)[0]
        return torch.autograd.functional.hessian(score, A)


@pytest.mark.parametrize(("transform", "backend"), TABLE)
def test_table(transform: str, backend: str) -> None:
    reason = backends.unavailable_reason(backend)
    if reason is not None:
        pytest.skip(f"backend {backend}: {reason}")
    with ck.backend(backend):  # type: ignore[arg-type]
        if TABLE[transform, backend] == "raises":
            with pytest.raises(NotImplementedError, match=r"forward-mode.*camkernels::.*reverse"):
                TRANSFORMS[transform]()
            return
        found = TRANSFORMS[transform]()
    expected = eager_loop(transform)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    first = expected[0] if isinstance(expected, tuple) else expected
    assert bool(first.any())
