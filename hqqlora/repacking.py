"""A part of a packed weight as a packed weight, and the whole again: codes unchanged.

hqq packs along the whole weight: at 4 bits a byte holds the codes of rows n and n + N/2. A part
is therefore never a part of the words: its codes are read from all over `W_q` and packed anew,
some rows at a time, while scales and zeros are taken over as they are. Results are in hqq's
words, also of what is in planes.

A part must itself be a weight of the format, with groups of one size that each lie in one group
of the whole. With G elements in a group of a weight [N, K], and N', K' the part's sides:

- axis 1 (groups along the elements in the order of n * K + k), rows n0 to n1: n0 * K and n1 * K
  are multiples of G, or all lies within one group. Where G divides K: any rows.
- axis 1, columns k0 to k1: multiples of G, or within one group, where G divides K; any columns
  where K divides G (groups of whole rows, such as one scale a row), the part's group then being
  G * K' / K; none otherwise.
- axis 0 (the group is (n * K + k) mod (N * K / G): rows N/G apart share theirs), rows: N' is a
  multiple of N / G. Each part reaches every group, with G * N' / N elements, and so has every
  scale and zero.
- axis 0, columns: any, where G divides N; none otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hqqlora.ops import PackedWeight, meta_shape, packed_shape
from hqqlora.packed_codes import empty_words, read_codes, write_codes
from hqqlora.planes import in_words

# Codes on their way at a time.
_BLOCK = 2**20


def take_rows(weight: PackedWeight, start: int, stop: int) -> PackedWeight:
    """The rows (out_features) from `start` to before `stop`, as a weight of their own.

    Raises:
        ValueError: the rows are not in the weight, or not a weight of the format (see above).
    """
    return _take(weight, range(start, stop), range(weight.in_features))


def take_columns(weight: PackedWeight, start: int, stop: int) -> PackedWeight:
    """The columns (in_features) from `start` to before `stop`, as a weight of their own.

    Raises:
        ValueError: the columns are not in the weight, or not a weight of the format.
    """
    return _take(weight, range(weight.out_features), range(start, stop))


def join_rows(parts: Sequence[PackedWeight], group_size: int) -> PackedWeight:
    """The weight of which `parts` are all the rows, one after another; groups of `group_size`.

    Raises:
        ValueError: the parts are not those of one such weight, be it that scales or zeros that
            the whole has once differ between parts.
    """
    return _join(parts, group_size, along_rows=True)


def join_columns(parts: Sequence[PackedWeight], group_size: int) -> PackedWeight:
    """The weight of which `parts` are all the columns; see `join_rows`."""
    return _join(parts, group_size, along_rows=False)


def part_group_size(weight: PackedWeight, rows: range, columns: range) -> int:
    """The group size of a part of `weight`: of some rows or some columns.

    Raises:
        ValueError: there is no such part.
    """
    N, K, G = weight.out_features, weight.in_features, weight.group_size
    for name, part, side in (("rows", rows, N), ("columns", columns, K)):
        if not 0 <= part.start < part.stop <= side:
            raise ValueError(
                f"{name} {part.start} to {part.stop} are not among the {side} {name} of the "
                f"[{N}, {K}] weight"
            )
    if len(columns) == K:
        size = _rows_group_size(weight, rows)
    elif len(rows) == N:
        size = _columns_group_size(weight, columns)
    else:
        raise ValueError(f"neither all {N} rows nor all {K} columns of the weight: {rows=}")
    if size == 0:
        what, part = ("rows", rows) if len(columns) == K else ("columns", columns)
        raise ValueError(
            f"{what} {part.start} to {part.stop} of a [{N}, {K}] weight in groups of {G} along "
            f"axis {weight.axis} cut groups unevenly: {_rule(weight, what)}"
        )
    return size


def _rows_group_size(weight: PackedWeight, rows: range) -> int:
    """0 where the rows cannot be a part."""
    N, K, G = weight.out_features, weight.in_features, weight.group_size
    if weight.axis == 0:
        return G * len(rows) // N if G * len(rows) % N == 0 else 0
    return _run_group_size(rows.start * K, rows.stop * K, G)


def _columns_group_size(weight: PackedWeight, columns: range) -> int:
    """0 where the columns cannot be a part."""
    N, K, G = weight.out_features, weight.in_features, weight.group_size
    if weight.axis == 0:
        return G if N % G == 0 else 0
    if G % K == 0:
        return G // K * len(columns)
    return _run_group_size(columns.start, columns.stop, G) if K % G == 0 else 0


def _run_group_size(start: int, stop: int, G: int) -> int:
    """Of the elements from `start` to before `stop`, where every G-th begins a group."""
    if start % G == 0 and stop % G == 0:
        return G
    return stop - start if start // G == (stop - 1) // G else 0


def _rule(weight: PackedWeight, what: str) -> str:
    N, K, G = weight.out_features, weight.in_features, weight.group_size
    if weight.axis == 0:
        if what == "rows":
            return f"their number must be a multiple of N / G = {N} / {G}"
        return f"{G} does not divide {N}, so that groups run across columns"
    if what == "rows":
        return f"start and stop, times {K}, must be multiples of {G}"
    if K % G == 0:
        return f"start and stop must be multiples of {G}"
    return f"{G} does not divide {K}, so that groups run across rows"


def _take(weight: PackedWeight, rows: range, columns: range) -> PackedWeight:
    G = part_group_size(weight, rows, columns)
    weight = in_words(weight)
    part = _empty(weight, len(rows), len(columns), G)
    width = weight.in_features
    for n in range(0, len(rows), _rows_in_block(width)):
        count = min(len(rows) - n, _rows_in_block(width))
        first = (rows.start + n) * width
        codes = read_codes(weight.W_q, weight.nbits, first, first + count * width)
        codes = codes.view(count, width)[:, columns.start : columns.stop].reshape(-1)
        write_codes(part.W_q, weight.nbits, n * len(columns), codes)
    of_whole = _groups_in_whole(weight, part, rows.start, columns.start)
    for mine, whole in ((part.scale, weight.scale), (part.zero, weight.zero)):
        torch.index_select(whole.reshape(-1), 0, of_whole, out=mine.view(-1))
    return part


def _join(parts: Sequence[PackedWeight], group_size: int, along_rows: bool) -> PackedWeight:
    parts = [in_words(part) for part in parts]
    first = parts[0]
    N, K = first.out_features, first.in_features
    total = sum(part.out_features if along_rows else part.in_features for part in parts)
    whole = _empty(first, total if along_rows else N, K if along_rows else total, group_size)
    ranges = []
    begin = 0
    for part in parts:
        size = part.out_features if along_rows else part.in_features
        piece = range(begin, begin + size)
        rows, columns = (piece, range(K)) if along_rows else (range(N), piece)
        expected = (len(rows), len(columns), part_group_size(whole, rows, columns))
        found = (part.out_features, part.in_features, part.group_size)
        if found != expected or (part.nbits, part.axis) != (first.nbits, first.axis):
            raise ValueError(
                f"a part [{found[0]}, {found[1]}] of {part.nbits} bits in groups of {found[2]} "
                f"along axis {part.axis} does not fit a [{whole.out_features}, "
                f"{whole.in_features}] weight of {first.nbits} bits in groups of {group_size} "
                f"along axis {first.axis}: [{expected[0]}, {expected[1]}] in groups of "
                f"{expected[2]} would"
            )
        ranges.append((rows, columns))
        begin += size
    _join_codes(whole, parts, ranges)
    _join_meta(whole, parts, ranges)
    return whole


def _join_codes(
    whole: PackedWeight, parts: Sequence[PackedWeight], ranges: list[tuple[range, range]]
) -> None:
    width, nbits = whole.in_features, whole.nbits
    for part, (rows, columns) in zip(parts, ranges, strict=True):
        for n in range(0, len(rows), _rows_in_block(width)):
            count = min(len(rows) - n, _rows_in_block(width))
            first = n * len(columns)
            codes = read_codes(part.W_q, nbits, first, first + count * len(columns))
            lines = codes.new_zeros(count, width)
            lines[:, columns.start : columns.stop] = codes.view(count, len(columns))
            # what is not the part's is zero, and changes nothing
            write_codes(whole.W_q, nbits, (rows.start + n) * width, lines.view(-1))


def _join_meta(
    whole: PackedWeight, parts: Sequence[PackedWeight], ranges: list[tuple[range, range]]
) -> None:
    groups = [
        _groups_in_whole(whole, part, rows.start, columns.start)
        for part, (rows, columns) in zip(parts, ranges, strict=True)
    ]
    for name in ("scale", "zero"):
        joined: Tensor = getattr(whole, name).view(-1)
        for part, of_whole in zip(parts, groups, strict=True):
            joined[of_whole] = getattr(part, name).reshape(-1)
        for part, of_whole in zip(parts, groups, strict=True):
            if not torch.equal(joined[of_whole], getattr(part, name).reshape(-1)):
                raise ValueError(
                    f"the {name}s of groups that several parts share differ between them: they "
                    f"are not parts of one weight in groups of {whole.group_size}"
                )


def _rows_in_block(width: int) -> int:
    return max(1, _BLOCK // width)


def _empty(like: PackedWeight, N: int, K: int, G: int) -> PackedWeight:
    """A weight [N, K] in groups of G, otherwise of the format of `like`, with codes zero."""
    W_q = empty_words(packed_shape(N, K, like.nbits, G, like.axis), like.nbits, like.W_q.device)
    shape = meta_shape(N, K, G, like.axis)
    return PackedWeight(
        W_q, like.scale.new_empty(shape), like.zero.new_empty(shape), N, K, like.nbits, G,
        like.axis,
    )  # fmt: skip


def _groups_in_whole(whole: PackedWeight, part: PackedWeight, row: int, column: int) -> Tensor:
    """For each group of a part that begins at [row, column]: which of the whole's it lies in,
    int64 [groups]."""
    group = torch.arange(part.scale.numel(), device=part.scale.device)
    first = group * part.group_size if part.axis == 1 else group  # an element of each
    n, k = first // part.in_features + row, first % part.in_features + column
    element = n * whole.in_features + k
    if whole.axis == 1:
        return element // whole.group_size
    return element % whole.scale.numel()
