"""What swap_in leaves alone, refuses, warns of and reports."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from swapping import (
    assert_same_step,
    counting,
    images,
    small_network,
    twins,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import camkernels as ck


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


class OwnConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def test_left_alone() -> None:
    model = nn.Sequential(
        OwnConv(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        parametrizations.weight_norm(nn.Conv2d(4, 4, 3)),
        nn.BatchNorm2d(4),
        nn.GELU(),
        torch.jit.script(nn.ReLU()),
        nn.BatchNorm3d(4),
    )
    report = ck.swap_report(ck.swap_in(model))
    assert set(report.left_alone) == {"0", "3", "5", "6", "7"}
    assert "subclass" in report.left_alone["0"]
    assert "parametrised" in report.left_alone["3"]
    assert "not guided" in report.left_alone["5"]
    assert "TorchScript" in report.left_alone["6"]
    assert type(model[0]) is OwnConv
    assert parametrize.is_parametrized(model[3])
    assert report.fused == {"": ["1 + 2"]}


def test_parametrised_or_pruned_after_the_swap() -> None:
    swapped, plain = twins(small_network())
    for model in (swapped, plain):
        torch.manual_seed(0)
        parametrizations.weight_norm(model[1].conv1)
        prune.l1_unstructured(model[2].conv2, "weight", amount=0.5)
        parametrizations.spectral_norm(model[5])
    with counting("conv_bn_act") as counts:
        assert_same_step(swapped, plain, images())
    assert counts["conv_bn_act"] == 3


def test_pruned_before_the_swap() -> None:
    model = small_network().double()
    prune.l1_unstructured(model[1].conv1, "weight", amount=0.5)
    plain = small_network().double()
    prune.l1_unstructured(plain[1].conv1, "weight", amount=0.5)
    plain.load_state_dict(model.state_dict())
    assert_same_step(ck.swap_in(model), plain, images())


def test_checkpoint_wrapper_is_left_alone() -> None:
    wrapper = pytest.importorskip(
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper"
    ).checkpoint_wrapper
    model = small_network()
    model[1] = wrapper(model[1])
    swapped, plain = twins(model)
    assert "recomputes" in ck.swap_report(swapped).left_alone["1"]
    assert_same_step(swapped, plain, images())


def test_checkpointed_container() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = small_network()

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False)

    swapped, plain = twins(Checkpointed())
    assert_same_step(swapped, plain, images())


def test_quantised_modules_are_left_alone() -> None:
    qat = pytest.importorskip("torch.ao.nn.qat")
    config = torch.ao.quantization.get_default_qat_qconfig()
    model = nn.Sequential(qat.Conv2d(3, 4, 3, qconfig=config), nn.ReLU())
    report = ck.swap_report(ck.swap_in(model))
    assert report.left_alone == {"0": "quantised"}


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = F.relu(x)
        return self._more(self.relu(self.conv(x)))

    def _more(self, x: Tensor) -> Tensor:
        return x.sub(0.1).relu_()


def test_functional_relus_that_cannot_be_rewritten_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Untraceable())
    first = Untraceable.forward.__code__.co_firstlineno
    with pytest.warns(UserWarning, match="stay plain under ck.guided") as warned:
        ck.swap_in(model)
    message = str(warned[0].message)
    assert "1 (Untraceable)" in message
    assert f"test_swap_report.py:{first + 2}, " in message
    assert f"test_swap_report.py:{first + 6}; " in message
    assert str(len(warned)) == "1"
    assert list(ck.swap_report(model).unguided_relus) == ["1"]
    assert type(model[1].relu) is ck.nn.ReLU


def test_relu_kept_as_an_attribute() -> None:
    class Attribute(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = F.relu

        def forward(self, x: Tensor) -> Tensor:
            return self.act(x)

    model = ck.swap_in(nn.Sequential(Attribute()))
    assert ck.swap_report(model).functional_relus == {"0": 1}


def test_warns_of_a_network_without_relu() -> None:
    with pytest.warns(UserWarning, match="no ReLU found"):
        ck.swap_in(nn.Sequential(nn.Conv2d(3, 3, 3), nn.GELU()))


def test_report_before_and_after() -> None:
    model = small_network()
    before = ck.swap_report(model)
    assert not before.swapped_in
    assert all(not isinstance(m, ck.nn.Conv2d) for m in model.modules())
    after = ck.swap_report(ck.swap_in(model))
    assert after.swapped_in
    assert before.swapped == after.swapped
    assert before.fused == after.fused
    assert after.fused_groups == 5
    lines = str(after).splitlines()
    assert lines[0] == ("swapped in; 13 modules, 5 fused groups, 0 functional ReLUs, 0 left alone")
    assert "  1        fused: conv2 + bn2 + add + relu" in lines
    assert not ck.swap_report(ck.swap_out(model)).swapped_in


def test_refuses_wrapped_networks(tmp_path: Path) -> None:
    model = small_network()
    for wrapped in (
        nn.DataParallel(model),
        torch.compile(model),
        nn.Sequential(nn.DataParallel(model)),
    ):
        with pytest.raises(TypeError, match="before wrapping"):
            ck.swap_in(wrapped)
    torch.distributed.init_process_group(
        "gloo", f"file://{tmp_path / 'store'}", world_size=1, rank=0
    )
    try:
        with pytest.raises(TypeError, match="already wrapped in DistributedDataParallel"):
            ck.swap_in(nn.parallel.DistributedDataParallel(model))
        swapped, plain = twins(small_network())
        wrapped = nn.parallel.DistributedDataParallel(swapped)
        assert_same_step(wrapped, nn.parallel.DistributedDataParallel(plain), images())
    finally:
        torch.distributed.destroy_process_group()
    with pytest.raises(TypeError, match="expected a torch"):
        ck.swap_in("model")
    with pytest.raises(ValueError, match="belongs to the engine"):
        ck.swap_in(small_network(), memory="lean")


def test_forward_patched_on_the_instance() -> None:
    model = small_network()
    model[1].forward = lambda x: x * 2
    ck.swap_in(model)
    assert "patched" in ck.swap_report(model).left_alone["1"]
    x = torch.ones(2, 4, 5, 5)
    assert torch.equal(model[1](x), x * 2)
