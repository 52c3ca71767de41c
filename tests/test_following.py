"""Where in a text that is expected another has arrived, after every kind of difference."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from looks import Looked, looked, looks

from mlxspec.drafters.following import FAR, FIRM, GUESSES, LONGEST, NEAREST, REACH, Follower

DIFFERENT = range(1000, 1200)  # a text in which every token is at one place only
NEW = range(9000, 9100)  # tokens that are not expected


def after(expected: Sequence[int], output: Sequence[int], *, begins: bool = True) -> Follower:
    follower = Follower(expected, begins=begins)
    for token in output:
        follower.take(token)
    return follower


def next_of(expected: Sequence[int], output: Sequence[int]) -> int | None:
    return after(expected, output).next


def brute_force(expected: list[int], output: list[int], *, begins: bool) -> tuple[int, int]:
    """What `Follower` says it does, with a search through all of `expected`: place and followed."""
    place, followed, firm, guesses = (
        (0, FIRM, 0, 0) if begins and expected else (len(expected), 0, 0, 0)
    )
    for at, token in enumerate(output):
        before = output[: at + 1]
        if place < len(expected) and expected[place] == token:
            place, followed, guesses = place + 1, followed + 1, 0
        elif found := matches(expected, before, firm):
            (followed, *_), place = max(found)
            guesses = 0
        else:
            followed, guesses = 0, guesses + 1
            place = place + 1 if guesses <= GUESSES else len(expected)
        firm = place if followed >= FIRM else firm
    return place, followed


def matches(expected, before, firm):
    """What is believed: its rank, the longest first and then the nearest, and the place."""
    seen = set()
    for size in {1, FAR} if len(before) >= FAR else {1}:
        ends = [
            end
            for end in range(size, len(expected) + 1)
            if expected[end - size : end] == before[-size:]
        ]
        seen |= set([end for end in ends if end > firm][:NEAREST])
        seen |= set([end for end in ends if end <= firm][-NEAREST:])
    found = []
    for end in seen:
        most = min(LONGEST, end, len(before))
        length = max(n for n in range(1, most + 1) if expected[end - n : end] == before[-n:])
        ahead = end - 1 - firm
        needed = next((n for n, reach in enumerate(REACH, 1) if abs(ahead) <= reach), FAR)
        if length >= needed + (ahead < 0):
            found.append(((length, -abs(ahead), ahead), end))
    return found


@settings(max_examples=400)
@given(st.randoms(use_true_random=False), st.integers(0, 200), st.integers(0, 6), st.booleans())
def test_as_a_search_through_all_that_is_expected(rng, length, blocks, begins):
    alphabet = range(rng.choice([2, 3, 6, 40]))
    expected = rng.choices(alphabet, k=length)
    output: list[int] = []
    for _ in range(blocks):
        begin = rng.randrange(length + 1)
        output += expected[begin : begin + rng.randrange(40)]
        output += rng.choices(alphabet, k=rng.randrange(4))
    follower = after(expected, output, begins=begins)
    assert (follower.place, follower.followed) == brute_force(expected, output, begins=begins)
    assert follower.next == (expected[follower.place] if follower.place < length else None)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60))
def test_what_comes_as_expected_is_followed_throughout(expected):
    follower = after(expected, [])
    for token in expected:
        assert follower.next == token
        follower.take(token)
    assert follower.next is None
    assert follower.followed == FIRM + len(expected)


def test_where_it_does_not_begin_it_has_to_be_found():
    assert after(DIFFERENT, [], begins=False).next is None
    assert after(DIFFERENT, DIFFERENT[3:4], begins=False).next == DIFFERENT[4]
    assert after(DIFFERENT, DIFFERENT[90:92], begins=False).next is None
    assert after(DIFFERENT, DIFFERENT[90 : 90 + FAR], begins=False).next == DIFFERENT[90 + FAR]


def test_it_is_certain_once_it_has_followed_for_some_tokens():
    assert after(DIFFERENT, []).is_certain
    for count in range(FIRM + 1):
        follower = after(DIFFERENT, DIFFERENT[:count], begins=False)
        assert follower.is_certain == (count == FIRM)
    follower.take(NEW[0])
    assert follower.is_certain
    assert not after([], []).is_certain


def test_nothing_expected_is_silence():
    for output in ([], [1], [1, 2, 3, 1, 2, 3]):
        assert next_of([], output) is None


def test_a_copy_goes_its_own_way():
    follower = after(DIFFERENT, DIFFERENT[:10])
    other = follower.copy()
    for token in [NEW[0], *DIFFERENT[30:40]]:
        other.take(token)
    assert (follower.next, other.next) == (DIFFERENT[10], DIFFERENT[40])
    follower.take(DIFFERENT[60])
    other.take(DIFFERENT[41])
    assert (follower.next, other.next) == (DIFFERENT[11], DIFFERENT[42])
    follower.take(DIFFERENT[61])  # two together, that far ahead
    assert (follower.next, other.next) == (DIFFERENT[62], DIFFERENT[42])


def test_token_ids_of_any_size():
    large = [2**31, 2**61 - 1, 2**70, 0]
    assert next_of(large, large[:1]) == 2**61 - 1
    assert next_of(large, [5, 2**61 - 1]) == 2**70


places = st.integers(FIRM, 90)


@given(places, st.integers(0, REACH[0]), st.integers(0, 50))
def test_after_a_short_cut_or_replacement_one_token_is_enough(at, cut, new):
    output = [*DIFFERENT[:at], *NEW[:new], *DIFFERENT[at + cut : at + cut + 1]]
    assert next_of(DIFFERENT, output) == DIFFERENT[at + cut + 1]


@given(places, st.integers(REACH[0] + 1, 100), st.integers(0, 50))
def test_after_a_long_one_few_more_are(at, cut, new):
    needed = 2 if cut + 1 <= REACH[1] else FAR
    begin = [*DIFFERENT[:at], *NEW[:new]]
    for count in range(1, needed + 2):
        output = [*begin, *DIFFERENT[at + cut : at + cut + count]]
        right = next_of(DIFFERENT, output) == DIFFERENT[at + cut + count]
        assert right == (count >= needed)


@given(st.integers(100, 190), st.integers(1, 100), st.integers(0, 50))
def test_behind_the_place_it_takes_one_token_more(at, back, new):
    begin = [*DIFFERENT[:at], *NEW[:new]]
    for count in range(1, min(FAR + 2, back)):
        distance = back - count + 1
        needed = next((n for n, reach in enumerate(REACH, 1) if distance <= reach), FAR) + 1
        output = [*begin, *DIFFERENT[at - back : at - back + count]]
        right = next_of(DIFFERENT, output) == DIFFERENT[at - back + count]
        assert right == (count >= needed)


def test_what_is_nearest_ahead_is_taken_of_equal_matches():
    block = [1, 2, 3, 4]
    expected = [*DIFFERENT[:20], *block, 5, *DIFFERENT[20:30], *block, 6, *block, 7]
    assert next_of(expected, [*DIFFERENT[:30], *NEW[:2], 3, 4]) == 6
    assert next_of(expected, [*DIFFERENT[:30], *NEW[:2], DIFFERENT[29], *block]) == 6


def test_one_ahead_is_taken_of_two_that_are_equally_near():
    block = [1, 2, 3, 4]
    expected = [*block, 5, *DIFFERENT[:13], *block, 6, *NEW[:3], *block[:3], 7]
    jump = [*NEW[1:3], *block]  # to the end, until the 7 does not come
    assert next_of(expected, [*expected[:12], *jump]) == 6
    assert next_of(expected, [*expected[:11], *jump]) == 5


def test_beyond_some_tokens_it_is_the_nearest_match_that_is_taken():
    block = list(NEW[: LONGEST + 3])
    expected = [*block, 1, *block[2:], 2, 3, *block, 2, 4]
    assert next_of(expected, [*block, 2]) == 3


def test_few_tokens_are_found_far_behind_many_equal_ones():
    common = [1] * 2 * REACH[1]
    expected = [*DIFFERENT[:10], *common, 5, 6, 1, 7, *common]
    assert next_of(expected, [*DIFFERENT[:10], NEW[0], 5, 6, 1]) == 7


def test_a_longer_match_is_taken_before_a_nearer_one():
    expected = [*DIFFERENT[:20], 1, 5, *DIFFERENT[20:60], 2, 1, 6]
    assert next_of(expected, [*DIFFERENT[:18], 8, 1]) == 5
    assert next_of(expected, [*DIFFERENT[:18], 2, 1]) == 6


def test_a_replaced_token_is_taken_to_be_one_for_a_few_tokens_only():
    said = [next_of(DIFFERENT, [*DIFFERENT[:20], *NEW[:new]]) for new in range(GUESSES + 3)]
    assert said == [*DIFFERENT[20 : 21 + GUESSES], None, None]
    assert next_of(DIFFERENT, [*DIFFERENT[:20], NEW[0], DIFFERENT[21]]) == DIFFERENT[22]


def test_a_doubtful_match_does_not_move_where_the_next_search_begins():
    expected = [*DIFFERENT[:20], *NEW[:10], 5, *NEW[10:30], *DIFFERENT[20:]]
    # The 5 is found ten tokens ahead; what follows is near the place before, and behind that one.
    assert next_of(expected, [*DIFFERENT[:20], 5, NEW[0]]) == NEW[1]


def edited(expected: list[int], rng: random.Random) -> tuple[list[int], set[int]]:
    """A text with edits of every kind, and which of its tokens come less than six after one."""
    text: list[int] = []
    unsure: set[int] = set()
    at = 0
    while at < len(expected):
        run = rng.randrange(20, 120)
        text += expected[at : at + run]
        at += run
        short, long = rng.randrange(1, 8), rng.randrange(20, 90)
        new = [rng.choice(expected) for _ in range(rng.choice([short, long]))]
        kind = rng.choice(["insert", "delete", "replace", "move"])
        begin = len(text)
        if kind in ("insert", "replace"):
            text += new
        if kind in ("delete", "replace"):
            at += rng.choice([short, long])
        if kind == "move":
            source = rng.randrange(len(expected) - 40)
            text += expected[source : source + 40]
        unsure |= set(range(begin, len(text) + 6))
    return text, unsure


@pytest.mark.parametrize("seed", range(4))
def test_few_tokens_after_an_edit_it_is_right_again(seed):
    """Frequencies of tokens as in a language: the n-th most frequent one in proportion to 1/n."""
    rng = random.Random(seed)
    weights = [1 / rank for rank in range(1, 2001)]
    expected = rng.choices(range(2000), weights, k=3000)
    text, unsure = edited(expected, rng)
    follower = after(expected, [])
    right = []
    for at, token in enumerate(text):
        if at not in unsure:
            right.append(follower.next == token)
        follower.take(token)
    assert len(right) > 1000
    assert sum(right) > 0.97 * len(right)


@pytest.mark.parametrize("kind", looked(1))
def test_a_token_costs_the_same_with_100_000_expected(kind):
    """Nothing is as expected for long, so that every few tokens there is a search."""
    most = 2 * 2 * NEAREST * LONGEST + 20
    for length in (1_000, 100_000):
        follower = after(looked(length)[kind], [])
        for token in [0, 1, 1, 0, 0, 5, 0, 0, 1, 1, 1, 5, 5] * 4:
            with looks() as extending:
                follower.take(Looked(token))
            assert extending() <= most
