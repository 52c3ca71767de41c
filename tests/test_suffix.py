"""The index over a text, against a search through all of it."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from looks import Looked, looked, looks

from mlxspec.suffix import LENGTHS, LONGEST, PLACES, SHORTEST, Match, SuffixIndex

LIMIT = 12


def matched(text: Sequence[int], end: int) -> int:
    return max(m for m in range(min(LONGEST, end) + 1) if text[end - m : end] == text[-m:] or not m)


def brute_force(text: list[int], limit: int) -> Match:
    """What `SuffixIndex.continuation` says it does, word by word."""
    for size in LENGTHS:
        ends = [end for end in range(size, len(text)) if text[end - size : end] == text[-size:]]
        if ends:
            break
    else:
        return Match((), 0)
    lengths = {end: matched(text, end) for end in ends[-PLACES:]}
    longest = max(lengths.values())
    ends = [end for end, length in lengths.items() if length == longest]
    said: list[int] = []
    for step in range(limit):
        nexts = {end: (text + said)[end + step] for end in ends}
        votes = list(nexts.values())
        said.append(nexts[max(ends, key=lambda end: (votes.count(nexts[end]), end))])
        ends = [end for end in ends if nexts[end] == said[-1]]
    return Match(tuple(said), longest)


@st.composite
def texts(draw: st.DrawFn) -> list[int]:
    """Few different tokens, and stretches that are copied from before, periods among them."""
    alphabet = draw(st.sampled_from([1, 2, 3, 6]))
    text = draw(st.lists(st.integers(0, alphabet - 1), min_size=1, max_size=30))
    for _ in range(draw(st.integers(0, 12))):
        begin = draw(st.integers(0, len(text) - 1))
        for at in range(begin, begin + draw(st.integers(1, 40))):
            text.append(text[at])
        text += draw(st.lists(st.integers(0, alphabet - 1), max_size=3))
    return text


@settings(max_examples=150, deadline=None)
@given(texts(), st.integers(LONGEST, 2 * LONGEST), st.integers(1, 40))
def test_as_a_search_through_all_that_is_remembered(text, capacity, chunk):
    index = SuffixIndex(capacity=capacity)
    for end in range(0, len(text), chunk):
        index.extend(text[end : end + chunk])
        known = text[: end + chunk][-capacity:]
        assert index.continuation(LIMIT) == brute_force(known, LIMIT)


def test_most_places_decide_and_the_most_recent_one_in_a_tie():
    once, twice = [5, 6, 1, 2], [5, 6, 3, 4]
    assert continuation(twice + twice + once + [5, 6], 2) == Match((3, 4), 2)
    assert continuation([5, 6, 3] + [5, 6, 1] + [5, 6], 1) == Match((1,), 2)


def test_the_longest_match_decides():
    assert continuation([9, 5, 6, 1] + 3 * [5, 6, 2] + [9, 5, 6], 1) == Match((1,), 3)


def test_a_period_goes_on():
    assert continuation([1, 2, 3, 1, 2, 3, 1, 2], 7) == Match((3, 1, 2, 3, 1, 2, 3), 5)
    assert continuation([4] * 3, 5) == Match((4,) * 5, 2)


def test_an_older_place_is_seen_behind_no_more_than_places():
    old, new = [7, 8, 9, 1, 2, 0], [1, 2, 3]
    text = [7, 8, 9, 1, 2]
    assert continuation(old + new * (PLACES - 1) + text, 1) == Match((0,), 5)
    assert continuation(old + new * PLACES + text, 1).tokens == (3,)


@pytest.mark.parametrize("text", [[], [1], [1, 2, 3, 4], [1, 2, 3, 1], [1, 1]])
def test_silent_without_a_match(text):
    assert continuation(text, 8) == Match((), 0)


def test_no_tokens_are_added_or_asked_for():
    index = SuffixIndex()
    index.extend([1, 2, 3, 1, 2])
    index.extend([])
    assert index.continuation(0) == Match((), 2)
    assert index.continuation(1) == Match((3,), 2)


def test_token_ids_of_any_size():
    large = [2**31, 2**40 + 1, 2**61 - 1, 2**70]
    assert continuation(large + large[:2], 2) == Match(tuple(large[2:]), 2)


def test_tokens_that_share_a_hash_do_not_match():
    twin = 2**61 - 1
    assert hash(twin) == hash(0)
    assert continuation([0, 0, 5, twin, twin], 1) == Match((), 0)
    assert continuation([0, 9, 5, twin, 9], 1) == Match((), 0)
    assert continuation([twin, 0, 5, 0, 0, 6, twin, 0], 1) == Match((5,), 2)


def continuation(text: Sequence[int], limit: int) -> Match:
    index = SuffixIndex()
    index.extend(text)
    return index.continuation(limit)


@pytest.mark.parametrize("kind", looked(1))
def test_a_token_costs_the_same_in_a_text_of_100_000(kind):
    text = looked(100_000)[kind]
    index = SuffixIndex()
    for begin in range(0, len(text), 10_000):
        with looks() as extending:
            index.extend(text[begin : begin + 10_000])
        assert extending() <= 10_000 * sum(LENGTHS)
        with looks() as proposing:
            index.continuation(LIMIT)
        # Comparisons, and a few looks at each vote.
        assert proposing() <= len(LENGTHS) * PLACES * LONGEST + 6 * PLACES * LIMIT


def test_what_is_forgotten_costs_and_takes_no_more():
    text = [Looked(token) for token in random.Random(0).choices(range(300), k=9_000)]
    index = SuffixIndex(capacity=200)
    sizes = []
    tracemalloc.start()
    for begin in range(0, len(text), 3_000):
        with looks() as extending:
            index.extend(text[begin : begin + 3_000])
        assert extending() <= 2 * 3_000 * sum(LENGTHS)
        sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert sizes[2] < 1.2 * sizes[0]


def test_the_shortest_match_is_the_shortest_that_is_indexed():
    assert min(LENGTHS) == SHORTEST
    assert list(LENGTHS) == sorted(LENGTHS, reverse=True)
    assert max(LENGTHS) <= LONGEST
