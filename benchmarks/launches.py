"""How often a training step launches a kernel: ``python -m benchmarks.launches``, without a GPU.

A step runs on the meta device, where tensors have shapes and no numbers, and takes the way that it
takes on a GPU with the Triton backend:

- own: our Triton kernels. Their host code runs, and the launch at its end is counted, not made.
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

    def over(self, other: Counts) -> tuple[int, int]:
        """How many more of each."""
        return self.own.total() - other.own.total(), self.aten.total() - other.aten.total()


class _Operators(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        tensors = tree_leaves((args, kwargs, outputs))
        on_device = any(isinstance(t, Tensor) and t.is_meta for t in tensors)
        if on_device and not func.is_view and not _NO_LAUNCH.match(name):
            self.found[name] += 1
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


@contextmanager
def as_on_a_gpu(launched: Counter[str]) -> Iterator[None]:
    """The Triton backend takes meta tensors; a launch is entered in ``launched``."""
    from camkernels.ops import _triton_launch as host

    original = _chain.implementation

    def implementation(op: str, kernel: str, backend: str) -> Callable[..., Any]:
        return original(op, kernel, "triton" if backend == "meta" else backend)

    def launch(kernel: Any, grid: Any, like: Tensor, *args: Any, **constants: Any) -> None:
        launched[kernel.__name__] += 1

    modules = [m for n, m in sys.modules.items() if n.startswith("camkernels") and m is not None]
    patches = [
        mock.patch.object(m, "implementation", implementation)
        for m in modules
        if getattr(m, "implementation", None) is original
    ]
    patches += [
        mock.patch.object(host, "launch", launch),
        mock.patch.object(host, "multiprocessors", return_value=132),
        mock.patch.object(backends, "unavailable_reason", return_value=None),
        mock.patch.object(backends, "_unsuited_reason", return_value=None),
        # a dispatch mode counts here, and traces nothing
        mock.patch.object(_chain, "_is_traced", return_value=False),
        mock.patch.object(Evaluator, "_guard", _guarded(Evaluator._guard)),
    ]
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        stack.enter_context(ck.backend("triton"))
        yield


def count(step: Step, warm_up: int = 2) -> Counts:
    """Of a step after ``warm_up`` others."""
    found = Counts()
    with as_on_a_gpu(found.own):
        for _ in range(warm_up):
            step()
        found.own.clear()
        with _Operators(found.aten):
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

    return _steps.resnet("resnet18").to(META)


def _engine(memory: str) -> Callable[[nn.Module], nn.Module]:
    return lambda model: ck.swap_in(model, engine=True, memory=memory)


NETWORKS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "as it is": lambda model: model,
    "swap_in": ck.swap_in,
    "engine fast": _engine("fast"),
    "engine lean": _engine("lean"),
}
CRITERIA: dict[str, Criterion] = {
    "cross-entropy": plain,
    "CAMEntropyLoss, closed form": entropy,
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


def counts_of(network: str, criterion: str) -> Counts:
    """One cell of the table."""
    model = NETWORKS[network](_network())
    loss = CRITERIA[criterion](model)
    return count(step_of(model, lambda x, y: loss(model(x), y), *batch()))


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


def table(found: dict[tuple[str, str], Counts]) -> str:
    """Markdown."""
    rows = [
        "# Launches of a training step",
        "",
        "`python -m benchmarks.launches --write`, counted without a GPU (see there for what is "
        f"counted), torch {torch.__version__}, triton {environment._version('triton')}. ResNet-18 "
        "of torchvision, 2 images of 64 x 64, float32; forward, loss, backward. Own: launches of "
        "our Triton kernels; aten: operators of PyTorch, each about one launch.",
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
    return "\n".join(rows) + "\n"


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
