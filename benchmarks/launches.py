"""How often a training step launches a kernel: ``python -m benchmarks.launches``, without a GPU.

A step runs on the meta device, where tensors have shapes and no numbers, and takes the way that it
takes on a GPU with the Triton backend (or the CUDA one, which has kernels for some criteria only):

- own: our kernels. Their host code runs, and the launch at its end is counted, not made. That a
  call of the CUDA backend is one launch, tests/cuda_host counts in the host build of its kernels.
- aten: PyTorch's operators, seen by a dispatch mode; views and allocations are none. Each is about
  one launch on a GPU: some convolutions and reductions take several, and a copy is a memory copy.

What would read a number back from the GPU fails on the meta device, so a step that is counted here
reads none. The guard of a closed-form head is counted with its operators, and without the read that
it makes at every 64th step. Counted is the third step, less what only the first ones do.

``over CE`` is the step less that of cross-entropy alone through the same network. The optimiser's
step is not part of it. ``--write`` writes benchmarks/results/launches.md.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import camkernels as ck
from benchmarks import environment, loops, results
from camkernels import backends
from camkernels.backends import BackendName
from camkernels.ops import _chain
from camkernels.taps.evaluate import Evaluator

META = torch.device("meta")
FILE = results.FOLDER / "launches.md"
_NO_LAUNCH = re.compile(
    r"^((new_)?empty|detach|alias|_unsafe_view|_reshape_alias|lift_fresh|resolve_|is_same_size)"
)
Step = Callable[[], Any]


@dataclass
class Counts:
    """Launches by kernel, operators by name."""

    own: Counter[str] = field(default_factory=Counter)
    aten: Counter[str] = field(default_factory=Counter)
    groups: Counter[str] = field(default_factory=Counter)
    """The operators again, by what they are for; see GROUPS."""

    def over(self, other: Counts) -> tuple[int, int]:
        """How many more of each."""
        return self.own.total() - other.own.total(), self.aten.total() - other.aten.total()


# What the operators of a CAM-entropy criterion are for, by the innermost function that is named.
GROUPS = {
    "cross_entropy": "",
    "_guard": "the guard of the closed form",
    "_by_closed_form": "the Jacobian of the head",
    "_classes": "classes, and which maps count",
    "live": "classes, and which maps count",
    "parts": "the mean over maps, beta and the sum with the cross-entropy",
    "loss_of": "the mean over maps, beta and the sum with the cross-entropy",
}
BACKWARD = "the way back through these"


def _group() -> str:
    """Of the operator that is dispatched now; nothing where it is the network's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in GROUPS:
            return GROUPS[frame.f_code.co_name]
        frame = frame.f_back
    return BACKWARD if torch._C._current_autograd_node() is not None else ""


class _Operators(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        tensors = tree_leaves((args, kwargs, outputs))
        on_device = any(isinstance(t, Tensor) and t.is_meta for t in tensors)
        if on_device and not func.is_view and not _NO_LAUNCH.match(name):
            self.counts.aten[name] += 1
            self.counts.groups[_group()] += 1
        return outputs


class _NotMeta(TorchFunctionMode):
    """Tensors say that they hold numbers: on meta the head's guard would be left out."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func == Tensor.is_meta.__get__:  # type: ignore[attr-defined]
            return False
        return func(*args, **(kwargs or {}))


def _guarded(original: Callable[..., bool]) -> Callable[..., bool]:
    def guard(self: Evaluator, *args: Any) -> bool:
        self._held = True  # else it would be read now
        with _NotMeta():
            return original(self, *args)

    return guard


def _launches_entered(launched: Counter[str], by: BackendName) -> list[Any]:
    """Patches that enter a launch of the backend in place of making it."""
    if by == "cuda":
        from camkernels.ops import _cuda_launch, _gpu

        def run(kernel: str, *arguments: Any) -> None:
            launched[f"{kernel}_kernel"] += 1

        return [
            mock.patch.object(_cuda_launch, "run", run),
            mock.patch.object(_gpu, "multiprocessors", return_value=132),
        ]
    from camkernels.ops import _triton_launch as host

    def launch(kernel: Any, grid: Any, like: Tensor, *args: Any, **constants: Any) -> None:
        launched[kernel.__name__] += 1

    return [
        mock.patch.object(host, "launch", launch),
        mock.patch.object(host, "multiprocessors", return_value=132),
    ]


@contextmanager
def as_on_a_gpu(launched: Counter[str], by: BackendName = "triton") -> Iterator[None]:
    """A backend for GPUs takes meta tensors; a launch is entered in ``launched``."""
    original = _chain.implementation

    def implementation(op: str, kernel: str, backend: str) -> Callable[..., Any]:
        return original(op, kernel, by if backend == "meta" else backend)

    modules = [m for n, m in sys.modules.items() if n.startswith("camkernels") and m is not None]
    patches = [
        mock.patch.object(m, "implementation", implementation)
        for m in modules
        if getattr(m, "implementation", None) is original
    ]
    patches += [
        *_launches_entered(launched, by),
        mock.patch.object(backends, "unavailable_reason", return_value=None),
        mock.patch.object(backends, "_unsuited_reason", return_value=None),
        # a dispatch mode counts here, and traces nothing
        mock.patch.object(_chain, "_is_traced", return_value=False),
        mock.patch.object(Evaluator, "_guard", _guarded(Evaluator._guard)),
    ]
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        stack.enter_context(ck.backend(by))
        yield


def count(step: Step, warm_up: int = 2, by: BackendName = "triton") -> Counts:
    """Of a step after ``warm_up`` others."""
    found = Counts()
    with as_on_a_gpu(found.own, by):
        for _ in range(warm_up):
            step()
        found.own.clear()
        with _Operators(found):
            step()
    return found


# --- the steps ----------------------------------------------------------------------------------

Criterion = Callable[[nn.Module], Callable[[Tensor, Tensor], Tensor]]
LAYER = "layer4"


def plain(model: nn.Module) -> nn.Module:
    return nn.CrossEntropyLoss()


def entropy(model: nn.Module) -> nn.Module:
    return ck.CAMEntropyLoss(model, LAYER, beta=0.1)


def consistency(views: str = "separate") -> Criterion:
    return lambda model: ck.CAMConsistencyLoss(model, LAYER, beta=1e-3, views=views)


def interpretable(model: nn.Module) -> nn.Module:
    return ck.InterpretableGradientLoss(model, "cosine", 1.0)


def _network() -> nn.Module:
    from benchmarks.members import _steps

    return _steps.network("resnet18").to(META)


def _engine(memory: str) -> Callable[[nn.Module], nn.Module]:
    return lambda model: ck.swap_in(model, engine=True, memory=memory)


NETWORKS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "as it is": lambda model: model,
    "swap_in": ck.swap_in,
    "engine fast": _engine("fast"),
    "engine lean": _engine("lean"),
}
ENTROPY = "CAMEntropyLoss, closed form"
CRITERIA: dict[str, Criterion] = {
    "cross-entropy": plain,
    ENTROPY: entropy,
    "CAMConsistencyLoss": consistency(),
    "CAMConsistencyLoss, joint views": consistency("joint"),
    "InterpretableGradientLoss": interpretable,
}
# Today's loops, for comparison.
EAGER: dict[str, Callable[[nn.Module], tuple[loops.Loop, Callable[[], None]]]] = {
    "CAM entropy, careful eager loop": lambda m: loops.careful(m, LAYER, 0.1),
    "interpretable gradient, eager loop": lambda m: loops.interpretable(m, 1.0),
}


def batch(count: int = 2, size: int = 64, classes: int = 1000) -> tuple[Tensor, Tensor]:
    """Of meta tensors."""
    images = torch.empty(count, 3, size, size, device=META)
    return images, torch.zeros(count, dtype=torch.long, device=META)


def step_of(
    model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], images: Tensor, targets: Tensor
) -> Step:
    """Forward, loss, backward to parameters' gradients made from None."""
    parameters = list(model.parameters())

    def step() -> None:
        loss(images, targets).backward()
        for p in parameters:
            p.grad = None

    return step


def counts_of(network: str, criterion: str, by: BackendName = "triton") -> Counts:
    """One cell of the table."""
    model = NETWORKS[network](_network())
    loss = CRITERIA[criterion](model)
    return count(step_of(model, lambda x, y: loss(model(x), y), *batch()), by=by)


def eager_counts(name: str) -> Counts:
    model = _network()
    loop, _ = EAGER[name](model)
    return count(step_of(model, loop, *batch()))


def all_counts() -> dict[tuple[str, str], Counts]:
    """By network and criterion; the criterion on guided gradients needs our ReLUs."""
    found = {}
    for network in NETWORKS:
        for criterion in CRITERIA:
            if network != "as it is" or criterion != "InterpretableGradientLoss":
                found[network, criterion] = counts_of(network, criterion)
            if (network, criterion) == ("as it is", ENTROPY):
                found[network, f"{ENTROPY}, backend cuda"] = counts_of(network, criterion, "cuda")
    for name in EAGER:
        found["as it is", name] = eager_counts(name)
    return found


def _extra(own: Counter[str], base: Counter[str]) -> Iterator[str]:
    """Kernels that are launched more or less often."""
    for name in sorted({*own, *base}):
        more = own[name] - base[name]
        if more:
            short = name.removesuffix("_kernel")
            yield (
                short if more == 1 else f"{short} x{more}" if more > 1 else f"{short} less {-more}"
            )


def beside(found: dict[tuple[str, str], Counts]) -> str:
    """Which operators of PyTorch come beside the kernels of the criterion on CAM entropy."""
    counts, base = found["as it is", ENTROPY], found["as it is", "cross-entropy"]
    own, aten = counts.over(base)
    more = {name: n - base.groups[name] for name, n in counts.groups.items()}
    told = ", ".join(f"{n} for {name}" for name, n in more.items() if name and n)
    return (
        f"Beside the {own} kernels of CAMEntropyLoss, {aten} operators of PyTorch, on few numbers "
        f"each: {told}."
    )


def table(found: dict[tuple[str, str], Counts]) -> str:
    """Markdown."""
    rows = [
        "# Launches of a training step",
        "",
        "`python -m benchmarks.launches --write`, counted without a GPU (see there for what is "
        f"counted), torch {torch.__version__}, triton {environment._version('triton')}. ResNet-18 "
        "of torchvision, 2 images of 64 x 64, float32; forward, loss, backward. Own: launches of "
        "our kernels, by Triton where nothing is said; aten: operators of PyTorch, each about one "
        "launch.",
        "",
        "| network | loss | own | aten | own over CE | aten over CE | own of the criterion |",
        "|---|---|---|---|---|---|---|",
    ]
    for (network, criterion), counts in found.items():
        base = found[network, "cross-entropy"]
        own, aten = counts.over(base)
        names = ", ".join(_extra(counts.own, base.own))
        over = ["", ""] if criterion == "cross-entropy" else [f"{own:+d}", f"{aten:+d}"]
        cells = [network, criterion, str(counts.own.total()), str(counts.aten.total()), *over]
        rows.append(f"| {' | '.join(cells)} | {names if criterion != 'cross-entropy' else ''} |")
    return "\n".join([*rows, "", beside(found)]) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launches", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"into {FILE}")
    parser.add_argument("--ops", action="store_true", help="also by operator")
    arguments = parser.parse_args(argv)
    from benchmarks.passes import _let_torchvision_import

    _let_torchvision_import()
    found = all_counts()
    print(table(found))
    if arguments.ops:
        for (network, criterion), counts in found.items():
            print(f"{network}, {criterion}: {dict(counts.aten.most_common())}")
    if arguments.write:
        FILE.write_text(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
