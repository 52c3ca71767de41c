"""A draft reads between rounds, and only as far as that can pay: the text never stands still."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from conftest import draft_for, model, plain, prompt_of
from test_prompt_cache import Counted

from mlxspec.control.controller import READING_SHARE, Controller
from mlxspec.control.estimates import Knowledge
from mlxspec.control.policy import SLOW, Need, Permit
from mlxspec.decode import drafts
from mlxspec.decode.engine import Engine
from mlxspec.decode.reader import BETWEEN_S
from mlxspec.decode.session import Session
from mlxspec.defaults import AUTO, MODEL
from mlxspec.drafters.graph import ROWS
from mlxspec.drafters.proposals import PLAIN, Choice
from mlxspec.models.pace import LONGER, Pace

LENGTH = 60
GOOD = {MODEL: Knowledge((1.0, 1.05, 1.1, 1.15), (0.9, 0.9, 0.9))}


@pytest.fixture(autouse=True)
def drafts_may_read() -> None:
    """Only as far as it pays, unlike elsewhere in the tests."""


class Planted(Pace):
    """Says that a row takes a given time, whatever it took; its clock agrees."""

    def __init__(self, row_s: float, pass_s: float) -> None:
        super().__init__()
        self._row_s = row_s
        self._pass_s = pass_s
        self._now_s = 0.0
        super().took(1, row_s)

    @property
    def pass_s(self) -> float:
        return self._pass_s

    def took(self, rows: int, seconds: float) -> None:
        self._now_s += rows * self._row_s
        super().took(rows, rows * self._row_s)

    def perf_counter(self) -> float:
        return self._now_s


def engine_with(
    monkeypatch: pytest.MonkeyPatch, row_s: float, *, pass_s: float = 1e-6, known: bool = False
) -> tuple[Engine, Counted]:
    """An engine whose draft always agrees and reads a row in `row_s`."""
    draft = Counted(draft_for(model("llama"), "agrees"))
    engine = Engine(model("llama"), draft, compiled=False)
    engine.models[1].pace = pace = Planted(row_s, pass_s)
    monkeypatch.setattr(drafts, "time", pace)
    if known:
        for length in (5, 200, 500):
            engine.learned.learn(length, GOOD)
    draft._fed = 0
    return engine, draft


def fed_by_rounds(session: Session, draft: Counted) -> list[tuple[int, int]]:
    """Of every round: what it proposed, and how many tokens the draft was fed for it."""
    rounds, before = [], draft._fed
    while stats := session.step().stats:
        rounds.append((stats.drafted, draft._fed - before))
        before = draft._fed
    return rounds


def test_a_draft_reads_in_pieces_between_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, draft = engine_with(monkeypatch, 2e-3, known=True)
    prompt = prompt_of(200)
    session = engine.session(prompt, max_tokens=1500, draft_tokens=AUTO)
    rounds = fed_by_rounds(session, draft)
    assert session.text == prompt + plain(model("llama"), prompt, 1500)
    reading = [fed for drafted, fed in rounds if not drafted and fed]
    assert len(reading) >= 4
    assert max(reading) * 2e-3 <= 0.1 + 0.02  # and what the next round feeds it
    first = next(place for place, (drafted, _) in enumerate(rounds) if drafted)
    assert sum(fed for _, fed in rounds[: first + 1]) >= 199


def test_a_prompt_that_takes_no_time_delays_no_proposal(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, draft = engine_with(monkeypatch, 1e-6, known=True)
    session = engine.session(prompt_of(500), max_tokens=40, draft_tokens=AUTO)
    rounds = fed_by_rounds(session, draft)
    assert rounds[0] == (0, 0)
    assert rounds[1][0] > 0


def test_a_fixed_number_reads_everything_first(monkeypatch: pytest.MonkeyPatch) -> None:
    # The text may depend on what is proposed where, so that must not depend on the clock.
    engine, draft = engine_with(monkeypatch, 10.0, pass_s=10.0)
    session = engine.session(prompt_of(40), max_tokens=30, draft_tokens=2)
    rounds = fed_by_rounds(session, draft)
    assert rounds[0] == (0, 0)
    assert rounds[1][1] >= 39
    # That is no part of any round, and can be told from their time.
    assert session.draft_reading_s == pytest.approx(10.0 * 39)
    assert all(drafted for drafted, _ in rounds[1:-1])


def test_a_draft_slower_than_the_target_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, draft = engine_with(monkeypatch, 5.0, pass_s=5.0)
    session = engine.session(prompt_of(400), max_tokens=LENGTH, draft_tokens=AUTO)
    notes: list[str] = []
    while (committed := session.step()).stats:
        notes += committed.notes
        assert committed.stats.drafted == 0
    assert session.text[400:] == plain(model("llama"), prompt_of(400), LENGTH)
    assert draft._fed == 0  # its pass was timed before
    (note,) = notes
    assert note.startswith("going on without the draft model: one pass of it takes 5000.0 ms")


def test_much_that_others_wrote_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, draft = engine_with(monkeypatch, 1e-3, known=True)
    monkeypatch.setattr(drafts, "BETWEEN_S", 0.0)
    session = engine.session(prompt_of(5), max_tokens=700, draft_tokens=AUTO)
    turns = [Choice(MODEL, 2)] * 20 + [PLAIN] * 300 + [Choice(MODEL, 2)] * 400
    session.policy.choose = lambda *_: turns.pop(0)  # type: ignore[method-assign]
    rounds = fed_by_rounds(session, draft)
    assert session.text == prompt_of(5) + plain(model("llama"), prompt_of(5), 700)
    pieces = [fed for drafted, fed in rounds if fed > 9 and not drafted]
    assert len(pieces) >= 4
    assert max(pieces) == ROWS
    assert rounds[-2][0] == 2


@pytest.mark.parametrize("row_s", [0.5e-3, 2e-3, 20e-3])
def test_others_wait_for_a_piece_of_a_newcomer_at_most(
    row_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every text that is written gets its round between two pieces, and a piece takes 0.1 s."""
    # A piece takes no time here, and as many as fit into a step's time would be read in it.
    monkeypatch.setattr("mlxspec.decode.batch.BETWEEN_S", 0.0)
    engine = Engine(model("llama"), compiled=False)
    engine.models[0].pace = Planted(row_s, row_s)
    batch = engine.batch(max_rows=4)
    others = [batch.add(prompt_of(9, seed), max_tokens=5000) for seed in range(2)]
    while not all(row.generation.tokens for row in others):
        batch.step()
    tokens = 1500
    newcomer = batch.add(prompt_of(tokens), max_tokens=5)
    places = [0]
    while not newcomer.generation.tokens:
        before = [len(row.generation.tokens) for row in others]
        events = batch.step()
        assert all(len(row.generation.tokens) > n for row, n in zip(others, before, strict=True))
        read = [event.prefill.read for row, event in events if row is newcomer and event.prefill]
        assert len(read) <= 1
        places += read
    pieces_s = [(after - at) * row_s for at, after in pairwise([*places, tokens - 1])]
    # A size that may be faster is tried: up to a multiple of it, which tells little, and again.
    assert sum(one > BETWEEN_S for one in pieces_s) <= 2
    assert max(pieces_s) <= LONGER * BETWEEN_S
    assert newcomer.generation.tokens == plain(model("llama"), prompt_of(tokens), 5)[:1]


def test_texts_that_no_draft_reads_leave_it_to_those_that_join_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left_out: list[str] = []
    monkeypatch.setattr(Controller, "permit", lambda *_: Permit.NEVER)
    monkeypatch.setattr(Controller, "leave_out", lambda _, name: left_out.append(name))
    engine = Engine(model("llama"), draft_for(model("llama"), "agrees"), compiled=False)
    engine.generate_many([prompt_of(9), prompt_of(7)], max_rows=2, max_tokens=40)
    assert not left_out
    engine.generate(prompt_of(9), max_tokens=40)
    assert set(left_out) == {MODEL}


# --- what the controller permits ----------------------------------------------------------


NEED = Need(cost_s=0.1, piece_s=0.01, spent_s=0.0, pass_s=1e-3, plain_s=0.01, run_s=1.0, left_s=9.0)


def test_an_untried_draft_loses_a_small_share_of_the_time_at_most() -> None:
    policy = Controller({MODEL: 4})
    run_s, spent_s = 1.0, 0.0
    for _ in range(2000):
        run_s += 0.01
        one = NEED._replace(cost_s=None, spent_s=spent_s, run_s=run_s, left_s=21 - run_s)
        if policy.permit(MODEL, one) is Permit.PIECE:
            spent_s, run_s = spent_s + 0.01, run_s + 0.01
        assert spent_s <= READING_SHARE * max(2 * run_s, 2.0) + 0.01
    assert spent_s > READING_SHARE * 20  # and it makes use of it


@pytest.mark.parametrize(
    ("changed", "permit"),
    [
        ({}, Permit.PIECE),
        ({"cost_s": 8.0}, Permit.NEVER),
        ({"left_s": 0.1}, Permit.NEVER),
        ({"pass_s": SLOW * 0.0101}, Permit.NEVER),
        # Right or not, a draft as slow as the target saves nothing.
        ({"pass_s": 0.01}, Permit.NEVER),
        ({"spent_s": 0.2}, Permit.LATER),
        ({"piece_s": 0.2}, Permit.LATER),
        ({"plain_s": None}, Permit.PIECE),
        ({"pass_s": None, "cost_s": None, "piece_s": 0.0}, Permit.PIECE),
    ],
)
def test_an_untried_draft_may_read(changed: dict[str, Any], permit: Permit) -> None:
    assert Controller({MODEL: 4}).permit(MODEL, NEED._replace(**changed)) is permit


@pytest.mark.parametrize(
    ("changed", "permit"),
    [
        ({}, Permit.PIECE),
        # What it was seen to win pays for more.
        ({"cost_s": 3.0, "spent_s": 1.0}, Permit.PIECE),
        ({"cost_s": 8.0}, Permit.LATER),
        ({"cost_s": 8.0, "run_s": 200.0, "left_s": 200.0}, Permit.PIECE),
        ({"pass_s": SLOW * 0.0101}, Permit.NEVER),
    ],
)
def test_a_draft_that_pays_may_read(changed: dict[str, Any], permit: Permit) -> None:
    assert Controller({MODEL: 4}, GOOD).permit(MODEL, NEED._replace(**changed)) is permit


def test_a_choice_that_was_not_ready_is_due_again_at_once() -> None:
    policy = Controller({MODEL: 4})
    trials = 0
    for _ in range(30):
        choice = policy.choose(100)
        if choice.drafter:
            trials += 1
            policy.postponed(choice)
        policy.kept(PLAIN, 0)
        policy.took(PLAIN, 0.01)
    assert trials == 27  # all but the opening rounds
    # Once it is ready, its trial is a whole one.
    assert [policy.choose(100).drafter for _ in range(3)] == [MODEL, MODEL, ""]
