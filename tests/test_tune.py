"""The thresholds that benchmarks/tune.py finds in given times."""

import benchmarks_on_path  # noqa: F401
from tune import Thresholds, thresholds


def times(rows: str) -> dict[int, dict[str, float]]:
    """ "1: d1 t3 b9" -> {1: {"direct": 1, "tiled": 3, "blocked": 9}}, a line for each M."""
    names = {"d": "direct", "t": "tiled", "b": "blocked"}
    return {
        int(m): {names[cell[0]]: float(cell[1:]) for cell in cells.split()}
        for m, _, cells in (line.partition(":") for line in rows.strip().splitlines())
    }


def test_each_kernel_serves_the_rows_for_which_it_is_fastest():
    found = thresholds(
        times("1: d1 t2 b9\n 8: d2 t3 b9\n 16: d4 t3 b8\n 64: t9 b8\n 512: t9 b7")
    )
    assert found == Thresholds(direct=8, tiled=16)
    assert str(found) == "{8, 16}"


def test_a_kernel_that_is_fastest_to_the_end_serves_any_number():
    found = thresholds(times("1: d1 t2 b9\n 16: d4 t3 b8\n 64: t7 b8"))
    assert str(found) == "{1, ANY}"


def test_a_kernel_that_is_never_fastest_serves_none():
    assert str(thresholds(times("1: d1 t2 b9\n 16: d4 t5 b3"))) == "{1, 0}"
    assert str(thresholds(times("1: d3 t2 b1\n 16: d4 t5 b3"))) == "{0, 0}"


def test_noise_at_one_place_moves_no_threshold():
    """Where the order of two kernels is not the same all along, what is lost is smallest."""
    noisy = times("1: d10 t20 b90\n 4: d21 t20 b90\n 8: d20 t30 b90\n 16: d40 t30 b90")
    assert str(thresholds(noisy)) == "{8, ANY}"


def test_what_was_not_timed_is_not_chosen():
    assert str(thresholds(times("1: d1 t2\n 16: t3 b4\n 64: t4 b3"))) == "{1, 16}"
