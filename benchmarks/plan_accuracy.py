"""How near ``camtrain plan`` comes to measured memory: ``python -m benchmarks.plan_accuracy``.

The same step (``camtrain.counting.Step``: pictures, gradients of the step before, forward, loss,
backward) is counted on the meta device by the rules of the CPU, and run on the CPU in a process of
its own whose malloc gives freed memory back at once (``benchmarks/memory.py``): VmHWM less VmRSS
before a warmed-up step. Parameters and the optimiser's state lie there before on both sides and are
left out, which makes the comparison a harder one.

``--claims`` prints instead what the plan predicts for batches of ResNet-50 at 224 x 224 within 8,
11 and 24 GB of a GPU, against eager PyTorch; nothing of that is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks import environment, loops, memory, results
from benchmarks.members.step_interpretable import WEIGHT
from benchmarks.runner import torchvision_path

BUDGETS = (8, 11, 24)  # GB
TARGET = 0.05


@dataclass(frozen=True)
class Case:
    arch: str
    batch: int
    size: int
    recipe: str
    engine: str


CASES = tuple(
    Case(*network, *way)
    for network in (("resnet18", 8, 128), ("resnet50", 4, 128), ("squeezenet1_1", 8, 128))
    for way in (
        ("entropy", "off"), ("entropy", "lean"),
        ("interpretable", "off"), ("interpretable", "fast"), ("interpretable", "lean"),
    )
)  # fmt: skip


def _config(case: Case, **more: Any) -> Any:
    from camtrain import config

    given = {"recipe": case.recipe, "arch": case.arch, "image_size": case.size,
             "channels_last": False}  # fmt: skip
    beta = {"beta": 0.1} if case.recipe == "entropy" else {}
    return config.resolve({**given, **beta, "engine": case.engine, "weights": "none", **more})


def measure(case: Case) -> int:
    """Bytes, on the CPU; in a process with the malloc settings of ``memory.PEAK_MALLOC``."""
    from camtrain.counting import step_of

    step, _ = step_of(_config(case), 20, "cpu")
    return memory.host_peak(lambda: step.run(case.batch))


def predict(case: Case) -> int:
    """Bytes, by the ledger."""
    from camtrain.counting import Peaks, step_of

    return Peaks(*step_of(_config(case), 20), device="cpu").without_update(case.batch)


def table() -> str:
    """Markdown, one row per case; told on the way."""
    cpu = environment.cpu_model()
    head = [
        f"Peak of a training step, counted by `camtrain plan`'s rules for the CPU and measured "
        f"(VmHWM) there: `python -m benchmarks.plan_accuracy`, torch {torch.__version__}, "
        f"{cpu}, {torch.get_num_threads()} thread(s). Float32, one process per "
        "measurement, without parameters and the optimiser's state.",
        "",
        "| network, batch, size | recipe | engine | predicted, MiB | measured, MiB | error |",
        "|---|---|---|---|---|---|",
    ]
    child = memory.process_environment(memory.PEAK_MALLOC, torchvision_path())
    rows, errors = [], []
    for case in CASES:
        words = [
            sys.executable,
            "-m",
            "benchmarks.plan_accuracy",
            "--one",
            json.dumps(asdict(case)),
        ]
        done = subprocess.run(words, env=child, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{case}: {done.stderr[-2000:]}")
        measured, predicted = int(done.stdout.split()[-1]), predict(case)
        errors.append(predicted / measured - 1)
        rows.append(
            f"| {case.arch}, {case.batch}, {case.size} | {case.recipe} | {case.engine} | "
            f"{predicted / 2**20:.1f} | {measured / 2**20:.1f} | {errors[-1]:+.1%} |"
        )
        print(rows[-1], file=sys.stderr, flush=True)
    within = sum(abs(error) <= TARGET for error in errors)
    foot = ["", f"Within {TARGET:.0%}: {within} of {len(errors)}; furthest: "
            f"{max(errors, key=abs):+.1%}."]  # fmt: skip
    return "\n".join([*head, *rows, *foot]) + "\n"


# --- the claims ---------------------------------------------------------------------------------


def _eager(make: Callable[[Any], tuple[loops.Loop, Any]], config: Any) -> Any:
    """Peaks of a loop that users write, counted as those of the recipes."""
    from camtrain.counting import Peaks, Step, network

    model = network(config, 1000, "meta")
    loop, _ = make(model)
    step = Step(lambda batch: loop(batch["images"], batch["targets"]), model, config, "meta")
    return Peaks(step, model)


def claims() -> str:
    """Markdown."""
    from camtrain.counting import Peaks, step_of

    precision: Callable[[], AbstractContextManager[Any]] = nullcontext

    def ours(recipe: str, engine: str) -> Any:
        config = _config(Case("resnet50", 0, 224, recipe, engine), optimizer="sgd")
        return Peaks(*step_of(config, 1000))

    plain = _config(Case("resnet50", 0, 224, "baseline", "off"), optimizer="sgd")
    sides = {
        "cross-entropy, eager": _eager(loops.plain, plain),
        "interpretable, eager": _eager(lambda m: loops.interpretable(m, WEIGHT, precision), plain),
        **{
            f"interpretable, engine {engine}": ours("interpretable", engine)
            for engine in ("off", "fast", "lean", "lean-bf16")
        },
        "CAM entropy at layer4, eager": _eager(lambda m: loops.careful(m, "layer4", 0.1), plain),
        **{
            f"CAM entropy at layer4, engine {engine}": ours("entropy", engine)
            for engine in ("off", "fast", "lean")
        },
    }
    heads = " | ".join(f"{gb} GB" for gb in BUDGETS)
    rows = [
        "Largest batch of ResNet-50, 1000 classes, 224 x 224, float32, SGD with momentum, by "
        "`camtrain plan`'s counting, not measured on a GPU: `python -m benchmarks.plan_accuracy "
        f"--claims`, torch {torch.__version__}. In brackets: against the eager interpretable step "
        "or, for CAM entropy, against eager cross-entropy.",
        "",
        f"| step | {heads} |",
        "|---|" + "---|" * len(BUDGETS),
    ]
    found = {name: [peaks.largest(gb * 1e9) for gb in BUDGETS] for name, peaks in sides.items()}
    for name, batches in found.items():
        kind = "interpretable" if name.startswith("interpretable") else "cross-entropy"
        against = found[f"{kind}, eager"]
        cells = [f"{b} ({b / a:.2f}x)" for b, a in zip(batches, against, strict=True)]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--claims", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="into benchmarks/results")
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(measure(Case(**json.loads(arguments.one))))
        return
    text = claims() if arguments.claims else table()
    print(text)
    if arguments.write:
        if arguments.claims:
            path = results.FOLDER / "plan_resnet50.md"
        else:
            path = results.FOLDER / environment.host_kind("cpu") / "plan_accuracy.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
