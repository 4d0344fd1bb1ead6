"""Machine code as cuobjdump prints it, and which unit of a multiprocessor executes what."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str
    """With its modifiers: LDG.E.128.CONSTANT"""
    operands: str
    predicate: str = ""
    """@P0, @!P1, @!UPT or nothing"""

    @property
    def base(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def bits(self) -> int:
        """What a thread moves with a load or a store."""
        width = re.search(r"\.(128|64|32|[US]?16|[US]?8)(?=\.|$)", self.opcode)
        return int(width.group(1).lstrip("US")) if width else 32

    @property
    def branch_target(self) -> int | None:
        """Of a direct branch."""
        if self.base != "BRA":
            return None
        target = re.search(r"(?:^|[\s(`,])0x([0-9a-f]+)", self.operands)
        return int(target.group(1), 16) if target else None


_FUNCTION = re.compile(r"\s*Function : (\S+)")
_INSTRUCTION = re.compile(
    r"\s*/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:(?P<predicate>@!?U?P\w+)\s+)?"
    r"(?P<opcode>[A-Z][\w.]*)\s*(?P<operands>[^;]*?)\s*;"
)


def parse(text: str) -> dict[str, list[Instruction]]:
    """Instructions by symbol, from `cuobjdump -sass`."""
    functions: dict[str, list[Instruction]] = {}
    code: list[Instruction] | None = None
    for line in text.splitlines():
        if found := _FUNCTION.match(line):
            code = functions.setdefault(found.group(1), [])
        elif code is not None and (found := _INSTRUCTION.match(line)):
            code.append(
                Instruction(
                    int(found["address"], 16),
                    found["opcode"],
                    found["operands"],
                    found["predicate"] or "",
                )
            )
    return functions


# The first pattern that matches an opcode from its start names its unit. What is in none is
# counted as ALU, the narrowest of the common ones, and listed as unknown: a new architecture's
# opcode must not pass as free.
UNITS = {
    "mma": r"HMMA|IMMA|HGMMA|DMMA|QMMA|UTCHMMA",
    "local": r"LDL|STL",
    "shared": r"LDS\b|LDSM|STS\b|STSM|ATOMS|LDGSTS",
    "global": r"LDG\b|STG\b|LD\b|ST\b|RED\b|REDG|ATOM\b|ATOMG|CCTL|ERRBAR|MEMBAR|FENCE",
    "shuffle": r"SHFL|MOVM|MATCH|VOTE\b|REDUX",
    "control": r"BRA|EXIT|NOP|RET|CALL|BSSY|BSYNC|BREAK|WARPSYNC|BAR|DEPBAR|LDGDEPBAR|BMOV"
    r"|ENDCOLLECTIVE|WARPGROUP|YIELD|JMP|BRX|ACQBULK|CGAERRBAR|PREEXIT|NANOSLEEP|RPCMOV|KILL|BPT",
    "special": r"MUFU|I2F\b|F2I\b|F2F\b|POPC|FLO|BREV|FRND|FCHK",
    "double": r"DFMA|DADD|DMUL|DSETP|DMNMX",
    "half": r"HFMA2|HADD2|HMUL2",
    "float": r"FFMA|FADD|FMUL|FSWZADD",
    "multiply": r"IMAD|IMUL|IDP",
    "uniform": r"U[A-Z0-9]+|R2UR|S2UR|LDC|CS2R|S2R|VOTEU|CREDUX",
    "alu": r"LOP3|LOP\b|SHF|SHL|SHR|PRMT|SGXT|BMSK|PLOP3|IADD|VIADD|LEA|ISETP|IMNMX|VIMNMX|SEL"
    r"|MOV|FSEL|FSET|FMNMX|IABS|I2FP|F2FP|HSET|HMNMX|P2R|R2P|ISCADD|LEPC|PSETP|VABSDIFF|I2I|F2IP",
}
_UNITS = {unit: re.compile(pattern) for unit, pattern in UNITS.items()}


def unit_of(instruction: Instruction) -> str:
    """A key of UNITS, or "unknown"."""
    return _unit_of_opcode(instruction.opcode)


@cache
def _unit_of_opcode(opcode: str) -> str:
    matching = (unit for unit, pattern in _UNITS.items() if pattern.match(opcode))
    return next(matching, "unknown")


def count_units(code: Iterable[Instruction]) -> Counter[str]:
    return Counter(map(unit_of, code))


def shared_memory_cycles(code: Iterable[Instruction]) -> int:
    """Cycles of a multiprocessor's shared memory (128 bytes each), without bank conflicts."""
    cycles = 0
    for instruction in code:
        if instruction.base in ("LDSM", "STSM"):
            matrices = re.search(r"\.([124])$|\.x?([124])\.|MT88\.([124])", instruction.opcode)
            cycles += int(next(filter(None, matrices.groups()))) if matrices else 1
        elif unit_of(instruction) == "shared":
            cycles += max(instruction.bits // 32, 1)
        elif unit_of(instruction) == "shuffle":
            cycles += 1
    return cycles


def widths(code: Iterable[Instruction], bases: Iterable[str]) -> dict[int, int]:
    """How many instructions of these names move how many bits a thread."""
    bases = tuple(bases)
    found = Counter(i.bits for i in code if i.base in bases)
    return dict(sorted(found.items(), reverse=True))
