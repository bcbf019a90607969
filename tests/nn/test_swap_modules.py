"""The modules of camkernels.nn against PyTorch's, to first and second order."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ops.base import device_of, every_backend
from swapping import (
    Block,
    assert_same_step,
    counting,
    images,
    randomize_norms,
    small_network,
    swapped_alone,
    twins,
)
from torch import Tensor, nn

import camkernels as ck


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


# --- convolution ----------------------------------------------------------------------------------

CONVOLUTIONS: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": (3, 1), "padding": (1, 0), "bias": False},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": 3, "padding": "valid", "groups": 3},
    {"kernel_size": 1},
]


@pytest.mark.parametrize("options", CONVOLUTIONS)
def test_convolution(options: dict[str, Any]) -> None:
    swapped, plain = swapped_alone(nn.Conv2d(3, 6, **options))
    assert type(swapped) is ck.nn.Conv2d
    with counting("conv2d") as counts:
        assert_same_step(swapped, plain, images())
        assert_same_step(swapped, plain, images()[0])  # without batch: PyTorch's own
    assert counts["conv2d"] == 1


@pytest.mark.parametrize(
    "options", [{"padding_mode": "reflect", "padding": 1}, {"padding": "same", "kernel_size": 2}]
)
def test_convolution_with_other_padding_is_left_alone(options: dict[str, Any]) -> None:
    model = nn.Conv2d(3, 6, **{"kernel_size": 3, **options})
    swapped, plain = swapped_alone(model)
    assert type(swapped) is nn.Conv2d
    assert "padding" in ck.swap_report(swapped).left_alone[""]
    direct = ck.nn.Conv2d(3, 6, **{"kernel_size": 3, **options}).double()
    direct.load_state_dict(plain.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, of the even kernel
        assert_same_step(direct, plain, images())


# --- BatchNorm ------------------------------------------------------------------------------------

NORMS: list[dict[str, Any]] = [
    {},
    {"momentum": None},
    {"momentum": 0.5, "eps": 0.1},
    {"affine": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
]


@pytest.mark.parametrize("options", NORMS)
@pytest.mark.parametrize("inside_group", [False, True])
def test_batch_norm(options: dict[str, Any], inside_group: bool) -> None:
    norm = nn.BatchNorm2d(3, **options)
    layers = [nn.Conv2d(3, 3, 3), norm, nn.ReLU()] if inside_group else [norm]
    swapped, plain = swapped_alone(randomize_norms(nn.Sequential(*layers)))
    for training in (True, True, False, True):
        swapped.train(training), plain.train(training)
        assert_same_step(swapped, plain, images())


def test_tracking_turned_off_later() -> None:
    swapped, plain = swapped_alone(randomize_norms(nn.BatchNorm2d(3)))
    for model in (swapped, plain):
        model.track_running_stats = False
    for training in (True, False):
        swapped.train(training), plain.train(training)
        assert_same_step(swapped, plain, images())


def test_frozen_norm_in_a_training_network() -> None:
    swapped, plain = twins(small_network())
    for model in (swapped, plain):
        model.train()
        model[1].bn1.eval()
        model[2].bn2.eval()
        for parameter in model[1].bn1.parameters():
            parameter.requires_grad_(False)
    before = copy.deepcopy(swapped[1].bn1.state_dict())
    assert_same_step(swapped, plain, images())
    assert all(torch.equal(before[k], v) for k, v in swapped[1].bn1.state_dict().items())


@pytest.mark.parametrize("inside_group", [False, True])
def test_batch_norm_refuses_what_pytorch_refuses(inside_group: bool) -> None:
    layers = [nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)] if inside_group else [nn.BatchNorm2d(3)]
    swapped, plain = swapped_alone(nn.Sequential(*layers))
    for model in (swapped, plain):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            model(torch.ones(1, 3, 1, 1, dtype=torch.float64))
        with pytest.raises(ValueError, match="expected 4D input"):
            model(torch.ones(3, 5, 5, dtype=torch.float64))


@every_backend
@pytest.mark.parametrize("inside_group", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_of_an_empty_batch(
    backend: str, inside_group: bool, momentum: float | None, training: bool
) -> None:
    """As PyTorch's own (2.13), in all: the batch is counted, the running statistics stay as they
    are, and the gradients of the parameters are 0."""
    norm = randomize_norms(nn.BatchNorm2d(3, momentum=momentum))
    layers = [nn.Conv2d(3, 3, 3), norm, nn.ReLU()] if inside_group else [norm]
    swapped, plain = swapped_alone(nn.Sequential(*layers))
    device = device_of(backend)
    for model in (swapped, plain):
        model.to(device, torch.float32).train(training)
    before = copy.deepcopy(plain.state_dict())
    found = []
    for model in (swapped, plain):
        x = torch.empty(0, 3, 5, 6, device=device, requires_grad=True)
        with ck.backend(backend) if model is swapped else torch.enable_grad():  # type: ignore[arg-type]
            y = model(x)
            gradients = torch.autograd.grad(y.sum(), [x, *model.parameters()])
        found.append([y, *gradients])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    torch.testing.assert_close(swapped.state_dict(), plain.state_dict(), rtol=0, atol=0)
    for name, value in swapped.state_dict().items():
        counted = int(training and "num_batches" in name)
        assert torch.equal(value, before[name] + counted if counted else before[name]), name


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_batch_norm_relu_module(relu: bool, residual: bool) -> None:
    norm = randomize_norms(ck.nn.BatchNormReLU2d(3, relu=relu)).double()
    plain = nn.BatchNorm2d(3).double()
    plain.load_state_dict(norm.state_dict())
    x, s = images(), images()
    found = norm(x, s) if residual else norm(x)
    expected = plain(x) + s if residual else plain(x)
    torch.testing.assert_close(found, expected.relu() if relu else expected)
    torch.testing.assert_close(norm.state_dict(), plain.state_dict())
    assert f"relu={relu}" in repr(norm)


def test_sync_batch_norm_without_processes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU())
    plain = copy.deepcopy(randomize_norms(model)).double()
    swapped = ck.swap_in(nn.SyncBatchNorm.convert_sync_batchnorm(model).double())
    assert type(swapped[1]) is ck.nn.SyncBatchNorm
    for training in (True, False):
        swapped.train(training), plain.train(training)
        assert_same_step(swapped, plain, images())


def _one_of_two(rank: int, file: str) -> None:
    """Half of a batch in each of two processes equals the whole batch in one."""
    torch.distributed.init_process_group(
        "gloo", f"file://{file}", timedelta(seconds=60), world_size=2, rank=rank
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU()).double()
    whole = copy.deepcopy(model)
    model = ck.swap_in(nn.SyncBatchNorm.convert_sync_batchnorm(model))
    assert len(ck.swap_report(model).fused) == 1
    x = images(4).requires_grad_()
    half = slice(2 * rank, 2 * rank + 2)
    for with_hook in (False, True):
        if with_hook:
            model[1].register_forward_hook(lambda *_: None)
        mine, expected = model(x[half]), whole(x)
        torch.testing.assert_close(mine, expected[half])
        (found,) = torch.autograd.grad(mine.square().sum(), x)
        (wanted,) = torch.autograd.grad(expected.square().sum(), x)
        torch.testing.assert_close(found[half], wanted[half])
        torch.testing.assert_close(model[1].running_var, whole[1].running_var)
    torch.distributed.destroy_process_group()


@pytest.mark.slow  # tests/losses has the like of it through a criterion
def test_sync_batch_norm_in_two_processes(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(
        _one_of_two, (str(tmp_path / "store"),), nprocs=2, start_method="spawn"
    )


# --- ReLU -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [True, False])
def test_relu_writes_in_place_where_asked(inplace: bool) -> None:
    swapped = ck.swap_in(nn.ReLU(inplace=inplace))
    x = torch.tensor([-1.0, 2.0])
    assert swapped(x).tolist() == [0.0, 2.0]
    assert x.tolist() == ([0.0, 2.0] if inplace else [-1.0, 2.0])
    assert swapped(torch.tensor([-3, 3])).tolist() == [0, 3]


def test_relu_keeps_its_output_only_where_the_next_layer_does() -> None:
    relus = [nn.ReLU(inplace=True), nn.ReLU(), nn.ReLU(), nn.ReLU()]
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), relus[0], nn.Conv2d(4, 4, 3), relus[1], nn.AvgPool2d(2)),
        *(nn.Conv2d(4, 4, 1), relus[2], nn.MaxPool2d(2), nn.Conv2d(4, 4, 1, bias=False), relus[3]),
    )
    ck.swap_in(model)
    assert [r.save for r in relus] == ["output", "mask", "mask", "mask"]
    ck.swap_out(model)
    assert all("save" not in vars(r) for r in relus)
    model[2].weight.requires_grad_(False)  # a frozen convolution does not keep its input
    assert ck.swap_in(model)[1].save == "mask"


@pytest.mark.parametrize("order", [1, -1])
def test_relu_of_two_containers_keeps_the_mask_if_one_needs_it(order: int) -> None:
    relu = nn.ReLU()
    parts = [
        nn.Sequential(nn.Conv2d(3, 3, 1), relu, nn.Conv2d(3, 3, 1)),
        nn.Sequential(nn.Conv2d(3, 3, 1), relu, nn.AvgPool2d(2)),
    ]
    ck.swap_in(nn.Sequential(*parts[::order]))
    assert relu.save == "mask"


# --- timm -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("apply_act", [True, False])
@pytest.mark.parametrize("hooked", [None, "act", "drop"])
def test_timm_batch_norm_act(apply_act: bool, hooked: str | None) -> None:
    layers = pytest.importorskip("timm.layers")
    norm = layers.BatchNormAct2d(3, apply_act=apply_act, inplace=False)
    swapped, plain = swapped_alone(randomize_norms(nn.Sequential(nn.Conv2d(3, 3, 3), norm)))
    assert type(swapped[1]).__module__ == "camkernels.nn._timm"
    if hooked:
        for model in (swapped, plain):
            getattr(model[1], hooked).register_forward_hook(lambda m, i, o: o * 3)
    for training in (True, False):
        swapped.train(training), plain.train(training)
        with counting("conv_bn_act") as counts:
            assert_same_step(swapped, plain, images())
            assert_same_step(swapped[1], plain[1], images())
        assert counts["conv_bn_act"] == (0 if hooked else 1)
    assert type(ck.swap_out(swapped)[1]) is layers.BatchNormAct2d


def test_timm_batch_norm_with_another_activation() -> None:
    layers = pytest.importorskip("timm.layers")
    model = nn.Sequential(
        nn.Conv2d(3, 3, 3), layers.BatchNormAct2d(3, act_layer=nn.SiLU), nn.ReLU()
    )
    swapped, plain = twins(model)
    report = ck.swap_report(swapped)
    assert set(report.left_alone) == {"1", "1.act"}
    assert_same_step(swapped, plain, images())


# --- second order ---------------------------------------------------------------------------------


def _second_order(model: nn.Module, x: Tensor, c: Tensor, targets: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    loss = F.cross_entropy(model(x), targets)
    (delta,) = torch.autograd.grad(loss, x, create_graph=True)
    return list(torch.autograd.grad((delta * c).sum() + loss, list(model.parameters())))


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("hooked", [False, True])
def test_second_order(functional: bool, training: bool, hooked: bool) -> None:
    swapped, plain = twins(small_network(functional).train(training))
    if hooked:
        swapped[1].bn2.register_forward_hook(lambda *_: None)
    x, c, targets = images(3), images(3), torch.tensor([0, 3, 1])
    with ck.modes.no_weight_gradients():
        pass
    found = _second_order(swapped, x, c, targets)
    expected = _second_order(plain, x, c, targets)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


def test_second_order_without_norms() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding="same")),
        *(nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)),
    )
    swapped, plain = twins(model)
    x, c, targets = images(3), images(3), torch.tensor([0, 3, 1])
    found = _second_order(swapped, x, c, targets)
    for mine, theirs in zip(found, _second_order(plain, x, c, targets), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


def test_block_used_twice_second_order() -> None:
    block = Block(3)
    model = nn.Sequential(block, block, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    swapped, plain = twins(randomize_norms(model))
    x, c, targets = images(3), images(3), torch.tensor([0, 2, 1])
    found = _second_order(swapped, x, c, targets)
    for mine, theirs in zip(found, _second_order(plain, x, c, targets), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)
