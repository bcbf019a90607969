"""Predicted, not measured: milliseconds of training steps from counted work and given rates.

    python -m benchmarks.roofline [--preset h200 ...] [--write]
    python -m benchmarks.roofline --bandwidth GB/s --tflops N [--conv-share S] [--memory-share S]

Counted without a GPU, of a ResNet-50 at 64 x 3 x 224 x 224 in bfloat16, channels_last:

- convolutions and matrix products: the step runs on the meta device, and of each product its
  operations and the bytes of its operands and result are entered. It takes the longer of operations
  over the rate and bytes over the bandwidth.
- everything else: passes over memory per BatchNorm element (benchmarks/passes.py, which counts them
  at a small size on the CPU), times the BatchNorm elements of this step, over the bandwidth.

Left out: launches, allocations, the optimiser's step, what overlaps; what a step in bfloat16
keeps in float32 all the same is counted as if it did not. Rates are a datasheet's (the
floor) or shares of it. A figure from here is a lead for what to look at, no claim.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import camkernels as ck
from benchmarks import environment, loops, passes, results
from benchmarks.members._steps import Maker

FILE = results.FOLDER / "roofline.md"
CACHE = environment.ROOT / "build" / "roofline.json"
BATCH, SIZE, DTYPE = 64, 224, torch.bfloat16
aten = torch.ops.aten


# --- rates --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """Of a GPU: GB/s of memory, TFLOP/s of dense bfloat16 products summed in float32."""

    bandwidth: float
    tflops: float
    source: str
    conv_share: float = 1.0
    memory_share: float = 1.0

    def reached(self, conv_share: float, memory_share: float) -> Rates:
        return Rates(self.bandwidth, self.tflops, self.source, conv_share, memory_share)


PRESETS = {
    "h200": Rates(4800, 989, "NVIDIA H200 SXM datasheet: 4.8 TB/s, 1979 TFLOP/s with sparsity"),
    "h100": Rates(3350, 989, "NVIDIA H100 SXM datasheet: 3.35 TB/s, 1979 TFLOP/s with sparsity"),
    "a100-80gb": Rates(2039, 312, "NVIDIA A100 80GB SXM datasheet: 2,039 GB/s, 312 TFLOP/s"),
    "rtx4090": Rates(1008, 165.2, "NVIDIA Ada whitepaper: 1008 GB/s, 165.2 TFLOP/s"),
    "rtx3060": Rates(
        360, 25.5, "NVIDIA's product page: 360 GB/s, 12.7 TFLOP/s of float32; bfloat16 products "
        "summed in float32 at twice that, as the GA102 whitepaper has it for its GPUs"
    ),
}  # fmt: skip
# Shares of a datasheet's rates that were seen elsewhere or assumed.
ASSUMED = (0.28, 0.9)
ASSUMED_SOURCE = (
    "convolutions at 28 % of the rate (an assumption: 1.9 ms for the 0.525 TFLOP of one pass over "
    "all convolutions on an H200), memory at 90 % (a copy on such a machine moved 4.3 TB/s)"
)


# --- work ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """Of one step: operations and bytes of each product, full-size passes over memory."""

    products: tuple[tuple[int, int], ...]
    passes: float
    elements: int
    """Of all BatchNorm inputs."""

    @property
    def flops(self) -> int:
        return sum(flops for flops, _ in self.products)

    @property
    def bytes(self) -> float:
        """That passes over memory move."""
        return self.passes * self.elements * DTYPE.itemsize

    def milliseconds(self, rates: Rates) -> tuple[float, float]:
        """Of products, and of passes over memory."""
        bandwidth = rates.bandwidth * 1e9 * rates.memory_share
        rate = rates.tflops * 1e12 * rates.conv_share
        products = sum(max(f / rate, b / bandwidth) for f, b in self.products)
        return 1e3 * products, 1e3 * self.bytes / bandwidth


def _bytes(*tensors: Any) -> int:
    return sum(t.numel() * t.itemsize for t in tensors if isinstance(t, Tensor))


class _Products(TorchDispatchMode):
    """Operations and bytes of convolutions and matrix products; a convolution's backward is two."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is None:
            return outputs
        flops = count(*args, **(kwargs or {}), out_val=outputs)
        if func is not aten.convolution_backward.default:
            self.found.append((flops, _bytes(*tree_leaves((args, outputs)))))
            return outputs
        grad, x, weight, mask = args[0], args[1], args[2], args[-1]
        each = flops // max(sum(mask[:2]), 1)
        if mask[0]:
            self.found.append((each, _bytes(grad, weight, outputs[0])))
        if mask[1]:
            self.found.append((each, _bytes(grad, x, outputs[1])))
        return outputs


def products(maker: Maker, make_model: Callable[[], nn.Module], batch: int, size: int) -> list[Any]:
    """Of the second step on the meta device; an engine traces and plans in the first."""
    model = make_model().to("meta", DTYPE)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    loop, close = maker(model)
    images = torch.empty(batch, 3, size, size, dtype=DTYPE, device="meta")
    images = images.contiguous(memory_format=torch.channels_last)
    targets = torch.zeros(batch, dtype=torch.long, device="meta")
    mode = _Products()
    loop(images, targets).backward()
    for p in model.parameters():
        p.grad = None
    with mode:
        loop(images, targets).backward()
    close()
    return mode.found


def norm_elements(make_model: Callable[[], nn.Module], batch: int, size: int) -> int:
    """Of the inputs of all BatchNorms."""
    images = torch.empty(batch, 3, size, size, device="meta")
    return passes.norm_bytes(make_model().to("meta"), images) // 4


# --- the steps ----------------------------------------------------------------------------------


def _engine(memory: str) -> Maker:
    def make(model: nn.Module) -> tuple[loops.Loop, Callable[[], None]]:
        model = ck.swap_in(model, engine=True, memory=memory)
        criterion = ck.InterpretableGradientLoss(model, "cosine", 1.0)
        return lambda images, targets: criterion(model(images), targets), criterion.close

    return make


def _swapped(model: nn.Module) -> tuple[loops.Loop, Callable[[], None]]:
    model = ck.swap_in(model)
    criterion = ck.InterpretableGradientLoss(model, "cosine", 1.0)
    return lambda images, targets: criterion(model(images), targets), criterion.close


def _entropy(model: nn.Module) -> tuple[loops.Loop, Callable[[], None]]:
    criterion = ck.CAMEntropyLoss(model, "layer4", beta=0.1)
    return lambda images, targets: criterion(model(images), targets), criterion.close


PLAIN = "plain cross-entropy"
STEPS: dict[str, Maker] = {
    PLAIN: loops.plain,
    "CAM entropy, closed form": _entropy,
    "interpretable, eager": lambda m: loops.interpretable(m, 1.0),
    "interpretable, swap_in": _swapped,
    "interpretable, engine fast": _engine("fast"),
    "interpretable, engine lean": _engine("lean"),
}


def count(
    arch: str = "resnet50", batch: int = BATCH, size: int = SIZE, small: tuple[int, int] = (5, 64),
    steps: Mapping[str, Maker] = STEPS,
) -> dict[str, Work]:  # fmt: skip
    """Work of every step; ``small``: batch and size at which passes are counted."""
    from benchmarks.harness import Options
    from benchmarks.members import _steps

    def make_model() -> nn.Module:
        return _steps.network(arch)

    def laid() -> nn.Module:
        return make_model().to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    images, targets = _steps.batch(*small, Options(), torch.float32)
    images = images.contiguous(memory_format=torch.channels_last)
    elements = norm_elements(make_model, batch, size)
    found = {}
    for name, maker in steps.items():
        ((traffic, one_pass),) = passes.measure(laid, {name: maker}, images, targets).values()
        made = products(maker, make_model, batch, size)
        found[name] = Work(tuple(made), traffic.bytes.total() / one_pass, elements)
        print(f"counted {name}", file=sys.stderr, flush=True)
    return found


# --- tables -------------------------------------------------------------------------------------


def table(found: Mapping[str, Work], rates: Rates, measured: str = "not measured") -> str:
    """Markdown: a row per step, at the rates as they are and at shares that are assumed."""
    floor = rates
    likely = rates if rates.conv_share != 1 else rates.reached(*ASSUMED)
    rows = [
        "| step | products, TFLOP | passes | GB in passes | floor, ms | / plain "
        "| at assumed shares, ms | / plain | measured, ms |",
        "|---" * 9 + "|",
    ]
    base = [sum(found[PLAIN].milliseconds(r)) for r in (floor, likely)]
    for name, work in found.items():
        times = [sum(work.milliseconds(r)) for r in (floor, likely)]
        rows.append(
            f"| {name} | {work.flops / 1e12:.2f} | {work.passes:.1f} | {work.bytes / 1e9:.1f} "
            f"| {times[0]:.1f} | {times[0] / base[0]:.2f} | {times[1]:.1f} "
            f"| {times[1] / base[1]:.2f} | {measured} |"
        )
    return "\n".join(rows)


def document(found: Mapping[str, Work], presets: Iterable[str]) -> str:
    """All presets in one file."""
    lines = [
        "# Predicted, not measured: training steps by a roofline",
        "",
        "`python -m benchmarks.roofline --write`: milliseconds of a ResNet-50 step at "
        f"{BATCH} x 3 x {SIZE} x {SIZE}, bfloat16, channels_last, computed from counted work and "
        "a datasheet's rates, torch "
        f"{torch.__version__}. No GPU ran any of it. One pass over all convolutions is a third of "
        "plain's products; passes are full-size passes over memory per BatchNorm element.",
        "",
        "Floor: the datasheet's rates, which nothing reaches. Assumed shares: "
        f"{ASSUMED_SOURCE}; applied to every GPU alike, also where nobody has looked.",
        "",
    ]
    for name in presets:
        rates = PRESETS[name]
        lines += [
            f"## {name}",
            "",
            f"{rates.bandwidth:g} GB/s, {rates.tflops:g} TFLOP/s dense ({rates.source}).",
            "",
            table(found, rates),
            "",
        ]
    return "\n".join(lines).rstrip() + "\n"


def _fingerprint() -> str:
    """Of what decides the counts."""
    digest = hashlib.sha256(torch.__version__.encode())
    own = [environment.ROOT / "benchmarks" / f"{name}.py" for name in ("passes", "loops", "eager")]
    for path in [*own, *sorted((environment.ROOT / "camkernels").rglob("*.py"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _counted(again: bool) -> dict[str, Work]:
    """From build/roofline.json where an earlier run of the same sources left it."""
    key = _fingerprint()
    if CACHE.exists() and not again:
        kept = json.loads(CACHE.read_text())
        if kept["sources"] == key:
            return {n: Work(tuple(map(tuple, w.pop("products"))), **w)
                    for n, w in kept["work"].items()}  # fmt: skip
    found = count()
    CACHE.parent.mkdir(exist_ok=True)
    work = {name: asdict(w) for name, w in found.items()}
    CACHE.write_text(json.dumps({"sources": key, "work": work}))
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.roofline", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--preset", action="append", choices=list(PRESETS))
    parser.add_argument("--bandwidth", type=float, help="GB/s")
    parser.add_argument("--tflops", type=float, help="of dense bfloat16 products")
    parser.add_argument("--conv-share", type=float, default=1.0, help="of tflops that is reached")
    parser.add_argument("--memory-share", type=float, default=1.0, help="of bandwidth")
    parser.add_argument("--again", action="store_true", help="count anew")
    parser.add_argument("--write", action="store_true", help=f"all presets into {FILE}")
    arguments = parser.parse_args(argv)
    given = (arguments.bandwidth, arguments.tflops)
    if (given[0] is None) != (given[1] is None):
        parser.error("--bandwidth and --tflops belong together")
    passes._let_torchvision_import()
    found = _counted(arguments.again)
    if given[0] is not None:
        shares = (arguments.conv_share, arguments.memory_share)
        print("Predicted, not measured.\n")
        print(table(found, Rates(*given, "given", *shares)))
        return 0
    text = document(found, arguments.preset or PRESETS)
    print(text)
    if arguments.write:
        FILE.write_text(document(found, PRESETS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
