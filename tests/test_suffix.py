"""The index over a text, against a search through all of it."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from looks import Looked, looked, looks

from mlxspec.drafters.suffix import LENGTHS, LONGEST, PLACES, Match, SuffixIndex

LIMIT = 12


def matched(text: Sequence[int], end: int) -> int:
    return max(m for m in range(min(LONGEST, end) + 1) if text[end - m : end] == text[-m:] or not m)


def brute_force(text: list[int], ahead: list[int], since: int) -> Match | None:
    """What `SuffixIndex.match` says it does, word by word."""
    known, full = len(text), text + ahead
    places = range(since + 1, known + 1 if ahead else known)
    for size in LENGTHS:
        ends = [end for end in places if end >= size and full[end - size : end] == full[-size:]]
        if ends:
            break
    else:
        return None
    lengths = {end: matched(full, end) for end in ends[-PLACES:]}
    longest = max(lengths.values())
    nexts = {end: full[end] for end, length in lengths.items() if length == longest}
    votes = list(nexts.values())
    best = max(nexts, key=lambda end: (votes.count(nexts[end]), end))
    return Match(nexts[best], longest, best)


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


@settings(max_examples=150)
@given(texts(), st.integers(LONGEST, 2 * LONGEST), st.integers(1, 40), st.integers(0, 60))
def test_as_a_search_through_all_that_is_remembered(text, capacity, chunk, since):
    index = SuffixIndex(capacity=capacity)
    for begin in range(0, len(text), chunk):
        index.extend(text[begin : begin + chunk])
        end = len(index)
        forgotten = max(end - capacity, 0)
        for ahead in ([], text[:1], text[end : end + 5], text[-3:] * 3):
            found = index.match(ahead, since=since)
            expected = brute_force(text[forgotten:end], ahead, max(since - forgotten, 0))
            if expected is not None:
                expected = expected._replace(place=expected.place + forgotten)
            assert found == expected


def match(text: Sequence[int], ahead: Sequence[int] = (), **options: int) -> Match | None:
    index = SuffixIndex()
    index.extend(text)
    return index.match(ahead, **options)


def continued(text: list[int], count: int) -> list[int]:
    ahead: list[int] = []
    for _ in range(count):
        found = match(text, ahead)
        assert found is not None
        ahead.append(found.token)
    return ahead


def test_most_places_decide_and_the_most_recent_one_in_a_tie():
    once, twice = [5, 6, 1, 2], [5, 6, 3, 4]
    assert match(twice + twice + once + [5, 6]) == Match(3, 2, 6)
    assert continued(twice + twice + once + [5, 6], 2) == [3, 4]
    assert match([5, 6, 3] + [5, 6, 1] + [5, 6]) == Match(1, 2, 5)


def test_the_longest_match_decides():
    assert match([9, 5, 6, 1] + 3 * [5, 6, 2] + [9, 5, 6]) == Match(1, 3, 3)


def test_a_period_goes_on():
    assert continued([1, 2, 3, 1, 2, 3, 1, 2], 7) == [3, 1, 2, 3, 1, 2, 3]
    assert match([1, 2, 3, 1, 2, 3, 1, 2]) == Match(3, 5, 5)
    assert continued([4] * 3, 5) == [4] * 5
    assert match([1, 2], [1, 2, 1]) == Match(2, 1, 1)


def test_a_place_at_the_very_end_is_followed_by_what_is_ahead():
    assert match([7, 1, 2], [3, 1, 2]) == Match(3, 2, 3)
    assert match([7, 1, 2], [1, 2]) == Match(1, 2, 3)


def test_only_what_lies_behind_a_place_counts():
    text = [1, 2, 3, 1, 2, 4, 1, 2]
    found = [match(text, since=since) for since in (0, 2, 4, 5)]
    assert found == [Match(4, 2, 5), Match(4, 2, 5), Match(4, 2, 5), None]
    assert match([1, 2, 3, 2, 4, 1, 2], since=2) == Match(4, 1, 4)


def test_an_older_place_is_seen_behind_no_more_than_places():
    old, new = [7, 8, 9, 1, 2, 0], [1, 2, 3]
    text = [7, 8, 9, 1, 2]
    assert match(old + new * (PLACES - 1) + text) == Match(0, 5, 5)
    assert match(old + new * PLACES + text).token == 3


@pytest.mark.parametrize("text", [[], [1], [1, 2, 3, 4]])
def test_silent_without_a_match(text):
    assert match(text) is None


def test_no_tokens_are_added():
    index = SuffixIndex()
    index.extend([1, 2, 3, 1, 2])
    index.extend([])
    assert index.match() == Match(3, 2, 2)
    assert len(index) == 5


def test_token_ids_of_any_size():
    large = [2**31, 2**40 + 1, 2**61 - 1, 2**70]
    assert continued(large + large[:2], 2) == large[2:]


def test_tokens_that_share_a_hash_do_not_match():
    twin = 2**61 - 1
    assert hash(twin) == hash(0)
    assert match([0, 0, 5, twin, twin]) == Match(twin, 1, 4)
    assert match([0, 9, 5, twin, 9]) == Match(5, 1, 2)
    assert match([1, 0, 5, twin]) is None


@pytest.mark.parametrize("kind", looked(1))
def test_a_token_costs_the_same_in_a_text_of_100_000(kind):
    text = looked(100_000)[kind]
    index = SuffixIndex()
    for begin in range(0, len(text), 10_000):
        with looks() as extending:
            index.extend(text[begin : begin + 10_000])
        assert extending() <= 10_000 * sum(LENGTHS)
        with looks() as matching:
            index.match()
        # Comparisons and a slice in every place, and a few looks at each vote.
        assert matching() <= len(LENGTHS) * PLACES * 2 * LONGEST + 6 * PLACES


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


def test_lengths_are_looked_up_from_the_longest_on():
    assert list(LENGTHS) == sorted(LENGTHS, reverse=True)
    assert max(LENGTHS) <= LONGEST
