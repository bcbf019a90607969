"""The table of kernels as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.kernels_cuda import NARROW
from benchmarks.kernels_limits import LIMITS, occupancy

Row = dict[str, Any]
INTRODUCTION = """\
# Kernels as compiled

Made by `python -m benchmarks.kernels`, without a GPU: what the compilers made of the kernels, and
nothing about their speed. {versions}.

A cell is `registers a thread / shared bytes of a block -> warps a multiprocessor`; `spill n` are
bytes of local memory a thread. Warps are the theoretical occupancy, computed from registers, shared
memory and threads against each architecture's limits (benchmarks/kernels_limits.py; sources there):
{limits}. Loads and stores are instructions on global memory, as `bytes x how many` (of PTX for
Triton and of machine code for CUDA C++), for sm_90 or the first capability that compiles.
"""
COMPLETE = (
    "Everything compiles for every capability; bfloat16 also for sm_75, which has no instructions "
    "for it: values are widened to float32 by shifts."
)


def _versions(found: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {value or 'not here'}" for name, value in found.items())


def _limits(capabilities: list[int]) -> str:
    return "; ".join(
        f"sm_{c} {LIMITS[c].warps} warps, {LIMITS[c].shared // 1024} KiB" for c in capabilities
    )


def _widths(widths: dict[str, int]) -> str:
    return " ".join(f"{w}x{n}" for w, n in widths.items()) or "none"


def _cell(capability: int, figures: dict[str, Any] | None) -> str:
    if figures is None:
        return ""
    if "error" in figures:
        return "does not compile"
    fits = occupancy(capability, figures["registers"], figures["shared_bytes"], figures["warps"])
    spill = f", spill {figures['local_bytes']}" if figures["local_bytes"] else ""
    return f"{figures['registers']} / {figures['shared_bytes']} -> {fits.warps}{spill}"


def _shown(row: Row) -> dict[str, Any]:
    """Figures whose widths are shown."""
    order = sorted(row["sm"], key=lambda sm: (sm != "90", int(sm)))
    return next((row["sm"][sm] for sm in order if "error" not in row["sm"][sm]), {})


def _rows(rows: dict[str, Row], capabilities: list[int]) -> Iterator[str]:
    heads = " | ".join(f"sm_{c}" for c in capabilities)
    yield f"| kernel | direction | dtype | case | variant | loads | stores | {heads} |"
    yield "|---" * (7 + len(capabilities)) + "|"
    for row in rows.values():
        shown = _shown(row)
        cells = [
            row["kernel"].removesuffix("_kernel"), row["direction"], row["dtype"], row["case"],
            row["variant"], _widths(shown.get("load_widths", {})),
            _widths(shown.get("store_widths", {})),
            *(_cell(c, row["sm"].get(str(c))) for c in capabilities),
        ]  # fmt: skip
        yield "| " + " | ".join(cells) + " |"


def summary(rows: dict[str, Row], capabilities: list[int]) -> Iterator[str]:
    """A row per capability: how many, the most registers, spills, the least occupancy."""
    yield "| | compiled | do not | most registers | spilling | fewest warps |"
    yield "|---|---|---|---|---|---|"
    for c in capabilities:
        found = {n: r["sm"][str(c)] for n, r in rows.items() if str(c) in r["sm"]}
        good = {n: f for n, f in found.items() if "error" not in f}
        if not good:
            yield f"| sm_{c} | 0 | {len(found)} | | | |"
            continue
        most = max(good, key=lambda n: good[n]["registers"])
        warps = {
            n: occupancy(c, f["registers"], f["shared_bytes"], f["warps"]).warps
            for n, f in good.items()
        }
        least = min(warps, key=lambda n: warps[n])
        spilling = sum(f["local_bytes"] > 0 for f in good.values())
        yield (
            f"| sm_{c} | {len(good)} | {len(found) - len(good)} | {good[most]['registers']} "
            f"({most.split(' | ')[0]}) | {spilling} | {warps[least]} of {LIMITS[c].warps} "
            f"({least.split(' | ')[0]}) |"
        )


def reasons(rows: dict[str, Row]) -> Iterator[str]:
    """What does not compile, by reason."""
    found: dict[tuple[str, str], set[str]] = {}
    for row in rows.values():
        for sm, figures in row["sm"].items():
            if "error" in figures:
                key = (sm, figures["error"])
                found.setdefault(key, set()).add(f"{row['kernel']} ({row['dtype']})")
    for (sm, reason), names in sorted(found.items()):
        yield f"- sm_{sm}: {', '.join(sorted(names))}: {reason}"


def markdown(table: dict[str, Any]) -> str:
    """All of it."""
    lines = [INTRODUCTION.format(
        versions=_versions(table["versions"]), limits=_limits(table["capabilities"])
    )]  # fmt: skip
    for group, title, key in (
        ("triton", "Triton", "capabilities"),
        ("cuda", "CUDA C++", "cuda_capabilities"),
    ):
        rows, capabilities = table[group], table[key]
        lines.append(f"\n## {title}\n")
        if not rows:
            lines.append("The module was not built here.")
            continue
        lines += summary(rows, capabilities)
        failed = list(reasons(rows))
        lines += ["", "What does not compile, and why:", "", *failed] if failed else ["", COMPLETE]
        for op in dict.fromkeys(row["op"] for row in rows.values()):
            lines.append(f"\n### {op}\n")
            lines += [NARROW[op], ""] if group == "cuda" and op in NARROW else []
            lines += _rows({n: r for n, r in rows.items() if r["op"] == op}, capabilities)
    return "\n".join(lines) + "\n"
