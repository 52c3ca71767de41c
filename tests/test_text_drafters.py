"""Proposals from the text: they are counted, they never change a text, and none stops it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from conftest import draft_for, model, plain_after, plain_of, prompt_of
from hypothesis import given
from hypothesis import strategies as st

from mlxspec.control.controller import Controller
from mlxspec.control.policy import Need, Permit
from mlxspec.decode.engine import Engine
from mlxspec.decode.session import Session
from mlxspec.defaults import AUTO, MODEL
from mlxspec.drafters.history import History
from mlxspec.drafters.proposals import PLAIN, Choice, Offer, Proposal
from mlxspec.drafters.text_drafters import WATCHED, TextDrafters
from mlxspec.metrics import silent
from mlxspec.params import SamplingParams

LENGTH = 70
# Attention, windows, states of both kinds, and mlx-lm's own caches.
NAMES = ["llama", "gemma3_text", "qwen3_next", "lfm2", "recurrent_gemma", "llama4"]
# A little text that comes again and again, so that there is much to propose.
REPETITIVE = [5, 9, 2, 7, 1] * 5


def expected_of(name: str, count: int = LENGTH) -> list[int]:
    return plain_after(name, tuple(REPETITIVE), count)


class Fake:
    """Proposes what a function of the text and the limit says."""

    most = 9

    def __init__(self, propose: Callable[[list[int], int], Any], name: str = "fake") -> None:
        self.name = name
        self.text: list[int] = []
        self._propose = propose

    def extend(self, tokens: Sequence[int]) -> None:
        self.text += tokens

    def propose(self, limit: int) -> Proposal:
        proposed = self._propose(self.text, limit)
        return proposed if isinstance(proposed, Proposal) else Proposal(tuple(proposed), 1)


def failing(*_: Any) -> Any:
    raise RuntimeError("out of ideas")


class Deaf(Fake):
    def extend(self, tokens: Sequence[int]) -> None:
        raise ValueError("it does not listen")


# --- bookkeeping ------------------------------------------------------------------------


def chain_of(*drafters: Any, vocabulary: int = 100) -> tuple[TextDrafters, list[str]]:
    notes: list[str] = []
    return TextDrafters(drafters, vocabulary, notes.append), notes


def test_what_is_not_taken_is_held_against_the_text() -> None:
    chain, _ = chain_of(Fake(lambda text, _: [1, 2, 3, 4, 5, 6]))
    chain.extend([0])
    assert chain.proposals(9) == {Offer("fake", 6, 1): (1, 2, 3, 4, 5, 6)}
    chain.watch(PLAIN)
    assert chain.extend([1, 2]) == []
    assert chain.extend([3, 9]) == [(Choice("fake", WATCHED, 1), 3)]
    chain.proposals(9)
    chain.watch(PLAIN)
    assert chain.extend([1, 2, 3, 4, 0]) == [(Choice("fake", WATCHED, 1), 4)]


def test_what_is_taken_is_not_counted_twice() -> None:
    chain, _ = chain_of(Fake(lambda *_: [1, 2], "a"), Fake(lambda *_: [3, 4], "b"))
    chain.extend([0])
    chain.proposals(9)
    chain.watch(Choice("a", 2, 1))
    assert chain.extend([1, 2, 5]) == [(Choice("b", 2, 1), 0)]


def test_of_one_text_proposals_are_asked_for_and_watched_once() -> None:
    asked = []
    chain, _ = chain_of(Fake(lambda text, _: asked.append(len(text)) or [1]))
    chain.extend([0])
    for _ in range(3):
        chain.proposals(9)
    chain.watch(PLAIN)
    chain.proposals(9)
    chain.watch(PLAIN)
    assert asked == [1]
    assert chain.extend([1]) == [(Choice("fake", 1, 1), 1)]


@given(
    st.lists(st.integers(0, 2), max_size=40),
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=40),
)
def test_every_proposal_is_counted_as_rounds_would_have(
    text: list[int], proposals: list[list[int]]
) -> None:
    chain, _ = chain_of(Fake(lambda text, _: proposals[(len(text) - 1) % len(proposals)]))
    chain.extend([0])
    counted = []
    for token in text:
        chain.proposals(9)
        chain.watch(PLAIN)
        counted += chain.extend([token])
    expected = []
    for at in range(len(text)):
        proposed = proposals[at % len(proposals)][:WATCHED]
        agrees = [a == b for a, b in zip(proposed, text[at:], strict=False)]
        if not all(agrees) or len(agrees) == len(proposed):
            right = next((i for i, same in enumerate(agrees) if not same), len(agrees))
            expected.append((Choice("fake", len(proposed), 1), right))
    assert sorted(counted, key=repr) == sorted(expected, key=repr)


@pytest.mark.parametrize(
    ("proposed", "sound"),
    [
        ([1, 2, 3, 4, 5, 6, 7], (1, 2, 3, 4, 5)),
        ([1, 100, 2], (1,)),
        ([-1, 2], ()),
        ([True, 2.0], (1, 2)),
        (Proposal((7,), 99), (7,)),
        (Proposal((7,), -3), (7,)),
    ],
)
def test_what_makes_no_sense_is_cut_short(proposed: Any, sound: tuple[int, ...]) -> None:
    chain, notes = chain_of(Fake(lambda *_: proposed))
    chain.extend([0])
    assert list(chain.proposals(5).values()) == ([sound] if sound else [])
    assert all(0 <= offer.grade < 5 for offer in chain.proposals(5))
    assert not notes


@pytest.mark.parametrize("bad", [Fake(failing, "bad"), Fake(lambda *_: None, "bad"), Deaf(failing)])
def test_one_that_fails_is_left_out_and_the_others_go_on(bad: Fake) -> None:
    chain, notes = chain_of(bad, Fake(lambda *_: [3], "good"))
    for token in range(3):
        chain.extend([token])
        assert [offer.drafter for offer in chain.proposals(5)] == ["good"]
    (note,) = notes
    assert "going on without the drafter" in note
    assert "Error" in note


# --- texts ------------------------------------------------------------------------------


class Erratic(Controller):
    """Changes its mind all the time: what the text proposes, a model, or nothing."""

    def __init__(self, seed: int, *, with_model: bool) -> None:
        super().__init__({MODEL: 6} if with_model else {})
        self._rng = random.Random(seed)
        self._with_model = with_model

    def permit(self, name: str, need: Need) -> Permit:
        return Permit.ALL

    def wants(self, offers: Sequence[Offer]) -> bool:
        return bool(offers) and self._rng.random() < 0.7

    def choose(self, length: int, offers: Sequence[Offer] = ()) -> Choice:
        if offers and self._rng.random() < 0.6:
            offer = self._rng.choice(list(offers))
            return Choice(offer.drafter, self._rng.randint(1, offer.tokens), offer.grade)
        if self._with_model and self._rng.random() < 0.6:
            return Choice(MODEL, self._rng.choice([1, 2, 4, 6]))
        return PLAIN


def engine_for(name: str, kind: str | None = None, *texts: Any, **options: Any) -> Engine:
    target = model(name)
    draft = draft_for(target, kind) if kind else None
    return Engine(target, draft, texts=texts or (History,), compiled=False, **options)


def sources_of(session: Session) -> dict[str, int]:
    """Runs a session to its end: how many tokens each drafter had accepted."""
    accepted: dict[str, int] = {}
    while stats := session.step().stats:
        accepted[stats.drafter] = accepted.get(stats.drafter, 0) + stats.accepted
    return accepted


@pytest.mark.parametrize("draft_tokens", [1, 4, AUTO])
@pytest.mark.parametrize("name", NAMES)
def test_history_alone_writes_the_plain_text(name: str, draft_tokens: Any) -> None:
    session = engine_for(name).session(REPETITIVE, max_tokens=LENGTH, draft_tokens=draft_tokens)
    accepted = sources_of(session)
    assert session.text == REPETITIVE + expected_of(name)
    assert set(accepted) <= {"", "history"}
    assert draft_tokens == AUTO or "history" in accepted


@pytest.mark.parametrize("kind", ["agrees", "half"])
@pytest.mark.parametrize("name", NAMES)
def test_chains_write_the_plain_text(name: str, kind: str) -> None:
    expected = expected_of(name)
    engine = engine_for(name, kind)
    for seed in range(2):
        session = engine.session(
            REPETITIVE, max_tokens=LENGTH, prediction=expected[:20] + expected[30:]
        )
        session.policy = Erratic(seed, with_model=True)
        accepted = sources_of(session)
        assert session.text == REPETITIVE + expected
        assert accepted["prediction"] > 0
        assert accepted[MODEL] > 0


def test_a_draft_that_rested_while_the_text_was_followed_has_missed_nothing() -> None:
    # A draft that is the target itself is wrong only if it was not told something.
    session = engine_for("qwen3_next", "agrees").session(REPETITIVE, max_tokens=LENGTH)
    session.policy = Erratic(3, with_model=True)
    while stats := session.step().stats:
        if stats.drafter == MODEL and stats.full:
            assert stats.accepted == stats.drafted


HOSTILE: dict[str, Callable[[], Any]] = {
    "random": lambda: Fake(
        lambda text, limit: random.Random(len(text)).choices(range(64), k=limit)
    ),
    "inverted": lambda: Fake(lambda text, limit: text[::-1][:limit]),
    "always wrong": lambda: Fake(lambda text, limit: [63 - text[-1]] * limit),
    "empty": lambda: Fake(lambda *_: []),
    "longer than allowed": lambda: Fake(lambda text, limit: [1] * (9 * limit)),
    "raises": lambda: Fake(failing),
    "raises later": lambda: Fake(lambda text, _: failing() if len(text) > 40 else [1, 2]),
    "does not listen": lambda: Deaf(lambda *_: [1]),
    "no such tokens": lambda: Fake(lambda *_: [10**9, -1]),
    "nothing at all": lambda: Fake(lambda *_: None),
}


@pytest.mark.parametrize("with_model", [False, True])
@pytest.mark.parametrize("hostile", HOSTILE)
def test_no_drafter_changes_a_text_or_stops_it(hostile: str, with_model: bool) -> None:
    engine = engine_for("llama", "half" if with_model else None, HOSTILE[hostile])
    expected = prompt_of(9) + plain_of("llama", 9, LENGTH)
    for draft_tokens in (AUTO, 3):
        session = engine.session(prompt_of(9), max_tokens=LENGTH, draft_tokens=draft_tokens)
        sources_of(session)
        assert session.text == expected
    session = engine.session(prompt_of(9), max_tokens=LENGTH)
    session.policy = Erratic(1, with_model=with_model)
    sources_of(session)
    assert session.text == expected


def test_one_that_fails_is_told_of() -> None:
    result = engine_for("llama", None, HOSTILE["raises"]).generate(prompt_of(9), max_tokens=9)
    assert any("going on without the drafter fake" in note for note in result.notes)


@pytest.mark.parametrize("with_model", [False, True])
def test_a_seed_determines_the_text_whatever_proposes(with_model: bool) -> None:
    engine = engine_for("llama", "half" if with_model else None)
    coupled = SamplingParams(temperature=0.7, seed=3, verify="coupled")
    texts = set()
    for seed in range(3):
        session = engine.session(REPETITIVE, max_tokens=40, sampling=coupled)
        session.policy = Erratic(seed, with_model=with_model)
        sources_of(session)
        texts.add(tuple(session.text))
    alone = engine.session(REPETITIVE, max_tokens=40, sampling=coupled, draft_tokens=0)
    sources_of(alone)
    assert texts == {tuple(alone.text)}


def test_compiled_rounds_of_every_source() -> None:
    target = model("llama")
    engine = Engine(target, draft_for(target, "half"), texts=(History,), compiled=True)
    session = engine.session(REPETITIVE, max_tokens=LENGTH)
    session.policy = Erratic(0, with_model=True)
    accepted = sources_of(session)
    assert session.text == REPETITIVE + expected_of("llama")
    assert accepted["history"] > 0


# --- who is asked -----------------------------------------------------------------------


def test_with_a_fixed_number_the_model_is_asked_and_before_it_a_prediction() -> None:
    engine = engine_for("llama", "half")
    expected = expected_of("llama")
    alone = sources_of(engine.session(REPETITIVE, max_tokens=LENGTH, draft_tokens=4))
    assert set(alone) - {""} == {MODEL}
    session = engine.session(
        REPETITIVE, max_tokens=LENGTH, draft_tokens=4, prediction=expected[:50]
    )
    both = sources_of(session)
    assert both["prediction"] > 30
    assert both[MODEL] > 0
    assert session.text == REPETITIVE + expected


@pytest.mark.parametrize("grade", [0, 1])
def test_with_a_fixed_number_the_model_goes_before_what_is_doubtful(grade: int) -> None:
    session = engine_for("llama", "half").session(REPETITIVE, max_tokens=LENGTH, draft_tokens=4)
    wrong = Fake(lambda _, limit: Proposal((0,) * limit, grade))
    session._track._texts = TextDrafters([wrong], 10, silent)
    taken = set(sources_of(session))
    assert session.text == REPETITIVE + expected_of("llama")
    assert taken - {""} == ({"fake"} if grade else {MODEL})


def test_a_text_that_is_followed_is_followed_on_without_rounds_in_between() -> None:
    whole = REPETITIVE + expected_of("llama", 61)
    engine = engine_for("llama", None, lambda: Fake(lambda text, n: whole[len(text) :][:n]))
    session = engine.session(REPETITIVE, max_tokens=61, draft_tokens=4)
    rounds = []
    while stats := session.step().stats:
        rounds.append((stats.drafter, stats.accepted))
    assert rounds == [("", 0)] + [("fake", 4)] * 12


def test_statistics_tell_the_sources_apart() -> None:
    expected = expected_of("llama")
    result = engine_for("llama", "half").generate(
        REPETITIVE, max_tokens=LENGTH, draft_tokens=4, prediction=expected[:50]
    )
    stats = result.speculation
    assert set(stats.by_source) == {"prediction", MODEL}
    assert sum(source.drafted for source in stats.by_source.values()) == stats.drafted
    assert sum(source.accepted for source in stats.by_source.values()) == stats.accepted
    prediction = stats.by_source["prediction"]
    rate = prediction.accepted / prediction.drafted
    assert stats.as_dict()["by_source"]["prediction"]["acceptance_rate"] == round(rate, 4)
    assert prediction.accepted > 30
    assert result.tokens == expected
