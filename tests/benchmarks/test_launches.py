"""Launches of the criteria, counted without a GPU: ours to the number, PyTorch's to a ceiling."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import camkernels as ck

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from benchmarks import launches
from camkernels.backends import BackendName
from camkernels.ops import _chain


def network() -> nn.Module:
    layers = OrderedDict(
        conv=nn.Conv2d(3, 16, 3, padding=1, bias=False), bn=nn.BatchNorm2d(16), features=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(16, 10),
    )  # fmt: skip
    return nn.Sequential(layers).to("meta")


Swap = Callable[[nn.Module], nn.Module]


def count(
    criterion: Callable[[nn.Module], Any], swap: Swap | None = None, by: BackendName = "triton"
) -> launches.Counts:
    """Of a step."""
    model = network() if swap is None else swap(network())
    loss = criterion(model)
    step = launches.step_of(
        model, lambda x, y: loss(model(x), y), *launches.batch(size=32, classes=10)
    )
    return launches.count(step, by=by)


def counted(
    criterion: Callable[[nn.Module], Any], swap: Swap | None = None, by: BackendName = "triton"
) -> tuple[dict[str, int], int]:
    """Own launches by kernel, and operators, of a step over those of cross-entropy."""
    found, base = count(criterion, swap, by), count(launches.plain, swap, by)
    return dict(found.own - base.own), found.over(base)[1]


VIEWS = {
    "warp_fwd": 1, "min_max_fwd": 2, "min_max_bwd": 2, "warped_ssim_taps": 2, "warped_ssim_fwd": 1,
    "warped_ssim_bwd": 1, "warped_ssim_join": 2, "ssim_join": 1, "lp_norm_tiles": 1,
    "lp_norm_join": 1, "lp_norm_tiles_bwd": 1, "lp_norm_maps_join": 1,
}  # fmt: skip
ERRORS = {"gradient_error_last": 1, "gradient_error_join": 1, "gradient_error_bwd": 1}
# Of one BatchNorm: the guided and the plain gradient and the double backward.
SECOND_ORDER = {"bn_sums": 3, "bn_bwd": 2, "bn_bwd_bwd": 1}
# What a criterion adds: our kernels, and at most so many operators of PyTorch.
CASES: dict[str, tuple[Callable[[nn.Module], Any], Swap | None, dict[str, int], int]] = {
    "entropy": (
        lambda m: ck.CAMEntropyLoss(m, "features", beta=0.1),
        None,
        {"cam_statistics_fwd": 1, "cam_statistics_bwd": 1},
        49,
    ),
    "entropy by autograd": (
        lambda m: ck.CAMEntropyLoss(m, "features", beta=0.1, head="autograd"),
        None,
        {"cam_statistics_fwd": 1, "cam_statistics_bwd": 1},
        41,
    ),
    "consistency": (
        lambda m: ck.CAMConsistencyLoss(m, "features", beta=1e-3),
        None,
        {**VIEWS, "cam_statistics_fwd": 2, "cam_statistics_bwd": 2},
        160,
    ),
    "consistency, joint": (
        lambda m: ck.CAMConsistencyLoss(m, "features", beta=1e-3, views="joint"),
        None,
        {**VIEWS, "cam_statistics_fwd": 1, "cam_statistics_bwd": 1},
        130,
    ),
    "interpretable": (
        lambda m: ck.InterpretableGradientLoss(m, "cosine", 1.0),
        ck.swap_in,
        {**ERRORS, **SECOND_ORDER},
        64,
    ),
    "interpretable, engine": (
        lambda m: ck.InterpretableGradientLoss(m, "cosine", 1.0),
        lambda m: ck.swap_in(m, engine=True, memory="fast"),
        {**ERRORS, **SECOND_ORDER},
        65,
    ),
}


@pytest.mark.parametrize("name", list(CASES))
def test_what_a_criterion_launches(name: str) -> None:
    criterion, swap, own, most = CASES[name]
    found, operators = counted(criterion, swap)
    assert {kernel.removesuffix("_kernel"): n for kernel, n in found.items()} == own
    assert operators <= most, f"{operators} operators"
    assert operators > 0.8 * most, f"{operators} operators: the ceiling can be lowered"


def test_operators_of_the_entropy_are_told_by_what_they_are_for() -> None:
    found, base = count(CASES["entropy"][0]), count(launches.plain)
    told = launches.beside({
        ("as it is", launches.ENTROPY): found, ("as it is", "cross-entropy"): base
    })  # fmt: skip
    _, operators = found.over(base)
    assert told.startswith(f"Beside the 2 kernels of CAMEntropyLoss, {operators} operators ")
    groups = re.findall(r"(\d+) for ", told)
    assert sum(map(int, groups)) == operators, told
    assert len(groups) == len({*launches.GROUPS.values(), launches.BACKWARD}) - 1, told


@pytest.mark.parametrize("name", ["entropy", "entropy by autograd"])
def test_the_cuda_backend_launches_the_same_and_no_operator_more(name: str) -> None:
    """That each of its calls is one launch: tests/cuda_host/test_cuda_kernels.py."""
    criterion, swap, own, _ = CASES[name]
    found, operators = counted(criterion, swap, "cuda")
    assert {kernel.removesuffix("_kernel"): n for kernel, n in found.items()} == own
    assert operators <= counted(criterion, swap)[1]


def test_known_counts() -> None:
    """Views and allocations are no launches, everything else is one; ours are counted apart."""
    x = torch.rand(4, 3, 6, 6, device="meta", requires_grad=True)
    from camkernels.nn.functional import relu

    def step() -> None:
        v = relu(x, save="mask")
        (v.view(-1)[:7] * 2 + 1).sum()  # a product, a sum with a number, a sum
        torch.empty_like(x).detach()
        torch.autograd.grad(v, x, torch.ones_like(x))

    before = _chain.implementation
    found = launches.count(step)
    assert _chain.implementation is before
    assert found.own == {"relu_fwd_kernel": 1, "relu_bwd_kernel": 1}
    assert found.aten == {"mul": 1, "add": 1, "sum": 1, "ones_like": 1}


def test_what_reads_a_number_back_is_not_counted_but_raises() -> None:
    x = torch.rand(3, device="meta")
    with pytest.raises(RuntimeError, match="meta"):
        launches.count(lambda: float(x.sum()))


def test_the_guard_of_a_closed_form_is_counted() -> None:
    """It is left out on the meta device, but not on a GPU."""

    def operators(head: str) -> Counter[str]:
        return count(lambda m: ck.CAMEntropyLoss(m, "features", beta=0.1, head=head)).aten

    assert operators("closed_form")["nan_to_num"] == 1
    assert operators("autograd")["nan_to_num"] == 0
