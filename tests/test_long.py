"""Long texts: a draft reads after the first token, of a long text its end, and not for nothing."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from conftest import draft_for, model, plain, plain_of, prompt_of
from test_prompt_cache import Counted

from mlxspec.control.estimates import Knowledge
from mlxspec.control.policy import Permit
from mlxspec.decode import drafts
from mlxspec.decode.engine import Engine
from mlxspec.decode.reader import Reader
from mlxspec.decode.session import Session
from mlxspec.defaults import MODEL
from mlxspec.device import lengths
from mlxspec.drafters.proposals import PLAIN, Choice
from mlxspec.models.caches.layers import capacity_of
from mlxspec.models.prefill import finished

WINDOW, LENGTH = 16, 80


def reader_of(engine: Engine) -> Reader:
    request = engine.request([1])
    return Reader(engine.rounds.of(request), request)


@pytest.fixture
def small_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts, "WINDOW", WINDOW)


def starts_of(session: Session) -> list[int]:
    """Runs a session to its end: where its draft began to read, whenever it began anew."""
    starts: list[int] = []
    while session.step().tokens:
        state, _ = session.ahead(0)
        if MODEL in state.drafts:
            start = state.drafts[MODEL].start.item()
            starts += [start] if [start] != starts[-1:] else []
    return starts


@pytest.mark.parametrize("length", [3, 15, 17, 90])
@pytest.mark.parametrize(
    "name", ["llama", "gemma3_text", "qwen3_next", "recurrent_gemma", "llama4"]
)
def test_a_draft_reads_the_end_of_a_long_text(small_window: None, name: str, length: int) -> None:
    target = model(name)
    session = Engine(target, target, compiled=False).session(
        prompt_of(length), max_tokens=LENGTH, draft_tokens=3
    )
    starts = starts_of(session)
    assert session.text == prompt_of(length) + plain_of(name, length, LENGTH)
    assert starts[0] == max((length - 1) // WINDOW - 1, 0) * WINDOW
    assert all(b - a == WINDOW for a, b in pairwise(starts))
    assert length + LENGTH - starts[-1] < 3 * WINDOW


def test_what_a_draft_keeps_does_not_grow_with_the_text(
    small_window: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lengths, "attended", lambda length: length)
    monkeypatch.setattr(lengths, "reserved", lambda length: length)
    monkeypatch.setattr("mlxspec.decode.reader.MAX_DRAFT_TOKENS", 8)
    target = model("llama")
    session = Engine(target, target, compiled=False).session(
        prompt_of(90), max_tokens=LENGTH, draft_tokens=3
    )
    room = set()
    while session.step().tokens:
        drafts = session._lane.state.drafts
        room |= {capacity_of(past.layers) for past in drafts.values()}
    assert max(room) <= 2 * WINDOW + 2 * 4 + 2  # and two rounds in flight


def test_a_draft_counts_its_positions_from_where_it_began() -> None:
    # After the end alone it proposes what a model says that was never told the rest.
    target = model("llama")
    engine = Engine(target, target, compiled=False)
    text, start = prompt_of(60), 40
    state = engine.prefilled(text, draft=False, capacity=128)
    state = state.with_draft(MODEL, finished(reader_of(engine).draft(MODEL, text[start:-2], start)))
    rounds = engine.session(text, draft_tokens=3).rounds
    propose, _ = rounds.halves(3, 128)
    assert propose(state)[0].tokens[0].tolist() == plain(target, text[start:], 3)
    assert plain(target, text[start:], 3) != plain(target, text, 3)


def test_the_first_token_waits_for_the_target_alone() -> None:
    draft = Counted(model("llama"))
    engine = Engine(model("llama"), draft, compiled=False)
    draft._fed = 0
    session = engine.session(prompt_of(40), max_tokens=20, draft_tokens=3)
    session.step()
    assert draft._fed == 0
    session.step()
    assert draft._fed >= 39


# --- several drafts ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3_next"])
def test_of_several_drafts_the_best_is_used(name: str) -> None:
    target = model(name)
    drafts: dict[str, Any] = {"bad": draft_for(target, "never"), "good": target}
    engine = Engine(target, drafts, compiled=False)
    # Rounds of a tiny model take what Python takes: only what is kept tells them apart.
    engine.learned.learn(
        9, {one: Knowledge((1.0, 1.05, 1.1, 1.15, 1.2), (0.5, 0.5)) for one in drafts}
    )
    result = engine.generate(prompt_of(9), max_tokens=150)
    assert result.tokens == plain_of(name, 9, 150)
    sources = result.speculation.by_source
    assert sources["good"].acceptance_rate == 1
    assert sources["good"].accepted > 40
    if "bad" in sources:
        assert sources["bad"].rounds < sources["good"].rounds


def test_with_a_fixed_number_the_first_draft_is_used() -> None:
    target = model("llama")
    engine = Engine(target, {"one": draft_for(target, "half"), "two": target}, compiled=False)
    result = engine.generate(prompt_of(9), max_tokens=40, draft_tokens=3)
    assert set(result.speculation.by_source) == {"one"}


def test_drafts_that_take_turns_miss_nothing() -> None:
    target = model("qwen3_next")
    engine = Engine(target, {"one": target, "two": target}, compiled=False)
    session = engine.session(prompt_of(9), max_tokens=LENGTH)
    turns = [Choice("one", 2), Choice("two", 3), PLAIN, Choice("two", 1), Choice("one", 4)]
    session.policy.choose = lambda *_: turns[len(session.text) % 5]  # type: ignore[method-assign]
    session.policy.permit = lambda *_: Permit.ALL  # type: ignore[method-assign]
    used = set()
    while stats := session.step().stats:
        used.add(stats.drafter)
        assert stats.accepted == stats.drafted or not stats.full
    assert used == {"", "one", "two"}
    assert session.text == prompt_of(9) + plain_of("qwen3_next", 9, LENGTH)
