"""Parts of packed weights: the same codes, scales and zeros, packed anew."""

from __future__ import annotations

import itertools

import pytest
import torch
from oracle import Oracle, random_weight
from torch import Tensor

from hqqlora import repacking
from hqqlora.ops import PackedWeight
from hqqlora.packed_codes import pack_codes, read_codes, unpack_codes
from hqqlora.repacking import join_columns, join_rows, take_columns, take_rows

BITS = (8, 4, 3, 2, 1)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks in small weights, the last one not full."""
    monkeypatch.setattr(repacking, "_BLOCK", 100)


def per_element(weight: PackedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """Code, scale and zero of each element [N, K], from the format's description."""
    oracle = Oracle(weight)
    return oracle.codes, oracle.per_element(weight.scale), oracle.per_element(weight.zero)


def assert_is_part(
    part: PackedWeight, whole: PackedWeight, rows: slice, columns: slice
) -> None:
    for found, expected in zip(per_element(part), per_element(whole), strict=True):
        assert torch.equal(found, expected[rows, columns])
    assert (part.nbits, part.axis) == (whole.nbits, whole.axis)
    assert part.W_q.is_contiguous()
    assert part.scale.dtype == whole.scale.dtype


def assert_same_weight(found: PackedWeight, expected: PackedWeight) -> None:
    """Every bit that holds something, and scales, zeros and format."""
    assert torch.equal(Oracle(found).codes, Oracle(expected).codes)
    assert torch.equal(found.scale, expected.scale)
    assert torch.equal(found.zero, expected.zero)
    assert found[3:] == expected[3:]


def thirds(N: int) -> list[tuple[int, int]]:
    cuts = [0, N // 3, 2 * N // 3, N]
    return list(itertools.pairwise(cuts))


# Shapes: even; odd numbers of rows, so that slots of one word are of different rows; groups of
# several rows; one group a row; groups across rows.
ROWS = [
    (24, 32, 16, 1, [(0, 7), (7, 12), (12, 24)]),
    (7, 48, 16, 1, [(0, 1), (1, 5), (5, 7)]),
    (12, 8, 32, 1, [(0, 4), (4, 12)]),
    (9, 20, 20, 1, [(0, 4), (4, 9)]),
    (16, 12, 24 * 4, 1, [(0, 4), (4, 8), (8, 16)]),  # each within a group, then whole groups
    (12, 20, 16, 1, [(0, 4), (4, 12)]),
    (24, 10, 6, 0, [(0, 4), (4, 16), (16, 24)]),  # four rows of groups
    (12, 7, 12, 0, [(0, 5), (5, 12)]),  # one group a column
    (6, 15, 9, 0, [(0, 2), (2, 6)]),  # groups across columns
    (30, 11, 5, 0, [(0, 6), (6, 18), (18, 30)]),
]
COLUMNS = [
    (6, 96, 16, 1, [(0, 16), (16, 64), (64, 96)]),
    (7, 48, 48, 1, [(0, 5), (5, 48)]),  # one group a row
    (8, 12, 24, 1, [(0, 7), (7, 12)]),  # one group two rows
    (5, 64, 32, 1, [(0, 32), (32, 40), (40, 64)]),  # a whole group, and parts of one
    (16, 21, 8, 0, [(0, 4), (4, 5), (5, 21)]),
    (9, 10, 9, 0, [(0, 3), (3, 10)]),
]


@pytest.mark.parametrize("nbits", BITS)
@pytest.mark.parametrize(("N", "K", "G", "axis", "cuts"), ROWS)
def test_rows_keep_their_codes_and_the_parts_make_the_whole(N, K, G, axis, cuts, nbits):
    whole = random_weight(N, K, G, nbits, axis, torch.bfloat16).packed
    parts = [take_rows(whole, *cut) for cut in cuts]
    for part, cut in zip(parts, cuts, strict=True):
        assert_is_part(part, whole, slice(*cut), slice(None))
    assert_same_weight(join_rows(parts, G), whole)


@pytest.mark.parametrize("nbits", BITS)
@pytest.mark.parametrize(("N", "K", "G", "axis", "cuts"), COLUMNS)
def test_columns_keep_their_codes_and_the_parts_make_the_whole(N, K, G, axis, cuts, nbits):
    whole = random_weight(N, K, G, nbits, axis).packed
    parts = [take_columns(whole, *cut) for cut in cuts]
    for part, cut in zip(parts, cuts, strict=True):
        assert_is_part(part, whole, slice(None), slice(*cut))
    assert_same_weight(join_columns(parts, G), whole)


def test_every_allowed_cut_is_right_and_every_other_refused():
    """All rows and columns of all small shapes, against what decides it: whether the part's
    elements fall into equal groups, in the order of the format, that each lie in one group."""
    allowed = refused = 0
    for N, K, axis in itertools.product((1, 2, 3, 4, 6), (1, 2, 3, 4, 6), (0, 1)):
        for G in (g for g in range(1, N * K + 1) if N * K % g == 0):
            whole = random_weight(N, K, G, 4, axis).packed
            for take, side in ((take_rows, N), (take_columns, K)):
                for cut in itertools.combinations(range(side + 1), 2):
                    span = slice(*cut), slice(None)
                    rows, columns = span if take is take_rows else span[::-1]
                    try:
                        part = take(whole, *cut)
                    except ValueError:
                        refused += 1
                        assert not has_natural_groups(whole, take is take_rows, cut)
                        continue
                    allowed += 1
                    assert_is_part(part, whole, rows, columns)
    assert allowed > 1000
    assert refused > 1000


def has_natural_groups(whole: PackedWeight, by_rows: bool, cut: tuple[int, int]) -> bool:
    """Whether the rule of the module's description lets the part be."""
    N, K, G, axis = whole.out_features, whole.in_features, whole.group_size, whole.axis
    start, stop = cut
    if by_rows and axis == 1:
        ends = start * K % G == 0 and stop * K % G == 0
        return ends or start * K // G == (stop * K - 1) // G
    if by_rows:
        return (stop - start) * G % N == 0
    if stop - start == K:
        return True
    if axis == 0:
        return N % G == 0
    if G % K == 0:
        return True
    whole_groups = start % G == 0 and stop % G == 0
    return K % G == 0 and (whole_groups or start // G == (stop - 1) // G)


@pytest.mark.parametrize(
    ("N", "K", "G", "axis", "take", "cut", "message"),
    [
        (8, 96, 64, 1, take_columns, (0, 48), "columns 0 to 48 .* 64 does not divide 96"),
        (8, 128, 32, 1, take_columns, (0, 48), "columns 0 to 48 .* multiples of 32"),
        (8, 12, 32, 1, take_rows, (0, 4), "rows 0 to 4 of a .8, 12. .* multiples of 32"),
        (24, 8, 6, 0, take_rows, (0, 6), "rows 0 to 6 .* multiple of N / G = 24 / 6"),
        (6, 15, 9, 0, take_columns, (0, 5), "9 does not divide 6"),
        (8, 16, 8, 1, take_rows, (4, 9), "rows 4 to 9 are not among the 8 rows"),
        (8, 16, 8, 1, take_columns, (8, 8), "columns 8 to 8 are not among the 16 columns"),
        (8, 16, 8, 1, take_rows, (-1, 4), "rows -1 to 4"),
    ],
)
def test_a_cut_that_cannot_be_is_refused_with_its_values(N, K, G, axis, take, cut, message):
    weight = random_weight(N, K, G, 4, axis).packed
    with pytest.raises(ValueError, match=message):
        take(weight, *cut)


def test_parts_that_do_not_fit_each_other_are_refused():
    whole = random_weight(8, 32, 16, 4, 1).packed
    upper, lower = take_rows(whole, 0, 4), take_rows(whole, 4, 8)
    with pytest.raises(ValueError, match="8 bits in groups of 16 along axis 1 does not fit"):
        join_rows([upper, random_weight(4, 32, 16, 8, 1).packed], 16)
    with pytest.raises(ValueError, match=r"in groups of 16 .* in groups of 8 would"):
        join_rows([upper, lower], 8)
    with pytest.raises(ValueError, match=r"part \[4, 64\]"):
        join_rows([upper, random_weight(4, 64, 16, 4, 1).packed], 16)


def test_scales_that_the_whole_has_once_must_agree():
    """Axis 0: each part has every scale. Parts quantized anew, one by one, are no whole."""
    whole = random_weight(8, 4, 4, 4, 0).packed
    upper, lower = take_rows(whole, 0, 4), take_rows(whole, 4, 8)
    lower.scale[0, 3] += 1
    with pytest.raises(
        ValueError, match="the scales of groups that several parts share differ"
    ):
        join_rows([upper, lower], 4)


@pytest.mark.parametrize("nbits", BITS)
def test_codes_are_read_and_written_from_any_element_to_any(nbits):
    """63 elements: no slot is full of whole rows, and the last has empty places."""
    weight = random_weight(9, 7, 7, nbits, 1).packed
    codes = Oracle(weight).codes.reshape(-1)
    for start, stop in itertools.combinations(range(64), 2):
        found = read_codes(weight.W_q, nbits, start, stop)
        assert torch.equal(found.long(), codes[start:stop])
    assert torch.equal(unpack_codes(weight).long(), Oracle(weight).codes)
    again = pack_codes(unpack_codes(weight), nbits, 7)
    assert torch.equal(read_codes(again, nbits, 0, 63).long(), codes)


@pytest.mark.parametrize("axis", [1, 0])
def test_a_part_of_a_real_layer_multiplies_as_the_rows_and_columns_do(axis):
    """The gate projection of a small Llama on four ranks, through the kernels."""
    N, K, G = 1536, 576, 64
    whole = random_weight(N, K, G, 4, axis).packed
    dense = torch.ops.hqqlora.dequantize(*whole, torch.float32)
    rows = take_rows(whole, 384, 768)
    assert torch.equal(torch.ops.hqqlora.dequantize(*rows, torch.float32), dense[384:768])
    columns = take_columns(whole, 192, 384)
    assert torch.equal(torch.ops.hqqlora.dequantize(*columns, torch.float32), dense[:, 192:384])


def test_no_more_codes_than_a_block_are_unpacked_at_a_time(monkeypatch):
    """The largest tensor made is the part's own words, or a block."""
    from peft_models import operations

    monkeypatch.setattr(repacking, "_BLOCK", 4096)
    whole = random_weight(512, 256, 64, 4, 1).packed
    with operations() as seen:
        part = take_columns(whole, 64, 128)
    assert max(seen.elements) <= max(4096, part.W_q.numel())
