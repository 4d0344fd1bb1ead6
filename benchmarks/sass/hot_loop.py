"""Where a kernel spends its time: its loops, and the way through them that full tiles take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .instructions import Instruction, unit_of

Code = Sequence[Instruction]


def loops(code: Code) -> list[list[Instruction]]:
    """The bodies of all loops: from the target of a backward branch to the branch. The branch
    to itself that ends every kernel is none."""
    found = []
    for branch in code:
        target = branch.branch_target
        if target is not None and target < branch.address:
            found.append([i for i in code if target <= i.address <= branch.address])
    return found


def innermost(bodies: Sequence[Code]) -> list[Code]:
    """Those that hold no other."""

    def holds(outer: Code, inner: Code) -> bool:
        inside = outer[0].address <= inner[0].address
        return inside and inner[-1].address <= outer[-1].address

    return [b for b in bodies if not any(holds(b, other) for other in bodies if other is not b)]


def mma_count(code: Code) -> int:
    return sum(unit_of(i) == "mma" for i in code)


def _moves(code: Code) -> int:
    return sum(unit_of(i) in ("global", "shared") for i in code)


def hot_loop(code: Code) -> list[Instruction]:
    """The loop with most tensor-core instructions, of several the shortest. Without any: the
    innermost loop with most loads and stores, else all of the kernel."""
    bodies = loops(code)
    if mma_count(code):
        candidates = [(mma_count(body), -len(body), body) for body in bodies if mma_count(body)]
    else:
        candidates = [(_moves(b), -len(b), list(b)) for b in innermost(bodies) if _moves(b)]
    best = max(candidates, key=lambda c: c[:2], default=None)
    return best[2] if best else list(code)


def _worth(instruction: Instruction) -> tuple[int, int]:
    """What the way of full tiles has most of: tensor-core instructions and wide accesses, then
    accesses at all."""
    unit = unit_of(instruction)
    moves = unit == "global" or instruction.base == "LDGSTS"
    return (int(unit == "mma" or (moves and instruction.bits == 128)), int(moves))


_Way = tuple[tuple[int, int], int, int]  # worth, -instructions, index of the next block or -1


def fast_path(code: Code, *, idle: bool = False) -> list[Instruction]:
    """The instructions of one pass from the first to the last: of all ways through the branches
    the one with most of what `_worth` counts, of several the shortest. Loops inside are passed
    through once. With `idle`, simply the shortest: what a thread without work executes."""
    starts = _block_starts(code)
    blocks = [list(code[a:b]) for a, b in zip(starts, [*starts[1:], len(code)], strict=True)]
    at = {block[0].address: index for index, block in enumerate(blocks)}
    ways: dict[int, _Way] = {}
    for index in reversed(range(len(blocks))):
        block = blocks[index]
        worth = (0, 0) if idle else _sum(map(_worth, block))
        best: _Way | None = None
        for following in _successors(block, index, len(blocks), at):
            tail = ways[following] if following >= 0 else ((0, 0), 0, -1)
            way = (_sum([worth, tail[0]]), tail[1] - len(block), following)
            if best is None or way[:2] > best[:2]:
                best = way
        # a way out of this code (an EXIT inside) leads to no end: it is never preferred
        ways[index] = best or ((-1, -1), -len(block), -1)
    path: list[Instruction] = []
    index = 0
    while index >= 0:
        path += blocks[index]
        index = ways[index][2]
    return path


def _sum(pairs: Iterable[tuple[int, int]]) -> tuple[int, int]:
    first = second = 0
    for a, b in pairs:
        first, second = first + a, second + b
    return first, second


def _block_starts(code: Code) -> list[int]:
    index_of = {instruction.address: index for index, instruction in enumerate(code)}
    starts = {0}
    for index, instruction in enumerate(code):
        target = instruction.branch_target
        if target in index_of:
            starts.add(index_of[target])
        if instruction.base in ("BRA", "EXIT", "RET") and index + 1 < len(code):
            starts.add(index + 1)
    return sorted(starts)


def _successors(block: Code, index: int, count: int, at: dict[int, int]) -> list[int]:
    """Blocks that may follow, later ones only; -1 is the end."""
    last = block[-1]
    after = index + 1 if index + 1 < count else -1
    if last.base == "BRA":
        found = []
        target = last.branch_target
        if target is not None and target > last.address and target in at:
            found.append(at[target])
        always = not last.predicate and not last.operands.lstrip().startswith(("P", "!P", "UP"))
        backward = target is not None and target <= last.address
        if not always or backward:
            found.append(after)
        return found
    if last.base in ("EXIT", "RET"):
        return [after] if last.predicate else [-1]
    return [after]
