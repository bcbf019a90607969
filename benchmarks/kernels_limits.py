"""How many warps a multiprocessor can hold at once: registers, shared memory and threads of a
kernel against what an architecture has.

Per capability: warps, registers and shared memory of a multiprocessor from the table of technical
specifications in NVIDIA's CUDA C++ Programming Guide; blocks, granularities, the part of shared
memory that the driver keeps, and the rule by which registers are given out from
``cuda_occupancy.h`` of CUDA 13.0. tests/benchmarks/test_kernels.py holds the two against each other
where the header is there.
"""

from __future__ import annotations

from dataclasses import dataclass

LANES = 32
REGISTERS = 65536
_REGISTERS_AT_A_TIME = 256
_PARTITIONS = 4


@dataclass(frozen=True)
class Limits:
    """Of one multiprocessor; shared memory in bytes."""

    warps: int
    blocks: int
    shared: int
    shared_of_block: int
    """The most that one block may have, where it asks for it."""
    shared_kept: int
    """That the driver takes of every block."""
    shared_at_a_time: int


_KIB = 1024
LIMITS = {
    75: Limits(32, 16, 64 * _KIB, 64 * _KIB, 0, 256),
    80: Limits(64, 32, 164 * _KIB, 163 * _KIB, _KIB, 128),
    90: Limits(64, 32, 228 * _KIB, 227 * _KIB, _KIB, 128),
    100: Limits(64, 32, 228 * _KIB, 227 * _KIB, _KIB, 128),
    120: Limits(48, 24, 100 * _KIB, 99 * _KIB, _KIB, 128),
}


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


@dataclass(frozen=True)
class Occupancy:
    """Blocks and warps of a kernel that a multiprocessor holds, and what keeps it from more."""

    blocks: int
    warps: int
    share: float
    bound: str


def occupancy(capability: int, registers: int, shared: int, warps: int) -> Occupancy:
    """Of blocks of ``warps`` warps, ``registers`` a thread and ``shared`` bytes.

    Shared memory is counted at the largest part of the L1 that an architecture gives to it.

    Raises:
        KeyError: no limits of that capability are known.
    """
    limits = LIMITS[capability]
    of_warp = _round_up(max(registers, 1) * LANES, _REGISTERS_AT_A_TIME)
    by_registers = REGISTERS // _PARTITIONS // of_warp * _PARTITIONS // warps
    if of_warp * _round_up(warps, _PARTITIONS) > REGISTERS:
        by_registers = 0
    taken = _round_up(shared + limits.shared_kept, limits.shared_at_a_time)
    by_shared = limits.shared // taken if taken else limits.blocks
    if shared > limits.shared_of_block:
        by_shared = 0
    bounds = {
        "warps": limits.warps // warps,
        "blocks": limits.blocks,
        "registers": by_registers,
        "shared memory": by_shared,
    }
    bound = min(bounds, key=lambda name: bounds[name])
    blocks = bounds[bound]
    return Occupancy(blocks, blocks * warps, blocks * warps / limits.warps, bound)
