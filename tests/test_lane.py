"""Texts side by side: each gets what it would get alone, whenever others join and leave."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from conftest import draft_for, model, plain, prompt_of
from rooms import watched

from mlxspec.control.controller import Controller
from mlxspec.control.policy import (
    ENDLESS,
    FixedPolicy,
    Need,
    Outlook,
    Permit,
    Plan,
    Policy,
    planned,
)
from mlxspec.decode.engine import Engine
from mlxspec.decode.lane import Lane
from mlxspec.decode.track import Track
from mlxspec.defaults import MODEL
from mlxspec.drafters.history import History
from mlxspec.drafters.proposals import PLAIN, Choice, Offer
from mlxspec.models.pace import Pace
from mlxspec.models.prefill import finished
from mlxspec.params import SamplingParams

pytestmark = pytest.mark.usefixtures("rooms")

LENGTH = 40
# Attention, quantised attention aside, windows, and states of both kinds.
NAMES = ["llama", "gemma3_text", "qwen3_next", "lfm2", "recurrent_gemma"]


class Erratic(Controller):
    """Lets every text do something else in every round."""

    def __init__(self, seed: int) -> None:
        super().__init__({MODEL: 4})
        self._rng = random.Random(seed)

    def plan(
        self, length: int, offers: Sequence[Sequence[Offer]], outlook: Outlook = ENDLESS
    ) -> Plan:
        rows = []
        for of_row in offers:
            some = [
                Choice(one.drafter, self._rng.randint(1, one.tokens), one.grade) for one in of_row
            ]
            counts = self._rng.sample([0, 1, 2, 4], 2)
            rows.append(
                self._rng.choice([*some, *(Choice(MODEL, k) if k else PLAIN for k in counts)])
            )
        return planned(self._rng.choice([Choice(MODEL, 4), PLAIN]), rows)

    def choose(self, length: int, offers: Sequence[Offer] = ()) -> Choice:
        return self.plan(length, [offers]).whole

    def wants(self, offers: Sequence[Sequence[Offer]]) -> bool:
        return self._rng.random() < 0.3

    def permit(self, name: str, need: Need) -> Permit:
        return self._rng.choice([Permit.PIECE, Permit.PIECE, Permit.LATER])


class Beside:
    """A lane of an engine, and the texts that join it."""

    def __init__(self, engine: Engine, policy: Callable[[int], Policy], **options: Any) -> None:
        self.engine = engine
        self.options = options
        request = engine.request([1], **options)
        self.lane = Lane(engine.rounds.of(request), policy)
        self.tracks: list[Track] = []

    def join(self, prompt: list[int], count: int, **options: Any) -> Track:
        request = self.engine.request(prompt, max_tokens=count, **(self.options | options))
        track = self.engine._maker.track(request, self.lane.rounds, self.lane.policy)
        self.lane.join(track, finished(track.read()))
        self.tracks.append(track)
        return track

    def step(self) -> None:
        for track, committed in self.lane.step():
            assert committed.error is None
            if track.left == 0:
                self.lane.leave(track)

    def finish(self) -> None:
        while self.lane.tracks:
            self.step()


def written(track: Track) -> list[int]:
    return track.text[len(track.request.tokens) :]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["agrees", "half"])
def test_every_text_is_the_plain_one(name: str, kind: str) -> None:
    target = model(name)
    engine = Engine(target, draft_for(target, kind), texts=[History], compiled=False)
    policies: list[Policy] = []

    def policy(rows: int) -> Policy:
        policies.append(Erratic(rows))
        return policies[-1]

    beside = Beside(engine, policy, draft_tokens="auto")
    rng = random.Random(3)
    prompts = [prompt_of(rng.choice([2, 3, 9, 30, 70]), seed) for seed in range(9)]
    for prompt in prompts:
        beside.join(prompt, rng.choice([1, 5, LENGTH]))
        for _ in range(rng.choice([0, 1, 2, 7])):
            beside.step()
    beside.finish()
    for prompt, track in zip(prompts, beside.tracks, strict=True):
        assert written(track) == plain(target, prompt, track.request.limit - len(prompt))


@pytest.mark.parametrize("count", [0, 1, 3, 8])
@pytest.mark.parametrize("name", ["llama", "qwen3_next"])
@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=0.9, seed=5, verify="coupled"),
        SamplingParams(temperature=0.9, seed=5, verify="block"),
    ],
)
def test_a_seed_gives_a_text_its_own_whoever_is_beside(
    name: str, count: int, sampling: SamplingParams
) -> None:
    target = model(name)
    engine = Engine(target, draft_for(target, "half"), compiled=False)
    options = {"draft_tokens": count, "sampling": sampling}
    alone = [
        engine.generate(prompt_of(9, seed), max_tokens=LENGTH, **options).tokens
        for seed in range(3)
    ]
    beside = Beside(engine, lambda _: FixedPolicy([MODEL], count), **options)
    for seed in range(3):
        beside.join(prompt_of(9, seed), LENGTH)
        beside.step()
    beside.finish()
    assert [written(track) for track in beside.tracks] == alone


def test_a_text_that_was_cut_at_its_limit_keeps_its_room_beside_others() -> None:
    engine = Engine(model("llama"), draft_for(model("llama"), "agrees"), compiled=False)
    beside = Beside(engine, lambda _: FixedPolicy([MODEL], 8), draft_tokens=8)
    # It ends so short of its caches' end that a round may write there and no further.
    cut, other = beside.join(prompt_of(236), 12), beside.join(prompt_of(9), LENGTH)
    with watched():
        while cut.left or other.left:
            beside.lane.step()
    (place, _) = beside.lane.state.position.tolist()
    assert place >= len(cut.text) + 5
    assert written(other) == plain(model("llama"), prompt_of(9), LENGTH)


@pytest.mark.parametrize("again", [False, True])
def test_what_a_model_has_read_is_told_where_some_is_left_over(
    monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    """Of a whole text, and of what was written without the model after it had read all."""
    monkeypatch.setattr(Pace, "rows", lambda *_, **__: 16)
    engine = Engine(model("llama"), draft_for(model("llama"), "half"), compiled=False)
    policy = FixedPolicy([], 0)
    beside = Beside(engine, lambda _: policy, draft_tokens=3)
    track = beside.join(prompt_of(70), 200)
    catching, drafts = beside.lane._catching_up, track.drafts
    beside.lane.step()
    if again:
        catching.read({track: Permit.ALL}, MODEL)
        while len(track.text) < 170:
            beside.lane.step()
    monkeypatch.setattr(policy, "permit", lambda name, need: Permit.LATER)  # but for one piece
    missed = drafts.missed(MODEL, track.text)
    caught = catching.read({track: Permit.PIECE}, MODEL)
    left = drafts.missed(MODEL, track.text)
    assert 0 < left < missed
    assert caught[:3] == (MODEL, missed - left, 1)


def test_rows_are_as_many_as_texts_need() -> None:
    engine = Engine(model("llama"), compiled=False)
    beside = Beside(engine, lambda _: FixedPolicy([], 0), draft_tokens=0)
    for seed, count in enumerate((60, 4, 4, 60, 4)):
        beside.join(prompt_of(9, seed), count)
    assert beside.lane.rows == 8
    seen = []
    while beside.lane.tracks:
        beside.step()
        seen.append((len(beside.lane.tracks), beside.lane.rows))
        # A free row stays at 0, where its writes have room, however long the others become.
        slots = beside.lane._slots
        places = slots.state.position.tolist() if slots.tracks else []
        assert not any(at for at, one in zip(places, slots.tracks, strict=True) if one is None)
    # Two are left of five: four rows go after a while, and not at once.
    first = next(place for place, (texts, _) in enumerate(seen) if texts == 2)
    assert seen[first] == (2, 8)
    assert (2, 4) in seen
    assert (2, 2) in seen
    assert (2, 1) not in seen
    for track in beside.tracks:
        count = track.request.limit - 9
        assert written(track) == plain(model("llama"), track.text[:9], count)
