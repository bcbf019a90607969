"""Copies and files of swapped networks, swap_out, and other tracers."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from swapping import (
    Block,
    assert_same_step,
    counting,
    groups,
    images,
    randomize_norms,
    small_network,
    twins,
)
from torch import Tensor, nn

import camkernels as ck
from camkernels.nn._rewritten import RewrittenForward


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def test_swap_out_restores_classes_and_forwards() -> None:
    model = small_network()
    classes = [type(m) for m in model.modules()]
    attributes = [set(m.__dict__) for m in model.modules()]
    forwards = [m.forward for m in model.modules()]
    parameters = [id(p) for p in model.parameters()]
    keys = list(model.state_dict())
    ck.swap_in(ck.swap_in(model))
    assert classes != [type(m) for m in model.modules()]
    assert parameters == [id(p) for p in model.parameters()]
    assert keys == list(model.state_dict())
    ck.swap_out(ck.swap_out(model))
    assert classes == [type(m) for m in model.modules()]
    assert attributes == [set(m.__dict__) for m in model.modules()]
    assert forwards == [m.forward for m in model.modules()]


def test_swap_out_leaves_modules_that_people_wrote() -> None:
    model = ck.swap_out(ck.swap_in(nn.Sequential(ck.nn.ReLU(save="output"), nn.ReLU())))
    assert [type(m) for m in model] == [ck.nn.ReLU, nn.ReLU]
    assert model[0].save == "output"


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, _saved, lambda m: pickle.loads(pickle.dumps(m))], ids="dsp"
)
def test_copies(copied: Callable[[nn.Module], nn.Module]) -> None:
    swapped, plain = twins(small_network())
    x = images()
    swapped(x), plain(x)
    other = copied(swapped)
    for module in other.modules():
        installed = module.__dict__.get("forward")
        assert installed is None or installed.container is module
    assert (
        sum(isinstance(m.__dict__.get("forward"), RewrittenForward) for m in other.modules()) == 3
    )
    with torch.no_grad():  # nothing is shared
        for p in swapped.parameters():
            p.zero_()
    with counting("conv_bn_act") as counts:
        assert_same_step(other, plain, *[torch.ones(2, 3, 12, 12, dtype=torch.float64)])
    assert counts["conv_bn_act"] == 5
    torch.testing.assert_close(ck.swap_out(other).state_dict(), plain.state_dict())


def test_to_another_dtype() -> None:
    swapped, plain = twins(small_network())
    swapped.float(), plain.float()
    x = images().float()
    torch.testing.assert_close(swapped(x), plain(x), rtol=1e-4, atol=1e-5)


def test_optimizer_made_before_the_swap() -> None:
    model = small_network().double()
    plain = copy.deepcopy(model)
    steps = []
    for m in (model, plain):
        optimizer = torch.optim.SGD(m.parameters(), 0.1)
        if m is model:
            ck.swap_in(m)
        torch.manual_seed(0)
        for _ in range(3):
            optimizer.zero_grad()
            m(images()).square().sum().backward()
            optimizer.step()
        steps.append(list(m.parameters()))
    for a, b in zip(*steps, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_shared_modules() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block(3)
            self.again = self.block
            self.relu = self.block.relu

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.again(self.block(x)) - 1)

    swapped, plain = twins(randomize_norms(Shared()))
    assert_same_step(swapped, plain, images())


def test_torch_fx_before_and_not_after() -> None:
    swapped, plain = twins(torch.fx.symbolic_trace(small_network()))
    assert len(groups(swapped)) == 5
    assert_same_step(swapped, plain, images())
    with pytest.raises(TypeError, match=r"torch.fx cannot trace a network after ck.swap_in"):
        torch.fx.symbolic_trace(swapped[0] if isinstance(swapped, nn.Sequential) else swapped)
    with pytest.raises(TypeError, match=r"torch.fx cannot trace a network after ck.swap_in"):
        torch.fx.symbolic_trace(ck.swap_in(small_network()))


def test_torch_jit_trace_gives_plain_operations() -> None:
    swapped, plain = twins(small_network().eval())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(swapped, images())
    x = images(3)
    torch.testing.assert_close(traced(x), plain(x))


def test_data_parallel_replicas_are_refused() -> None:
    swapped = ck.swap_in(small_network())
    with pytest.raises(TypeError, match="DistributedDataParallel"):
        swapped[1]._replicate_for_data_parallel()
