"""What swap_in did to a network, or would do."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class SwapReport:
    """Per module of a network what is swapped, fused, rewritten or left alone; ``print`` it.

    Attributes:
        swapped_in: whether the network is swapped now; else the report says what would be.
        engine: whether the engine runs the network; ``ck.plan_report`` says how.
        swapped: module name -> class of the module.
        fused: container name ("" is the network) -> its fused groups, as ``"conv1 + bn1 + relu"``.
        functional_relus: container name -> number of functional ReLUs that become guidable.
        left_alone: module name -> why it is as it was.
        unguided_relus: container name -> the lines of functional ReLUs that stay plain.
    """

    swapped_in: bool = False
    engine: bool = False
    swapped: dict[str, str] = field(default_factory=dict)
    fused: dict[str, list[str]] = field(default_factory=dict)
    functional_relus: dict[str, int] = field(default_factory=dict)
    left_alone: dict[str, str] = field(default_factory=dict)
    unguided_relus: dict[str, list[str]] = field(default_factory=dict)

    @property
    def fused_groups(self) -> int:
        """Number of fused groups in all containers."""
        return sum(map(len, self.fused.values()))

    def __str__(self) -> str:
        rows = [(name, f"swapped: {kind}") for name, kind in self.swapped.items()]
        for name, groups in self.fused.items():
            rows += [(name, f"fused: {group}") for group in groups]
        rows += [(n, f"functional ReLUs rewritten: {c}") for n, c in self.functional_relus.items()]
        rows += [(name, f"left alone: {reason}") for name, reason in self.left_alone.items()]
        for name, lines in self.unguided_relus.items():
            rows.append((name, f"functional ReLU, plain under ck.guided(): {', '.join(lines)}"))
        width = max((len(name or "(network)") for name, _ in rows), default=0)
        state = "swapped in" if self.swapped_in else "not swapped in"
        counted = (
            f"{len(self.swapped)} modules, {self.fused_groups} fused groups, "
            f"{sum(self.functional_relus.values())} functional ReLUs, "
            f"{len(self.left_alone)} left alone"
        )
        table = [f"  {name or '(network)':<{width}}  {what}" for name, what in rows]
        return "\n".join([f"{state}; {counted}", *table])
