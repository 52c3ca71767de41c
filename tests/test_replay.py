"""What rounds would have kept along a text that is known."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxspec.control.replay import (
    Proposed,
    along_model,
    along_text,
    rates,
    rounds,
    shortest,
    tokens_per_round,
)
from mlxspec.drafters.proposals import Proposal


def kept(replayed: list[Proposed]) -> list[int]:
    return [one.right for one in replayed]


@pytest.mark.parametrize(
    ("count", "expected"), [(1, [1, 0, 1, 0, 1]), (2, [2, 1, 0]), (3, [2, 1]), (7, [2]), (8, [])]
)
def test_rounds_are_replayed_along_a_text(count: int, expected: list[int]) -> None:
    # Right, right, wrong, right, wrong, …: a round ends with the target's own token.
    along = along_model([True, True, False, True, False, False, True, True], 8)
    assert kept(rounds(along, [count])) == expected


def test_every_k_is_counted_in_rounds_of_its_own() -> None:
    # Two right and one wrong, over and over: single proposals meet the wrong one in every other
    # round, rounds of two never.
    along = along_model([True, True, False] * 40, 8)
    assert rates(rounds(along, [2]), 2) == pytest.approx((1.0, 1.0))
    assert rates(rounds(along, [1]), 1)[0] == pytest.approx(0.5, abs=0.02)
    assert rates(rounds(along_model([True, False, False] * 40, 8), [2]), 2)[1] < 0.5


def test_the_largest_number_is_proposed_that_there_is() -> None:
    places = [Proposed(0, 0), Proposed(2, 1), Proposed(9, 9), Proposed(5, 2), *[Proposed(0, 0)] * 9]
    replayed = rounds(places, [1, 3])
    assert replayed[:3] == [Proposed(0, 0), Proposed(1, 1), Proposed(3, 2)]
    assert tokens_per_round(replayed[:3]) == pytest.approx(2.0)


class Twos:
    """Proposes twos."""

    name, most = "twos", 3

    def __init__(self) -> None:
        self.seen: list[int] = []

    def extend(self, tokens: list[int]) -> None:
        self.seen += tokens

    def propose(self, limit: int) -> Proposal:
        return Proposal((2,) * min(limit, len(self.seen)), 0)


def test_a_drafter_of_the_text_sees_what_is_before_each_token_only() -> None:
    places = along_text(Twos(), [1], [2, 2, 5, 2], most=3)
    assert places == [Proposed(1, 1), Proposed(2, 1), Proposed(3, 0), Proposed(3, 1)]


def test_a_drafter_may_be_right_beyond_the_end() -> None:
    assert along_text(Twos(), [1, 1, 1], [2, 2], most=3) == [Proposed(3, 2), Proposed(3, 1)]


PLACES = st.lists(
    st.integers(0, 3).flatmap(lambda n: st.builds(Proposed, st.just(n), st.integers(0, n))),
    min_size=1,
    max_size=5,
)


@given(PLACES)
def test_the_shortest_time_is_that_of_the_best_of_all_rounds(places: list[Proposed]) -> None:
    seconds = {0: 1.0, 1: 1.3, 3: 1.9}

    def took(sizes: tuple[int, ...]) -> float:
        """What rounds take that propose so many from each place on, where they are at it."""
        at, total = 0, 0.0
        while at < len(places):
            if sizes[at] > places[at].tokens:
                return float("inf")
            total += seconds[sizes[at]]
            at += 1 + min(sizes[at], places[at].right)
        return total

    every = product(seconds, repeat=len(places))
    assert shortest(places, seconds) == pytest.approx(min(map(took, every)))
