"""K chosen round by round: the text is the plain one, and a draft that rested missed nothing."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import islice
from typing import Any

import pytest
from conftest import draft_for, foreign, model, plain_of, prompt_of

from mlxspec.control.controller import Controller
from mlxspec.control.estimates import Knowledge, Learned
from mlxspec.control.policy import Need, Permit
from mlxspec.decode.engine import Engine
from mlxspec.decode.run import Run
from mlxspec.decode.session import Session
from mlxspec.defaults import AUTO, MAX_AUTO_TOKENS, MODEL
from mlxspec.drafters.proposals import PLAIN, Choice, Offer
from mlxspec.errors import UsageError
from mlxspec.metrics import Event, RoundStats
from mlxspec.params import SamplingParams
from mlxspec.parked import Parked

LENGTH = 80
SAMPLED = SamplingParams(temperature=1.0, seed=3)


class Erratic(Controller):
    """Changes its mind all the time, and often proposes nothing."""

    def __init__(self, seed: int) -> None:
        super().__init__({MODEL: 6})
        self._rng = random.Random(seed)
        self.told: list[tuple[Choice, int]] = []

    def choose(self, length: int, offers: Sequence[Offer] = ()) -> Choice:
        count = self._rng.choice([0, 0, 0, 1, 2, 4, 6])
        return Choice(MODEL, count) if count else PLAIN

    def permit(self, name: str, need: Need) -> Permit:
        return Permit.ALL

    def kept(self, choice: Choice, accepted: int) -> None:
        self.told.append((choice, accepted))


def drained(session: Session) -> list[tuple[int, int]]:
    """Runs a session to its end: proposals made and kept, of full rounds."""
    rounds = []
    while stats := session.step().stats:
        if stats.full:
            rounds.append((stats.drafted, stats.accepted))
    return rounds


def erratic(engine: Engine, prompt: list[int], seed: int = 0, **options: Any) -> Session:
    session = engine.session(prompt, max_tokens=LENGTH, draft_tokens=6, **options)
    session.policy = Erratic(seed)
    return session


# Attention, windows, states of both kinds, and mlx-lm's own caches.
NAMES = ["llama", "gemma3_text", "qwen3_next", "lfm2", "recurrent_gemma", "llama4"]


@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.parametrize("name", NAMES)
def test_a_draft_that_rested_has_missed_nothing(name: str, length: int) -> None:
    # A draft that is the target itself is wrong only if it was not told something.
    target = model(name)
    session = erratic(Engine(target, target, compiled=False), prompt_of(length), seed=3)
    rounds = drained(session)
    assert session.text == prompt_of(length) + plain_of(name, length, LENGTH)
    assert all(drafted == accepted for drafted, accepted in rounds)
    assert {drafted for drafted, _ in rounds} == {0, 1, 2, 4, 6}


@pytest.mark.parametrize("kind", ["half", "never"])
@pytest.mark.parametrize("name", NAMES)
def test_text_is_the_plain_one_whatever_is_chosen(name: str, kind: str) -> None:
    target = model(name)
    engine = Engine(target, draft_for(target, kind), compiled=False)
    for seed in range(2):
        session = erratic(engine, prompt_of(9), seed)
        drained(session)
        assert session.text == prompt_of(9) + plain_of(name, 9, LENGTH)


@pytest.mark.parametrize(("target", "draft"), [("llama", "lfm2"), ("qwen3_next", "llama")])
def test_a_draft_of_another_kind(target: str, draft: str) -> None:
    session = erratic(Engine(model(target), model(draft), compiled=False), prompt_of(9))
    drained(session)
    assert session.text == prompt_of(9) + plain_of(target, 9, LENGTH)


def test_a_draft_of_another_tokenizer_reads_what_it_missed_in_its_own_ids() -> None:
    target = model("llama")
    draft, shared = foreign(target)
    session = erratic(Engine(target, draft, shared=shared, compiled=False), prompt_of(9))
    assert all(drafted == accepted for drafted, accepted in drained(session))
    assert session.text == prompt_of(9) + plain_of("llama", 9, LENGTH)


def test_compiled_rounds_of_many_sizes() -> None:
    target = model("llama")
    session = erratic(Engine(target, draft_for(target, "half"), compiled=True), prompt_of(9))
    drained(session)
    assert session.text == prompt_of(9) + plain_of("llama", 9, LENGTH)


def test_a_controller_is_told_what_became_of_its_choices() -> None:
    target = model("llama")
    session = erratic(Engine(target, draft_for(target, "half"), compiled=False), prompt_of(9))
    rounds = drained(session)
    assert isinstance(session.policy, Erratic)
    told = [(choice.draft_tokens, accepted) for choice, accepted in session.policy.told]
    assert told[: len(rounds)] == rounds


# --- the engine -------------------------------------------------------------------------


def test_auto_is_the_default_and_says_what_it_did() -> None:
    target = model("llama")
    engine = Engine(target, draft_for(target, "half"), compiled=False)
    result = engine.generate(prompt_of(9), max_tokens=LENGTH)
    stats = result.speculation
    assert result.tokens == plain_of("llama", 9, LENGTH)
    assert (stats.auto, stats.draft_tokens) == (True, MAX_AUTO_TOKENS)
    assert stats.history[0] == (0, "", 0)
    assert any(visit.drafter == MODEL for visit in stats.history)
    assert stats.as_dict()["draft_tokens"] == AUTO
    assert sum(stats.drafted_by_position) == stats.drafted
    assert engine.generate(prompt_of(9), max_tokens=9, draft_tokens=2).speculation.auto is False


def test_runs_learn_from_each_other() -> None:
    target = model("llama")
    engine = Engine(target, target, compiled=False)
    assert engine.learned == Learned()
    engine.generate(prompt_of(9), max_tokens=LENGTH)
    known = engine.learned.at(LENGTH)[MODEL]
    assert known.costs[0] > 0
    assert known.acceptance[0] > 0.8
    events = engine.stream(prompt_of(9), max_tokens=LENGTH)
    for _ in range(8):
        next(events)
    events.close()  # a run that is given up teaches too
    assert engine.learned.at(LENGTH)[MODEL] != known


def second_of(run: Run) -> Event:
    """The first round has nothing to propose yet."""
    first, second = islice(run, 2)
    assert first.round == RoundStats(0, 0)
    return second


def test_what_was_learned_decides_the_first_round_that_proposes() -> None:
    target = model("llama")
    engine = Engine(target, target, compiled=False)
    engine.learned.learn(9, {MODEL: Knowledge((1.0, 1.05, 1.1, 1.15), (0.9, 0.9, 0.9))})
    first = second_of(engine.run(prompt_of(9), max_tokens=LENGTH))
    assert first.round is not None
    assert first.round.drafted >= 3
    engine.learned.learn(9, {MODEL: Knowledge((1.0, 5.0, 9.0), (0.2, 0.2))})
    first = second_of(engine.run(prompt_of(9), max_tokens=LENGTH))
    assert first.round is not None
    assert first.round.drafted == 0
    assert isinstance(first.round.parked, Parked)
    assert first.round.parked.loss > 0.5


def test_a_seed_determines_the_text_whatever_is_chosen() -> None:
    target = model("llama")
    engine = Engine(target, draft_for(target, "half"), compiled=False)
    results = [
        engine.generate(prompt_of(9), max_tokens=60, sampling=SAMPLED, draft_tokens=count)
        for count in (AUTO, AUTO)
    ]
    coupled = SamplingParams(temperature=1.0, seed=3, verify="coupled")
    results += [
        engine.generate(prompt_of(9), max_tokens=60, sampling=coupled, draft_tokens=count)
        for count in (0, 4)
    ]
    assert len({tuple(result.tokens) for result in results}) == 1
    assert results[0].speculation.rule == "coupled"


def test_the_seed_that_is_drawn_writes_the_same_text_again() -> None:
    target = model("llama")
    engine = Engine(target, target, compiled=False)
    drawn = engine.generate(prompt_of(9), max_tokens=40, sampling=SamplingParams(temperature=1.0))
    assert drawn.speculation.rule == "coupled"
    seeded = SamplingParams(temperature=1.0, seed=drawn.seed)
    assert engine.generate(prompt_of(9), max_tokens=40, sampling=seeded).tokens == drawn.tokens
    named = SamplingParams(temperature=1.0, seed=1, verify="token")
    assert engine.generate(prompt_of(9), max_tokens=9, sampling=named).speculation.rule == "token"


@pytest.mark.parametrize("asked", [-1, 65, "many", 2.5])
def test_other_values_are_refused(asked: Any) -> None:
    target = model("llama")
    with pytest.raises(UsageError, match="draft_tokens is"):
        Engine(target, target, compiled=False).generate(prompt_of(9), draft_tokens=asked)


def test_nothing_is_chosen_where_nothing_drafts() -> None:
    result = Engine(model("llama"), compiled=False).generate(prompt_of(9), max_tokens=9)
    assert result.speculation.auto is False
    assert result.speculation.enabled is False
