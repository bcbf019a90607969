"""What the network functions keep in a graph and how many convolutions they run; hooks on what is
saved, checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nn import eager
from nn.chain import LAYOUTS, PLANES, SIDE, C, images, mine, network, parameters, sides
from ops.oracle import storages
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import camkernels as ck
from camkernels import backends
from camkernels.nn import functional as ours

pytestmark = pytest.mark.skipif(
    backends.triton_interpreted() or backends.unavailable_reason("cpu") is not None,
    reason="needs the C++ kernels, in a process that does not interpret Triton",
)


# ---- memory ----


class Saved:
    """Bytes of what is saved inside the block, by storage."""

    def __enter__(self) -> Saved:
        self.tensors: list[Tensor] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)
        self._hooks.__enter__()
        return self

    def _pack(self, tensor: Tensor) -> Tensor:
        self.tensors.append(tensor)
        return tensor

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def full(self, itemsize: int) -> dict[int, int]:
        return {a: n for a, n in storages(self.tensors).items() if n >= PLANES * itemsize}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_bytes(layout: str, dtype: torch.dtype) -> None:
    p = {n: t.requires_grad_() for n, t in parameters(dtype).items()}
    x = images(layout, dtype).requires_grad_()
    x = x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x

    def unit(x: Tensor, i: int, **options: Any) -> Tensor:
        return ours.conv_bn_act(
            x, p[f"w{i}"], None, None, None, p[f"g{i}"], p[f"b{i}"], padding=1, training=True,
            **options,
        )  # fmt: skip

    size = PLANES * x.itemsize
    with Saved() as plain:
        y = unit(unit(unit(x, 0), 1), 2)
    kept = plain.full(x.itemsize)
    assert list(kept.values()) == [size] * 4, "x and the z of three ops"
    with ck.no_weight_gradients(), Saved() as again:
        cotangent = eager.signed(y.shape, 1, dtype)
        (delta,) = torch.autograd.grad(y, x, cotangent, create_graph=True)
    new = {a: n for a, n in again.full(x.itemsize).items() if a not in kept}
    assert list(new.values()) == [size] * 3, "one g' for each of three ops"
    del delta
    with Saved() as residual:
        unit(x, 0, residual=x)
    masks = [t for t in residual.tensors if t.dtype == torch.uint8]
    bits = 2 * C * -(-SIDE * SIDE // 8) if layout == "contiguous" else 2 * SIDE * SIDE * -(-C // 8)
    assert list(residual.full(x.itemsize).values()) == [size] * 2, "x and z"
    assert [m.numel() for m in masks] == [bits]
    with Saved() as alone:
        ours.conv2d(ours.batch_norm_relu(x * 1, None, None, p["g0"], p["b0"], True), p["w1"])
    assert list(alone.full(x.itemsize).values()) == [size], "z alone serves both"


class Carried:
    """Saved tensors are carried elsewhere: as copies, or as NumPy arrays that forget strides."""

    def __init__(self, how: str) -> None:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(
            (lambda t: t.detach().cpu().clone())
            if how == "copies"
            else (
                lambda t: (
                    t.detach().numpy().tobytes("C")
                    and (t.dtype, t.shape, t.detach().contiguous().clone())
                )
            ),
            (lambda t: t) if how == "copies" else (lambda kept: kept[2].clone()),
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("how", ["copies", "without strides"])
def test_saved_tensors_may_be_carried_elsewhere(how: str, layout: str) -> None:
    tensors, truth, cotangent = sides(layout)
    with Carried(how).hooks:
        eager.assert_same(eager.two_orders(mine, tensors, cotangent), truth, 1e-9)


@pytest.mark.parametrize("order", [1, 2])
def test_checkpoint(order: int) -> None:
    tensors, truth, cotangent = sides()

    def function(x: Tensor, **p: Tensor) -> Tensor:
        return checkpoint(lambda v: network(ours, v, p), x, use_reentrant=False)

    found = eager.two_orders(function, tensors, cotangent, order=order)
    eager.assert_same(found, {n: truth[n] for n in found}, 1e-9)


# ---- convolution passes ----


def test_seven_passes_per_convolution() -> None:
    """Forward, guided D, plain D, and F + W + D + W of the backward of the loss."""
    p = {n: t.requires_grad_() for n, t in parameters(torch.float32).items()}
    x = images(dtype=torch.float32).requires_grad_()
    with eager.Convolutions() as counted:
        loss = network(ours, x, p).flatten(1).mean(1).square().sum()
        with ck.guided(), ck.no_weight_gradients():
            (guided,) = torch.autograd.grad(loss, x, retain_graph=True)
        with ck.no_weight_gradients():
            (delta,) = torch.autograd.grad(loss, x, create_graph=True)
        before = dict(counted.counts)
        (loss + F.cosine_similarity(delta.flatten(1), guided.flatten(1)).mean()).backward()
    assert before == {"F": 4, "D": 8, "W": 0}, "weight gradients in an input-gradient pass"
    assert counted.counts == {"F": 8, "D": 12, "W": 8}
    assert set(counted.filters) == {(C, C, 3, 3)}
    assert all(t.grad is not None for t in p.values())


def test_no_weight_gradients_leaves_them_out() -> None:
    p = {n: t.requires_grad_() for n, t in parameters().items()}
    x = images().requires_grad_()
    y = mine(x, **p)
    with ck.no_weight_gradients():
        found = torch.autograd.grad(y.sum(), [x, *p.values()], retain_graph=True, allow_unused=True)
        with pytest.raises(RuntimeError, match="not have been used"):
            torch.autograd.grad(y.sum(), p["g1"], retain_graph=True)
    assert found[0].any()
    assert set(found[1:]) == {None}
    (plain,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(plain, found[0])
