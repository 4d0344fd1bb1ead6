"""Instructions as time: what a number of warps' instructions costs each pipe of a device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from .assumptions import PIPES, RATES, UNKNOWN_RATE, Device
from .instructions import Instruction, count_units, shared_memory_cycles


@dataclass
class Work:
    """Instructions by unit, and cycles of shared memory; of fractions of loops too."""

    units: dict[str, float] = field(default_factory=dict)
    shared_cycles: float = 0.0

    @classmethod
    def of(cls, code: Iterable[Instruction]) -> Work:
        code = list(code)
        return cls(dict(count_units(code)), shared_memory_cycles(code))

    def add(self, other: Work, times: float = 1.0) -> None:
        for unit, count in other.units.items():
            self.units[unit] = self.units.get(unit, 0.0) + count * times
        self.shared_cycles += other.shared_cycles * times

    def count(self, unit: str) -> float:
        return self.units.get(unit, 0.0)

    @property
    def instructions(self) -> float:
        return float(sum(self.units.values()))

    def seconds(self, device: Device) -> dict[str, float]:
        """By pipe, if all of the device's multiprocessors share the work evenly."""
        rates = RATES[device.arch]
        cycles = {"issue": self.instructions}
        for pipe, units in PIPES.items():
            cycles[pipe] = sum(self.count(u) / rates.get(u, UNKNOWN_RATE) for u in units)
        cycles["tensor cores"] = self.count("mma") * device.mma_cycles
        seconds = {name: c / (device.quarters * device.clock) for name, c in cycles.items()}
        seconds["shared memory"] = self.shared_cycles / (device.multiprocessors * device.clock)
        return seconds
