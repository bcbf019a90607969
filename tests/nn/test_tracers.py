"""The network ops under tracers, which hold no data: PyTorch's own operations are recorded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import camkernels as ck

F = ck.nn.functional


def _op(x: Tensor) -> Tensor:
    return F.conv_bn_act(x, torch.ones(4, 3, 3, 3), None, None, None, None, None)


def test_fake_tensors_run_to_second_order() -> None:
    """A kernel given a fake tensor would read memory that is not there."""
    with FakeTensorMode():
        x = torch.rand(2, 3, 8, 8, requires_grad=True)
        w = torch.rand(4, 3, 3, 3, requires_grad=True)
        output = F.conv_bn_act(x, w, None, None, None, None, None)
        (delta,) = torch.autograd.grad(output.sum(), x, create_graph=True)
        delta.sum().backward()
        assert output.shape == (2, 4, 6, 6)
        assert w.grad is not None
        assert w.grad.shape == w.shape


@pytest.mark.parametrize("mode", ["real", "fake"])
def test_make_fx_records_the_formula(mode: str) -> None:
    """Not the numbers of the tensors that it was traced with."""
    traced = make_fx(_op, tracing_mode=mode)(torch.rand(2, 3, 8, 8))
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(traced(x), _op(x))
