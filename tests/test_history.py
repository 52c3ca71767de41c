"""Proposals from the text so far."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxspec.history import LENGTHS, History
from mlxspec.proposals import GRADES, Proposal
from mlxspec.suffix import SHORTEST, SuffixIndex

TEXT = list(range(100, 160))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=80), st.integers(0, 80), st.integers(0, 40))
def test_it_proposes_what_the_index_finds_and_is_silent_otherwise(text, prompt, limit):
    history, index = History(), SuffixIndex()
    history.extend(text[:prompt])
    for token in text[prompt:]:
        history.extend([token])
    index.extend(text)
    match = index.continuation(min(limit, history.most))
    assert history.propose(limit).tokens == match.tokens


@pytest.mark.parametrize("length", range(SHORTEST, 40))
def test_the_grade_is_the_class_of_the_match(length):
    history = History()
    history.extend(TEXT + TEXT[:length])
    expected = sum(length >= bound for bound in LENGTHS)
    assert history.propose(3) == Proposal(tuple(TEXT[length : length + 3]), expected)
    assert 0 <= expected < GRADES


def test_there_is_a_bound_below_every_grade_but_the_first():
    assert len(LENGTHS) == GRADES - 1
    assert list(LENGTHS) == sorted(LENGTHS)


def test_it_needs_a_match_of_the_shortest_length():
    history = History()
    assert history.propose(8) == Proposal((), 0)
    history.extend([*TEXT, *TEXT[: SHORTEST - 1]])
    assert history.propose(8) == Proposal((), 0)
    history.extend(TEXT[SHORTEST - 1 : SHORTEST])
    assert history.propose(8).tokens == tuple(TEXT[SHORTEST : SHORTEST + 8])


def test_a_prompt_that_is_repeated_is_proposed_to_its_end():
    history = History()
    history.extend(TEXT)
    history.extend(TEXT[:SHORTEST])
    for at in range(SHORTEST, len(TEXT)):
        assert history.propose(4).tokens[0] == TEXT[at]
        history.extend([TEXT[at]])


def test_no_more_than_what_is_worth_it_and_what_is_asked_for():
    history = History(name="other", most=5)
    history.extend([1, 2] * 10)
    history.extend([])
    assert (history.name, history.most) == ("other", 5)
    assert [len(history.propose(limit).tokens) for limit in (0, 1, 5, 40)] == [0, 1, 5, 5]


def test_what_is_beyond_its_capacity_is_forgotten():
    history = History(capacity=64)
    history.extend(TEXT[:4] + [1000 + at for at in range(62)] + TEXT[:2])
    assert history.propose(2).tokens == ()
