"""Figures of results: time and memory per side, bandwidth of kernels, the linearity curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.results import conditions, exponents

COLOURS = {
    "ours": "#0072b2",
    "eager": "#d55e00",
    "careful": "#d55e00",
    "compile": "#e69f00",
    "separate": "#cc79a7",
    "closed_form": "#009e73",
    "plain": "#7f7f7f",
    "swapped_plain": "#56b4e9",
    "copy": "#bdbdbd",
}
LABELS = {
    "ours": "camkernels",
    "eager": "careful eager",
    "compile": "torch.compile",
    "copy": "copy of the ideal bytes",
    "plain": "cross-entropy alone",
    "careful": "careful eager loop",
    "separate": "separate forward",
    "closed_form": "eager, closed-form weights",
    "swapped_plain": "cross-entropy alone, swapped modules",
}
TARGET = 0.75
"""Share of a copy's bandwidth that kernels shall reach beyond the caches."""


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#e5e5e5",
            "axes.axisbelow": True,
            "figure.constrained_layout.use": True,
        }
    )
    return plt


def plot(result: dict[str, Any], path: Path) -> Path:
    """Write the figure of one result to ``path``."""
    special = {"linearity": _linearity, "batch_norm_relu_kernels": _bandwidth}
    figure = special.get(result["benchmark"], _bars)(result)
    figure.savefig(path, dpi=150)
    _pyplot().close(figure)
    return path


def _bars(result: dict[str, Any]) -> Any:
    """Left: time against the baseline with quantiles 0.2 and 0.8; right: peak and saved MiB."""
    plt, cases, baseline = _pyplot(), result["cases"], result["baseline"]
    sides = list(dict.fromkeys(s for case in cases.values() for s in case["sides"]))
    height = 1.2 + len(cases) * (0.2 + 0.17 * len(sides))
    figure, axes = plt.subplots(1, 3, figsize=(12, height), sharey=True)
    step = 0.85 / len(sides)
    for i, side in enumerate(sides):
        rows = [(r, c["sides"][side]) for r, c in enumerate(cases.values()) if side in c["sides"]]
        style = {"height": step, "color": COLOURS.get(side, "#56b4e9")}
        at = [r + (i - (len(sides) - 1) / 2) * step for r, _ in rows]
        one = {"q20": 1.0, "q50": 1.0, "q80": 1.0}
        ratios = [one if side == baseline else f["ratio_to"][baseline] for _, f in rows]
        middle = [q["q50"] for q in ratios]
        errors = [
            [q["q50"] - q["q20"] for q in ratios],
            [q["q80"] - q["q50"] for q in ratios],
        ]
        label = LABELS.get(side, side)
        axes[0].barh(at, middle, xerr=errors, label=label, error_kw={"lw": 0.8}, **style)
        for y, q in zip(at, ratios, strict=True):
            axes[0].annotate(
                f"{q['q50']:.2f}",
                (q["q80"], y),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
            )
        for axis, key in ((axes[1], "peak_bytes"), (axes[2], "saved_bytes")):
            axis.barh(at, [(f.get(key) or 0) / 2**20 for _, f in rows], **style)
    axes[0].axvline(1, color="black", lw=0.8)
    axes[0].set_yticks(range(len(cases)), list(cases))
    axes[0].invert_yaxis()
    axes[0].set_xlabel(f"time / {LABELS.get(baseline, baseline)} (median of pairs, 20 to 80 %)")
    axes[1].set_xlabel("peak memory of the step (MiB, at the allocator)")
    axes[2].set_xlabel("saved for backward (MiB)")
    for axis in axes:
        axis.grid(axis="y", visible=False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.suptitle(f"{result['benchmark']}: {result['about']}\n{conditions(result)}", fontsize=9)
    return figure


def _bandwidth(result: dict[str, Any]) -> Any:
    """Bandwidth of ours as a share of the copy's, from paired times."""
    plt, cases = _pyplot(), result["cases"]
    figure, axis = plt.subplots(figsize=(8, 1.2 + 0.2 * len(cases)))
    shares = [c["sides"]["copy"]["ratio_to"]["ours"] for c in cases.values()]
    middle = [q["q50"] for q in shares]
    errors = [[q["q50"] - q["q20"] for q in shares], [q["q80"] - q["q50"] for q in shares]]
    at = range(len(cases))
    axis.barh(at, middle, xerr=errors, color=COLOURS["ours"], error_kw={"lw": 0.8})
    for y, q in zip(at, shares, strict=True):
        rate = list(cases.values())[y]["sides"]["ours"]["gigabytes_per_second"]
        axis.annotate(f"{q['q50']:.2f} ({rate:.1f} GB/s)", (q["q80"], y), va="center", fontsize=7)
    axis.axvline(TARGET, color="black", lw=0.8)
    axis.set_yticks(at, list(cases), fontsize=7)
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("bandwidth / that of a copy of the same bytes (median of pairs, 20 to 80 %)")
    axis.set_title(f"{result['benchmark']}: {result['about']}\n{conditions(result)}", fontsize=8)
    return figure


def _linearity(result: dict[str, Any]) -> Any:
    plt = _pyplot()
    cases = list(result["cases"].values())
    ops = list(dict.fromkeys(c["op"] for c in cases))
    labels = {"B": "batch B", "K": "channels K", "hw": "pixels h w"}
    names = {a: text for a, text in labels.items() if any(c["axis"] == a for c in cases)}
    figure, axes = plt.subplots(
        len(ops), len(names), figsize=(11, 3 * len(ops) + 0.7), sharey="row", squeeze=False
    )
    for row, op in enumerate(ops):
        for column, axis in enumerate(names):
            ax = axes[row][column]
            points = [c for c in cases if c["op"] == op and c["axis"] == axis]
            factors = [c["factor"] for c in points]
            for side in ("ours", "copy"):
                q = [c["sides"][side]["milliseconds"] for c in points]
                slope = exponents(result, side)[f"{op} {axis}"]
                label = f"{LABELS[side]}: exponent {slope:.2f}"
                ax.plot(factors, [v["q50"] for v in q], "o-", color=COLOURS[side], label=label)
                low, high = [v["q20"] for v in q], [v["q80"] for v in q]
                ax.fill_between(factors, low, high, color=COLOURS[side], alpha=0.25, lw=0)
            ax.set_xscale("log", base=2)
            ax.set_yscale("log", base=2)
            ax.set_xticks(factors, [f"x{f}" for f in factors])
            ax.yaxis.set_major_formatter(plt.FormatStrFormatter("%g"))
            ax.set_xlabel(f"{names[axis]} (x1: {'x'.join(map(str, points[0]['shape']))})")
            ax.legend(frameon=False)
        axes[row][0].set_ylabel(f"{op}\nforward + backward (ms)")
    figure.suptitle(f"{result['about']}\n{conditions(result)}", fontsize=9)
    return figure
