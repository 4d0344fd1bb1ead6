"""How many blocks of a kernel a multiprocessor holds at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Limits:
    """One multiprocessor, as the CUDA programming guide's table of compute capabilities has
    it. Everywhere: 65,536 registers, handed out by the warp in units of 256; shared memory in
    units of 128 bytes, of which the system keeps 1 KiB a block."""

    warps: int
    blocks: int
    shared_bytes: int
    shared_bytes_a_block: int

    REGISTERS = 65536
    REGISTER_UNIT = 256
    SHARED_UNIT = 128
    SHARED_RESERVED = 1024
    WARP = 32


LIMITS = {
    "sm_80": Limits(64, 32, 164 * 1024, 163 * 1024),
    "sm_86": Limits(48, 16, 100 * 1024, 99 * 1024),
    "sm_89": Limits(48, 24, 100 * 1024, 99 * 1024),
    "sm_90": Limits(64, 32, 228 * 1024, 227 * 1024),
    "sm_100": Limits(64, 32, 228 * 1024, 227 * 1024),
    "sm_120": Limits(48, 24, 100 * 1024, 99 * 1024),
}


class Occupancy(NamedTuple):
    blocks: int
    warps: int
    limited_by: str


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def occupancy(arch: str, registers: int, threads: int, shared_bytes: int) -> Occupancy:
    """shared_bytes: static and dynamic, without what the system keeps."""
    limits = LIMITS[arch]
    warps = -(-threads // Limits.WARP)
    registers_a_warp = _round_up(max(registers, 1) * Limits.WARP, Limits.REGISTER_UNIT)
    # warps are bound to one of four quarters, each with its own registers
    warps_by_registers = 4 * (Limits.REGISTERS // 4 // registers_a_warp)
    shared = _round_up(shared_bytes + Limits.SHARED_RESERVED, Limits.SHARED_UNIT)
    fits = shared_bytes <= limits.shared_bytes_a_block
    possible = {
        "warps": limits.warps // warps,
        "blocks": limits.blocks,
        "registers": warps_by_registers // warps,
        "shared memory": limits.shared_bytes // shared if fits else 0,
    }
    limited_by = min(possible, key=lambda name: possible[name])
    blocks = possible[limited_by]
    return Occupancy(blocks, blocks * warps, limited_by)
