"""Pieces of a text take about as long as they may, whatever a model's passes cost."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mlxspec.models.pace import SIZES, Pace


def read(
    cost: Callable[[int], float],
    tokens: int,
    piece_s: float,
    first: int = 1,
    *,
    strict: bool = True,
) -> tuple[Pace, list[int]]:
    """Read a text with a model whose passes cost what `cost` says; the pieces that it took."""
    pace, pieces, at = Pace(), [], 0
    while at < tokens:
        rows = min(pace.rows(piece_s, first, strict=strict), tokens - at)
        pace.took(rows, cost(rows))
        pieces.append(rows)
        at += rows
    return pace, pieces


def by_rows(row_s: float) -> Callable[[int], float]:
    return lambda rows: row_s * rows


def by_weights(pass_s: float, row_s: float) -> Callable[[int], float]:
    return lambda rows: pass_s + row_s * rows


def test_pieces_grow_where_a_pass_waits_for_weights() -> None:
    pace, pieces = read(by_weights(0.03, 1e-4), 2000, 0.1)
    assert pieces[:6] == [1, 1, 8, 32, 128, 512]
    assert len(pieces) == 9
    assert pace.pass_s == pytest.approx(0.0301)


@pytest.mark.parametrize("row_s", [1e-5, 1e-4, 1e-3, 5e-3, 0.02, 0.2])
@pytest.mark.parametrize("piece_s", [0.1, 0.4])
def test_no_piece_takes_three_times_what_it_may(row_s: float, piece_s: float) -> None:
    _, pieces = read(by_rows(row_s), 3000, piece_s)
    longest = max(pieces) * row_s
    assert longest <= max(3 * piece_s, row_s)
    # What was found to take too long is not tried again.
    assert sum(rows * row_s > piece_s for rows in pieces) <= 1 or row_s > piece_s
    # And no piece is a needlessly small one: once known, each is the largest that fits.
    fits = max((size for size in SIZES if size * row_s <= piece_s), default=1)
    assert pieces[6] == fits or sum(pieces[:7]) >= 3000


def test_a_cold_pass_tells_nothing() -> None:
    pace = Pace()
    pace.took(1, 9.0)
    assert pace.pass_s is None
    assert pace.rows(0.1, first=32) == 32
    pace.took(1, 0.01)
    assert pace.pass_s == 0.01


def test_the_cost_of_reading_is_known_once_pieces_no_longer_grow() -> None:
    pace = Pace()
    assert pace.reading_s(100, 0.1) is None
    for rows, seconds in ((1, 1.0), (1, 0.012)):
        pace.took(rows, seconds)
    assert pace.reading_s(400, 0.1) is None  # eight rows may cost hardly more than one
    pace.took(8, 0.096)
    assert pace.reading_s(400, 0.1) == pytest.approx(400 * 0.012)


@pytest.mark.parametrize("slowness", [0.1, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("row_s", [1e-4, 2e-3, 9e-3, 0.1])
def test_small_pieces_never_slow_down_what_is_waited_for(row_s: float, slowness: float) -> None:
    # At 9 ms a row and 80 ms of weights: SmolLM2 135M in float32 on a CPU.
    cost = by_weights(0.08 * slowness, row_s * slowness)
    _, pieces = read(cost, 4000, 0.4, first=32, strict=False)
    whole_s = sum(cost(rows) for rows in pieces)
    known_s = min(cost(size) / size for size in {*pieces} & {*SIZES}) * 4000
    # What was tried once may have cost more, and the first piece of all was one of 32.
    assert whole_s < 1.25 * known_s + 2 * cost(32) + 4 * cost(8)
    # Pieces are not longer than that needs.
    settled = pieces[len(pieces) // 2]
    smaller = [
        size for size in SIZES if size < settled and cost(size) / size < 1.25 * known_s / 4000
    ]
    assert cost(settled) <= 0.4 or not smaller


def test_a_size_that_was_skipped_is_tried_before_a_smaller_one() -> None:
    pace = Pace()
    for seconds in (9.0, 1.0):
        pace.took(32, seconds)
    assert pace.rows(0.4, 32, strict=False) == 8
    pace.took(8, 0.9)
    assert pace.rows(0.4, 32, strict=False) == 32
    assert pace.rows(0.4, 32) == 1
    pace.took(8, 0.27)
    assert pace.rows(0.4, 32, strict=False) == 8


def test_the_end_of_a_text_says_nothing_about_a_pass() -> None:
    pace = Pace()
    for rows, seconds in ((1, 9.0), (1, 0.1), (7, 0.12), (31, 0.3)):
        pace.took(rows, seconds)
    assert pace.pass_s == 0.1
    assert pace.rows(0.4, 1) == 8


def test_a_hiccup_slows_down_no_later_text_for_long() -> None:
    pace = Pace()
    for rows, seconds in ((32, 9.0), (32, 0.3), (32, 1.0), (8, 0.14)):
        pace.took(rows, seconds)
    sizes = []
    for _ in range(12):
        pace.begin()
        sizes.append(pace.rows(0.4, 32, strict=False))
        pace.took(sizes[-1], {8: 0.14, 32: 0.3}.get(sizes[-1], 1.2))
    assert sizes[0] == 8
    assert sizes[-1] == 32


def test_pieces_have_a_size_even_where_the_largest_were_slow_by_chance() -> None:
    pace = Pace()
    for rows, seconds in [(1, 1.0), (1, 0.001), (32, 0.01), (128, 0.02), (512, 9.0)]:
        pace.took(rows, seconds)
    for budget in (0.001, 0.4, 100.0):
        assert pace.rows(budget, first=32, strict=False) in SIZES


def test_what_a_text_missed_takes_as_long_as_was_seen_last() -> None:
    pace = Pace()
    assert pace.lag_s(8) == 0
    pace.took(8, 1.0)  # the first one builds
    pace.took(8, 0.08)
    assert pace.lag_s(8) == pytest.approx(0.2)  # and as much as 12 rows for the text itself
    pace.caught_up(28, texts=1, seconds=0.8)
    assert pace.lag_s(8) == pytest.approx(0.4)
    pace.caught_up(16, texts=2, seconds=0.0)
    assert pace.lag_s(8) == pytest.approx(0.2)
