"""FSDP: the cross-entropy through swapped networks, CAM criteria with a closed form, and what is
refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import fsdp_process as process
import pytest
import torch
from torch import Tensor, nn

import camkernels as ck
from camkernels import backends

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch has no distributed"
)
WRAPPER = r"FSDP.*use nn\.parallel\.DistributedDataParallel"


class FullyShardedDataParallel(nn.Module):
    """Stands for FSDP's, which wants processes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def sharded(model: nn.Module) -> nn.Module:
    """As ``fully_shard`` marks modules."""
    for module in model.modules():
        module._is_fsdp_managed_module = True  # type: ignore[assignment]
    return model


@pytest.mark.parametrize("name", process.TOOLS)
def test_the_wrapper_is_refused_where_a_tool_is_made(name: str) -> None:
    for model in (
        FullyShardedDataParallel(process.network()),
        nn.Sequential(FullyShardedDataParallel(process.network())),
    ):
        with pytest.raises(TypeError, match=WRAPPER):
            process.TOOLS[name](model)
        with pytest.raises(TypeError, match=r"already wrapped in FSDP .* plain model"):
            ck.swap_in(model)


def test_sharded_models_are_refused_by_what_differentiates_twice() -> None:
    images, targets = process.data()
    with pytest.raises(TypeError, match=WRAPPER):
        ck.InterpretableGradientLoss(sharded(process.network()))
    with pytest.raises(TypeError, match=r"already wrapped in FSDP"):
        ck.swap_in(sharded(process.network()))
    model = process.network()
    criterion = ck.InterpretableGradientLoss(model, plain_relus="ignore")
    criterion(model(images), targets)
    sharded(model)  # after the criterion was made
    with pytest.raises(TypeError, match=WRAPPER):
        model(images)
    model = sharded(process.network())
    entropy = ck.CAMEntropyLoss(model, process.LAYER, head="autograd")
    with pytest.raises(ck.TapError, match=WRAPPER):
        entropy(model(images), targets)
    closed = ck.CAMEntropyLoss(model, process.LAYER)
    closed(model(images), targets).backward()  # the parameters are whole
    assert closed.head.startswith("closed form")
    logits = model(images)
    linear = model.head[2]  # type: ignore[index]
    linear.weight.data = linear.weight.data.flatten()  # as FSDP leaves shards behind a forward
    with pytest.raises(ck.TapError, match=r"reshard_after_forward=False.*DistributedDataParallel"):
        closed(logits, targets)


@pytest.mark.slow
@pytest.mark.skipif(
    backends.unavailable_reason("cpu") is not None or backends.triton_interpreted(),
    reason="needs the C++ kernels, in a process that does not interpret Triton",
)
def test_two_processes(tmp_path: Path, two_processes: Callable[[str], None]) -> None:
    two_processes(process.__file__)
    right, refused = torch.load(tmp_path / "found.pt")
    assert set(right) == set(process.RIGHT)
    truth = {name: _alone(name) for name in {name for _, name in right}}
    for key, gradients in right.items():
        for one, other in zip(gradients, truth[key[1]], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, msg=str(key))
    assert set(refused) == set(process.REFUSED)
    for key, said in refused.items():
        kind, text = process.REFUSED[key]
        assert said.startswith(kind), (key, said)
        assert text in said, (key, said)


def _alone(name: str) -> list[Tensor]:
    """What one process finds with all of the batch."""
    images, targets = process.data()
    model = process.network_for(name)
    process.CRITERIA[name](model, slice(None))(model(images), targets).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]
