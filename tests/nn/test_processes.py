"""Two gloo processes that share statistics give what one process gives on the whole batch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from nn import eager
from torch import Tensor

from camkernels import backends
from camkernels.nn import functional as ours

HERE = Path(__file__).resolve()
pytestmark = [
    pytest.mark.skipif(
        backends.unavailable_reason("cpu") is not None or backends.triton_interpreted(),
        reason="needs the C++ kernels, in a process that does not interpret Triton",
    ),
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed"),
]
SPLIT = (3, 2)  # samples of the two processes: shares that are not equal
NAMES = ("w0", "g0", "b0", "w1", "g1", "b1")


def problem() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    gamma = draw(4)
    gamma[0] = 0.0
    return {
        "x": draw(sum(SPLIT), 3, 6, 5), "w0": draw(4, 3, 3, 3), "g0": gamma, "b0": draw(4),
        "w1": draw(4, 4, 3, 3), "g1": draw(4), "b1": draw(4), "c": draw(sum(SPLIT), 4, 6, 5),
        "v": draw(sum(SPLIT), 3, 6, 5),
    }  # fmt: skip


def outcome(part: dict[str, Tensor], side: Any, **group: Any) -> dict[str, Tensor]:
    """Output, statistics, delta, and gradients of a penalty on delta, of sums over samples: those
    of the parameters add up over processes."""
    p = {n: part[n].clone().requires_grad_() for n in NAMES}
    x = part["x"].clone().requires_grad_()
    statistics = [torch.zeros(4).double(), torch.ones(4).double()]
    a = side.conv_bn_act(
        x, p["w0"], None, *statistics, p["g0"], p["b0"], padding=1, training=True, **group
    )
    y = side.conv_bn_act(
        a, p["w1"], None, None, None, p["g1"], p["b1"], padding=1, training=True, residual=a,
        **group,
    )  # fmt: skip
    y = side.batch_norm_relu(y, None, None, p["g1"], p["b0"], True, **group)
    loss = (y * part["c"]).sum()
    plain = torch.autograd.grad(loss, list(p.values()), retain_graph=True)
    (delta,) = torch.autograd.grad(loss, x, create_graph=True)
    penalty = loss + ((delta - part["v"]).square()).sum()
    gradients = torch.autograd.grad(penalty, [x, *p.values()])
    found = {"y": y, "mean": statistics[0], "var": statistics[1], "delta": delta}
    found |= {f"first {n}": g for n, g in zip(NAMES, plain, strict=True)}
    found |= {f"second {n}": g for n, g in zip(("x", *NAMES), gradients, strict=True)}
    return {name: value.detach() for name, value in found.items()}


def share(rank: int) -> dict[str, Tensor]:
    start = sum(SPLIT[:rank])
    per_sample = ("x", "c", "v")
    rows = slice(start, start + SPLIT[rank])
    return {n: t[rows] if n in per_sample else t for n, t in problem().items()}


def main(rank: int, store: str, result: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.save(outcome(share(rank), ours, process_group=dist.group.WORLD), result)
    dist.destroy_process_group()


def test_two_processes_equal_one(
    tmp_path: Path, subprocess_environment: dict[str, str], python: str
) -> None:
    results = [tmp_path / f"{rank}.pt" for rank in range(2)]
    subprocess_environment["PYTHONPATH"] += f":{HERE.parent.parent}"
    processes = [
        subprocess.Popen(
            [python, str(HERE), str(rank), str(tmp_path / "store"), str(results[rank])],
            env=subprocess_environment, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    one, two = (torch.load(result) for result in results)
    truth = outcome(problem(), eager)
    alone = outcome(share(0), eager)
    found = {}
    for name in truth:
        if name in ("mean", "var"):
            assert torch.equal(one[name], two[name]), "statistics that differ between processes"
            found[name] = one[name]
        elif name in ("y", "delta", "second x"):
            found[name] = torch.cat((one[name], two[name]))
        else:
            found[name] = one[name] + two[name]
    error = eager.assert_same(found, truth, 1e-10)
    print(f"largest difference {error:.1e}")
    shared = (alone["y"] - truth["y"][: SPLIT[0]]).abs().max()
    assert float(shared) > 1e-3, "statistics of one share alone would do"


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Any]:
    """A group of this process alone, which takes every path of a larger one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def _penalty(op: str, wanted: str, group: Any) -> Tensor:
    """The input's gradient of a penalty on the gradient of ``wanted``."""
    given = problem()
    t = {n: given[n].requires_grad_() for n in ("x", "w0", "g0", "b0")}
    if op == "conv_bn_act":
        y = ours.conv_bn_act(
            t["x"], t["w0"], None, None, None, t["g0"], t["b0"], padding=1, training=True,
            process_group=group,
        )  # fmt: skip
    else:
        z = ours.conv2d(t["x"], t["w0"], padding=1)
        y = ours.batch_norm_relu(z, None, None, t["g0"], t["b0"], True, process_group=group)
    loss = (y * given["c"]).sum()
    (first,) = torch.autograd.grad(loss, t[wanted], create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), t["x"])
    return second


@pytest.mark.parametrize("op", ["conv_bn_act", "batch_norm_relu"])
def test_a_penalty_on_dgamma_through_shared_statistics_raises(op: str, alone: Any) -> None:
    with pytest.raises(NotImplementedError, match=r"cotangent of dgamma .* not supported"):
        _penalty(op, "g0", alone)
    assert bool(_penalty(op, "g0", None).any())
    for wanted in ("x", "w0", "b0"):  # what is no cotangent of dgamma passes, and is right
        found, truth = _penalty(op, wanted, alone), _penalty(op, wanted, None)
        torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
