"""Full-tensor passes over memory per BatchNorm element of one training step.

    python -m benchmarks.passes [--model resnet50] [--size 64] [--ops]

One pass is one full-size tensor read or written once. The figure is bytes read and written, over
the bytes of all BatchNorm inputs of one forward (float32). Counted, on the CPU:

- Every operator that PyTorch runs, seen by a dispatch mode: each distinct tensor that it reads,
  once, each that it writes, once; in place both. ``copy_`` and fills only write their target. The
  library's BatchNorm in training makes two passes over its inputs within one operator (statistics
  or sums, then the elementwise part); they are counted as two, as our kernels make them in two
  calls.
- Every kernel of camkernels: its full-size inputs once, its full-size outputs once, bit masks at
  their bytes; and any copy that its Python side makes.
- Only activations: tensors (B, C, H, W), also transposed to (C, B, H, W). Broadcast dimensions
  (stride 0) are not memory. Not counted: convolutions and matrix products, forward and backward
  (the floor in convolutions is another figure; the result of a strided data gradient is one, also
  where camkernels spreads it over zeros), views, allocations, parameters and logits.

Of the categories "accumulation" is autograd's sum of the cotangents of a tensor with several uses,
"convolutions' copies" what the composite double backward of a convolution does around the
convolutions it calls.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from camkernels.ops import _chain
from camkernels.ops.conv2d import pointwise

NORM = "BatchNorm and ReLU"
RESIDUAL = "residual adds"
ACCUMULATION = "accumulation"
POOLING = "pooling"
CONVOLUTION = "convolutions' copies"
OTHER = "other"
CATEGORIES = (NORM, RESIDUAL, ACCUMULATION, POOLING, CONVOLUTION, OTHER)

_NOT_COUNTED = re.compile(r"conv|^(mm|bmm|addmm|addbmm|baddbmm|linear|matmul)$|^(new_)?empty")
_WRITE_ONLY = re.compile(r"^(copy_|fill_?|zero_?|(new_)?(zeros|ones|full))(_like)?$")
_ADDS = ("add", "add_")


def _category(operator: str, node: str | None) -> str:
    """By the operator, and by the autograd node that runs it (None: in a forward)."""
    if operator in _ADDS and not (node or "").startswith("NativeBatchNormBackwardBackward"):
        return RESIDUAL if node is None else ACCUMULATION
    if re.search(r"batch_norm|relu|threshold", operator):
        return NORM
    where = operator if node is None else node
    if re.search(r"[Pp]ool|[Mm]ean", where):
        return POOLING
    if re.search(r"BatchNorm|BN|Relu|ReLU|Threshold", where):
        return NORM
    return CONVOLUTION if "Conv" in where else OTHER


class Traffic:
    """Bytes of activations read and written, by category and by operator."""

    def __init__(self, batch: int, parameters: Iterable[Tensor]) -> None:
        self.batch = batch
        self.bytes: Counter[str] = Counter()
        self.operators: Counter[tuple[str, str]] = Counter()
        if any(batch in p.shape[:2] for p in parameters if p.dim() == 4):
            raise ValueError(
                f"batch of {batch}: as many as channels, activations would be mistaken"
            )

    def size(self, tensor: Tensor) -> int:
        """Bytes in memory if ``tensor`` is an activation, else 0."""
        lengths = [
            n if s else min(n, 1) for n, s in zip(tensor.shape, tensor.stride(), strict=True)
        ]
        if tensor.dim() != 4 or self.batch not in lengths[:2]:
            return 0
        return math.prod(lengths) * tensor.itemsize

    def add(self, category: str, operator: str, amount: int) -> None:
        self.bytes[category] += amount
        self.operators[category, operator] += amount


def _distinct(tensors: Iterable[Any]) -> list[Tensor]:
    found = {(t.data_ptr(), t.shape, t.stride()): t for t in tensors if isinstance(t, Tensor)}
    return list(found.values())


class _Operators(TorchDispatchMode):
    """Counts what PyTorch's operators read and write."""

    paused = 0

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)
        if self.paused or func.namespace != "aten" or func.is_view:
            return outputs
        name = func._schema.name.split("::")[1]
        if not _NOT_COUNTED.search(name):
            amount = self._amount(func, name, args, kwargs, outputs)
            node = torch._C._current_autograd_node()
            where = node.name() if node is not None else None
            self.traffic.add(_category(name, where), name, amount)
        return outputs

    def _amount(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any
    ) -> int:
        read = _distinct(tree_leaves((args, {k: v for k, v in kwargs.items() if k != "out"})))
        amount = sum(map(self.traffic.size, _distinct(tree_leaves(outputs))))
        if _WRITE_ONLY.match(name):
            read = _distinct(tree_leaves(args[1:])) if name == "copy_" else []
        amount += sum(map(self.traffic.size, read))
        if "batch_norm" in name and _training(func, args, kwargs):
            amount += sum(map(self.traffic.size, read))
        return amount


def _training(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    return bool(named.get("training", named.get("train", True)))


@contextmanager
def _kernels_counted(traffic: Traffic, mode: _Operators) -> Iterator[None]:
    """Every kernel that a room of camkernels asks for by ``_chain.implementation`` is counted, and
    what a convolution writes into its result is not."""
    original = _chain.implementation

    def counted(op: str, kernel: str, backend: str) -> Callable[..., Any]:
        function = original(op, kernel, backend)

        def run(*args: Any, **options: Any) -> Any:
            # the reference's formula stands for a kernel; what others do in aten is real
            mode.paused += backend == "reference"
            try:
                outputs = function(*args, **options)
            finally:
                mode.paused -= backend == "reference"
            amount = 0
            for tensors in (args, outputs if isinstance(outputs, tuple) else (outputs,)):
                for t in _distinct(tensors):
                    amount += t.nbytes if t.dtype == torch.uint8 else traffic.size(t)
            category = NORM if op in ("relu", "batch_norm_relu") else OTHER
            traffic.add(category, kernel, amount)
            return outputs

        return run

    modules = [m for n, m in sys.modules.items() if n.startswith("camkernels") and m is not None]
    holders = [m for m in modules if getattr(m, "implementation", None) is original]
    spread = pointwise.spread

    def convolution(*args: Any) -> Tensor:
        mode.paused += 1
        try:
            return spread(*args)
        finally:
            mode.paused -= 1

    for module in holders:
        module.implementation = counted  # type: ignore[attr-defined]
    pointwise.spread = convolution
    try:
        yield
    finally:
        pointwise.spread = spread
        for module in holders:
            module.implementation = original  # type: ignore[attr-defined]


def count(step: Callable[[], Any], batch: int, parameters: Iterable[Tensor]) -> Traffic:
    """What one step reads and writes.

    Args:
        batch: of the activations; no parameter of four dimensions may have it among its first two,
            or ValueError: by it activations are told from weights.
    """
    traffic = Traffic(batch, parameters)
    mode = _Operators(traffic)
    with _kernels_counted(traffic, mode), mode:
        step()
    return traffic


def norm_bytes(model: nn.Module, images: Tensor) -> int:
    """Bytes of the inputs of all BatchNorms in one forward of an eager model."""
    seen: list[int] = []
    handles = [
        m.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].nbytes))
        for m in model.modules()
        if isinstance(m, nn.BatchNorm2d)
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return sum(seen)


def measure(
    make_model: Callable[[], nn.Module],
    makers: Mapping[str, Callable[[nn.Module], Any]],
    images: Tensor,
    targets: Tensor,
) -> dict[str, tuple[Traffic, int]]:
    """Per side what a step reads and writes, and the bytes of one pass. ``makers`` as in
    members/step_interpretable.py: a model to its loss function and what closes it."""
    one_pass = norm_bytes(make_model(), images)
    out = {}
    for name, maker in makers.items():
        model = make_model()
        loop, close = maker(model)

        def step(loop: Any = loop) -> None:
            loop(images, targets).backward()

        out[name] = count(step, images.shape[0], model.parameters()), one_pass
        close()
    return out


def table(measured: Mapping[str, tuple[Traffic, int]]) -> str:
    """Markdown: one row per side."""
    rows = [
        "| side | total | " + " | ".join(CATEGORIES) + " |",
        "|---" * (len(CATEGORIES) + 2) + "|",
    ]
    for name, (traffic, one_pass) in measured.items():
        shares = [traffic.bytes[c] / one_pass for c in CATEGORIES]
        rows.append(
            f"| {name} | {sum(shares):.1f} | " + " | ".join(f"{s:.1f}" for s in shares) + " |"
        )
    return "\n".join(rows)


def operators(measured: Mapping[str, tuple[Traffic, int]]) -> str:
    """The same by operator and kernel, largest first."""
    rows = []
    for name, (traffic, one_pass) in measured.items():
        rows.append(f"{name}:")
        for (category, operator), amount in traffic.operators.most_common():
            if amount / one_pass >= 0.005:
                rows.append(f"  {amount / one_pass:7.2f}  {operator}  ({category})")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.passes", description=__doc__)
    parser.add_argument("--model", default="resnet50", help="a classifier of torchvision")
    parser.add_argument("--batch", type=int, default=5)
    parser.add_argument("--size", type=int, default=64, help="of the images")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--side", action="append", help="only these sides")
    parser.add_argument("--ops", action="store_true", help="also by operator and kernel")
    arguments = parser.parse_args(argv)
    _let_torchvision_import()
    from benchmarks.harness import Options
    from benchmarks.members import _steps, step_interpretable

    images, targets = _steps.batch(arguments.batch, arguments.size, Options(), torch.float32)
    layout = torch.channels_last if arguments.channels_last else torch.contiguous_format
    measured = measure(
        lambda: _steps.network(arguments.model).to(memory_format=layout),  # type: ignore[call-overload]
        {
            name: maker
            for name, maker in step_interpretable.makers().items()
            if arguments.side is None or name in arguments.side
        },
        images.contiguous(memory_format=layout),
        targets,
    )
    print(f"Passes per BatchNorm element, {arguments.model}, batch of {arguments.batch} images of ")
    print(f"{arguments.size} x {arguments.size}, {layout}, float32, torch {torch.__version__}\n")
    print(table(measured))
    if arguments.ops:
        print("\n" + operators(measured))
    return 0


def _let_torchvision_import() -> None:
    from benchmarks.runner import torchvision_path

    if torchvision_path():
        sys.path.insert(0, torchvision_path())
        __import__("sitecustomize")


if __name__ == "__main__":
    sys.exit(main())
