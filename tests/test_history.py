"""Proposals from the text so far."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from looks import Looked, looked, looks

from mlxspec.drafters.history import FIRM, SHORTEST, STRENGTHS, SURE, TENTATIVE, History, Prediction
from mlxspec.drafters.proposals import GRADES, Proposal

TEXT = list(range(100, 160))


def after(prompt, output, **options):
    history = History(**options)
    history.extend(prompt)
    for token in output:
        history.extend([token])
    return history


def next_of(prompt, output):
    return next(iter(after(prompt, output).propose(1).tokens), None)


@settings(max_examples=100)
@given(st.lists(st.integers(0, 3), max_size=80), st.integers(0, 80), st.integers(0, 40), st.data())
def test_what_is_proposed_does_not_depend_on_how_much_is(text, prompt, limit, data):
    history = after(text[:prompt], text[prompt:])
    fewer = data.draw(st.integers(0, limit))
    proposal = history.propose(limit)
    assert history.propose(fewer).tokens == proposal.tokens[:fewer]
    assert history.propose(limit) == proposal
    assert 0 <= proposal.grade < GRADES


def test_whole_blocks_are_as_good_as_tokens():
    prompt, output = TEXT, [*TEXT[:20], 1, 2, *TEXT[25:40]]
    history = History()
    history.extend(prompt)
    history.extend(output)
    assert history.propose(8) == after(prompt, output).propose(8)


@pytest.mark.parametrize("length", range(SHORTEST, 40))
def test_a_prompt_that_is_repeated_is_proposed_to_its_end(length):
    count = 31 if length >= FIRM else TENTATIVE
    proposal = after(TEXT, TEXT[:length]).propose(31)
    assert proposal.tokens[: len(TEXT) - length] == tuple(TEXT[length:][:count])


@pytest.mark.parametrize("length", range(SHORTEST, 40))
def test_what_the_output_repeats_is_proposed(length):
    output = [*TEXT, 1, *TEXT[:length]]
    count = 4 if length >= FIRM else TENTATIVE
    assert after([2], output).propose(4).tokens == tuple(TEXT[length : length + count])


@pytest.mark.parametrize("length", range(1, 40))
def test_the_grade_rises_with_what_speaks_for_the_first_token(length):
    grade = after(TEXT, TEXT[:length]).propose(31).grade
    assert grade == (sum(length >= bound for bound in STRENGTHS) if length >= FIRM else 0)


def test_what_was_wrong_in_the_likewise_place_is_doubtful():
    lines = [[*range(10), value] for value in TEXT]
    output = [token for line in lines[:3] for token in line]
    doubtful = after([50], [*output, *range(4)]).propose(31)
    assert doubtful.tokens[:7] == (*range(4, 10), TEXT[2])
    assert doubtful.grade == sum(bound <= 6 for bound in SURE)  # the last value is a guess


def test_there_is_a_bound_below_every_grade_but_the_first():
    for bounds in (STRENGTHS, SURE):
        assert len(bounds) == GRADES - 1
        assert list(bounds) == sorted(bounds)


def test_silent_on_what_does_not_repeat():
    history = History()
    assert history.propose(8) == Proposal((), 0)
    history.extend(TEXT)
    assert history.propose(8) == Proposal((), 0)
    history.extend([1, 2, 3])
    assert history.propose(8) == Proposal((), 0)


def test_one_token_alone_is_not_enough_in_the_output():
    assert next_of([1], [*TEXT, 7, TEXT[0]]) is None
    assert next_of([1], [*TEXT, 7, *TEXT[:SHORTEST]]) == TEXT[SHORTEST]


def test_no_more_than_what_is_worth_it_and_what_is_asked_for():
    history = after([1], [2, 3] * 10, name="other", most=5)
    history.extend([])
    assert (history.name, history.most) == ("other", 5)
    assert [len(history.propose(limit).tokens) for limit in (0, 1, 5, 40)] == [0, 1, 5, 5]


def test_after_a_change_it_goes_on_with_the_prompt():
    changed = [*TEXT[:20], 1, *TEXT[21:23]]
    assert next_of(TEXT, changed[:21]) == TEXT[21]
    assert next_of(TEXT, [*TEXT[:20], 1, 2, 3, *TEXT[20:22]]) == TEXT[22]  # added
    assert next_of(TEXT, [*TEXT[:20], *TEXT[25:27]]) == TEXT[27]  # cut


def test_a_change_that_is_made_again_is_proposed_again():
    numbers = range(30, 45)
    prompt = [token for number in numbers for token in (1, 2, number, 3, 4, 10 * number, 6)]
    # The 5 is the output's own, the numbers are the prompt's.
    wanted = [token for number in numbers for token in (1, 2, number, 3, 5, 4, 10 * number, 6)]
    assert after(prompt, wanted[:48]).propose(24).tokens == tuple(wanted[48:72])


def test_what_was_followed_for_long_outweighs_what_the_output_did_after_one_token():
    assert next_of(TEXT, [TEXT[30], 7] * 3 + TEXT[:31]) == TEXT[31]
    assert next_of(TEXT, [TEXT[30], 7] * 3 + TEXT[28:31]) == 7


def test_where_both_agree_it_is_sure():
    agreed = after(TEXT, [*TEXT[40:42], *TEXT[38:41]])
    assert agreed.propose(8).tokens == tuple(TEXT[41:49])
    assert len(after(TEXT, TEXT[38:41]).propose(8).tokens) == TENTATIVE


def test_two_tokens_are_found_anywhere_in_the_prompt():
    prompt = list(range(100, 400))
    assert after(prompt, prompt[200:202]).propose(8).tokens == tuple(prompt[202:205])


def test_data_in_another_form():
    rows = [
        {"id": number, "name": f"row {number * 37 % 101}", "size": number * 7919 % 1000}
        for number in range(24)
    ]
    history = History()
    history.extend(json.dumps(rows).encode())
    text = json.dumps(rows, indent=2).encode()
    right = []
    for token in text:
        right.append(history.propose(1).tokens == (token,))
        history.extend([token])
    assert sum(right[400:]) > 0.94 * len(right[400:])


def test_what_is_beyond_its_capacity_is_forgotten():
    history = after(TEXT[:4] + [1000 + at for at in range(62)], TEXT[:2], capacity=64)
    assert history.propose(2).tokens == ()


def test_a_long_output_outlives_its_capacity():
    rng = random.Random(0)
    text = [rng.randrange(5) for _ in range(400)]
    assert after(text[:100], text[100:], capacity=64).propose(8).tokens
    period = after([7], [1, 2, 3] * 100, capacity=64)
    assert period.propose(4).tokens == (1, 2, 3, 1)


@pytest.mark.parametrize("kind", looked(1))
def test_a_token_costs_the_same_after_100_000(kind):
    counts = []
    for length in (2_000, 100_000):
        text = looked(length)[kind]
        history = History()
        history.extend(text)
        with looks() as extending:
            history.extend([Looked(token) for token in [0, 1, 1, 0, 0, 5, 0, 1] * 3])
        with looks() as proposing:
            history.propose(31)
        counts.append((extending(), proposing()))
    for short, long in zip(*counts, strict=True):
        assert long <= 1.5 * short


# --- what is expected -------------------------------------------------------------------


def expecting(expected, output, prompt=(1, 2, 3), **options):
    prediction = Prediction(expected, **options)
    prediction.extend(prompt)
    prediction.extend(output)
    return prediction


def test_what_is_expected_is_proposed_from_the_first_token_on():
    for prompt in ((), TEXT[:30]):
        prediction = expecting(TEXT, [], prompt)
        for at in range(len(TEXT) - 8):
            assert prediction.propose(8).tokens == tuple(TEXT[at : at + 8])
            prediction.extend([TEXT[at]])


def test_what_is_expected_is_sure_while_it_comes():
    assert expecting(TEXT, []).propose(31).grade >= 2
    assert expecting(TEXT, TEXT[:20]).propose(31).grade == GRADES - 1
    assert expecting(TEXT, [*TEXT[:20], 7]).propose(31).grade == 0


def test_what_was_changed_in_what_is_expected_is_changed_again():
    numbers = range(30, 45)
    expected = [token for number in numbers for token in (1, 2, number, 3, 4, 10 * number, 6)]
    wanted = [token for number in numbers for token in (1, 2, number, 3, 5, 4, 10 * number, 6)]
    assert expecting(expected, wanted[:48], prompt=[9]).propose(24).tokens == tuple(wanted[48:72])


def test_nothing_expected_is_silence_where_nothing_repeats():
    for output in ([], [1], [5, 6, 7]):
        assert expecting([], output).propose(8).tokens == ()


def test_a_prediction_proposes_no_more_than_is_asked_for():
    prediction = expecting(TEXT, [], name="other", most=5)
    assert (prediction.name, prediction.most) == ("other", 5)
    assert [len(prediction.propose(limit).tokens) for limit in (0, 1, 5, 40)] == [0, 1, 5, 5]
