"""Results on disk, and the tables made from them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "results"
REQUIRED = {
    "schema": int,
    "benchmark": str,
    "baseline": str,
    "options": dict,
    "date": str,
    "command": str,
    "host_kind": str,
    "environment": dict,
    "cases": dict,
}
REQUIRED_OF_SIDE = (
    "milliseconds",
    "host_milliseconds",
    "page_faults_per_run",
    "rounds",
    "ratio_to",
)


def validate(result: dict[str, Any]) -> None:
    """Raise ValueError where a result lacks what the tables and plots read."""
    for key, kind in REQUIRED.items():
        if not isinstance(result.get(key), kind):
            raise ValueError(f"result: {key!r} must be {kind.__name__}, got {result.get(key)!r}")
    for name, case in result["cases"].items():
        if result["baseline"] not in case["sides"]:
            raise ValueError(f"case {name!r} has no side {result['baseline']!r}")
        for side, figures in case["sides"].items():
            missing = [key for key in REQUIRED_OF_SIDE if key not in figures]
            if missing:
                raise ValueError(f"case {name!r}, side {side!r} lacks {', '.join(missing)}")


def write(result: dict[str, Any], folder: Path) -> Path:
    """Write ``<folder>/<host kind>/<name>.json``; the dtype joins the name unless float32, and the
    backend if it is cuda, which auto never takes."""
    validate(result)
    dtype = result["options"]["dtype"]
    name = result["benchmark"] + ("" if dtype == "float32" else f"-{dtype}")
    name += "-cuda" if result["environment"].get("backend") == "cuda" else ""
    path = folder / result["host_kind"] / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rounded(result), indent=1) + "\n")
    return path


def rounded(value: Any) -> Any:
    """Floats to five significant digits: more would be noise."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value


def load_all(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """All results below a folder, sorted by path; the table of kernels is none."""
    out = []
    for path in sorted(p for p in folder.rglob("*.json") if p.name != "kernels.json"):
        result = json.loads(path.read_text())
        validate(result)
        out.append((path, result))
    return out


def conditions(result: dict[str, Any]) -> str:
    """One line: where, how and when a result was measured."""
    environment, options = result["environment"], result["options"]
    gpu = environment.get("gpu")
    where = gpu["name"] if gpu else f"{environment['cpu']}, {environment['threads']} threads"
    commit = (environment.get("commit") or "no commit")[:9]
    dirty = " with changes" if environment.get("uncommitted_changes") else ""
    return (
        f"{where}; {options['dtype']}; backend {environment['backend']}; torch "
        f"{environment['torch']}; {result['date'][:10]}; {commit}{dirty}"
    )


def exponents(result: dict[str, Any], side: str) -> dict[str, float]:
    """Least-squares exponent of time against the factor, per ``op axis`` (linearity only)."""
    points: dict[str, list[tuple[float, float]]] = {}
    for case in result["cases"].values():
        if "axis" in case:
            seconds = case["sides"][side]["milliseconds"]["q50"]
            point = (math.log(case["factor"]), math.log(seconds))
            points.setdefault(f"{case['op']} {case['axis']}", []).append(point)
    out = {}
    for key, pairs in points.items():
        mean_x = sum(x for x, _ in pairs) / len(pairs)
        mean_y = sum(y for _, y in pairs) / len(pairs)
        spread = sum((x - mean_x) ** 2 for x, _ in pairs)
        out[key] = sum((x - mean_x) * (y - mean_y) for x, y in pairs) / spread
    return out


def _ratio(figures: dict[str, Any], against: str, own: str) -> str:
    if own == against:
        return "1"
    ratio = figures["ratio_to"].get(against)
    return f"{ratio['q50']:.2f} [{ratio['q20']:.2f}, {ratio['q80']:.2f}]" if ratio else ""


def _memory(case: dict[str, Any], figures: dict[str, Any], key: str, baseline: str) -> str:
    value, base = figures.get(key), case["sides"][baseline].get(key)
    if value is None:
        return ""
    share = f" ({value / base:.2f}x)" if base else ""
    return f"{value / 2**20:.1f}{share}"


def table(result: dict[str, Any]) -> str:
    """Markdown: one row per case and side."""
    baseline = result["baseline"]
    rows = [
        f"**{result['benchmark']}**: {result['about']}. {conditions(result)}. "
        f"`{result['command']}`",
        "",
        f"| case | side | ms | time / {baseline} [q20, q80] | time / copy | GB/s "
        "| peak MiB | saved MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, case in result["cases"].items():
        for side, figures in case["sides"].items():
            rate = figures.get("gigabytes_per_second")
            cells = [
                name,
                side,
                f"{figures['milliseconds']['q50']:.3g}",
                _ratio(figures, baseline, side),
                _ratio(figures, "copy", side),
                "" if rate is None else f"{rate:.1f}",
                _memory(case, figures, "peak_bytes", baseline),
                _memory(case, figures, "saved_bytes", baseline),
            ]
            rows.append("| " + " | ".join(cells) + " |")
        for side, reason in case["unavailable"].items():
            rows.append(f"| {name} | {side} | {reason} | | | | | |")
    if result["benchmark"] == "linearity":
        for side in ("ours", "copy"):
            fitted = ", ".join(f"{k}: {v:.2f}" for k, v in exponents(result, side).items())
            rows += ["", f"Exponents of {side}: {fitted}."]
    rows += ["", *(f"- {caveat}" for caveat in result.get("caveats", []))]
    return "\n".join(rows).rstrip() + "\n"
