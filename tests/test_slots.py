"""What joining and leaving cost, and that no row writes where it has no room."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import pytest
from conftest import draft_for, model, plain, prompt_of
from mlx.utils import tree_flatten
from test_every_cache import engine_of

from mlxspec.bench.questions import joining
from mlxspec.control.policy import FixedPolicy, Outlook, Plan, planned
from mlxspec.decode.batch import Batch
from mlxspec.decode.engine import Engine
from mlxspec.decode.lane import Lane
from mlxspec.decode.slots import Slots
from mlxspec.decode.state import RoundState
from mlxspec.decode.track import Track
from mlxspec.defaults import MODEL
from mlxspec.drafters.proposals import PLAIN, Choice, Offer
from mlxspec.models.cached_model import FusedModel
from mlxspec.models.caches.layers import Layers, capacity_of
from mlxspec.models.prefill import finished

pytestmark = pytest.mark.usefixtures("rooms")

ROWS = 16
SLACK = 2**16  # bytes: for positions, keys and the like
CAPACITY = 4096


def joined(lane: Lane, engine: Engine, prompt: list[int], **options: Any) -> Track:
    request = engine.request(prompt, **options)
    track = engine._maker.track(request, lane.rounds, lane.policy)
    lane.join(track, finished(track.read()))
    return track


def test_the_time_of_joining_and_leaving_is_told_apart() -> None:
    target, change = model("llama"), Lane.join
    engine = Engine(target, compiled=False)
    with joining.timed_changes() as spent:
        engine.generate_many([prompt_of(9, i) for i in range(4)], max_rows=2, max_tokens=3)
    assert [len(one) for one in spent.values()] == [4, 4]
    assert min(map(min, spent.values())) > 0
    assert Lane.join is change


# --- bytes ------------------------------------------------------------------------------------


def bytes_of(state: RoundState) -> int:
    return sum(array.nbytes for _, array in tree_flatten(state))


def written_by(change: Callable[[], Any], slots: Slots) -> int:
    """The most bytes that a change of the state needed at once, beside the state."""
    mx.eval(slots.state)
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    change()
    mx.eval(slots.state)
    mx.synchronize()
    peak: int = mx.get_peak_memory()
    return peak - before


@pytest.mark.parametrize("kind", ["full", "full, 8 bits", "window", "gated delta", "latent"])
def test_joining_and_leaving_cost_one_row(kind: str) -> None:
    engine = engine_of(kind)
    options = {"max_tokens": 40, "draft_tokens": 0, "capacity": CAPACITY}
    lane = Lane(engine.rounds.of(engine.request([1], **options)), lambda _: FixedPolicy([], 0))
    tracks = [joined(lane, engine, prompt_of(9, row), **options) for row in range(ROWS)]
    slots = lane._slots
    row = bytes_of(slots.state) // ROWS
    for track in tracks[:ROWS:5]:
        assert written_by(lambda track=track: lane.leave(track), slots) <= SLACK
        request = engine.request(prompt_of(9), **options)
        newcomer = engine._maker.track(request, lane.rounds, lane.policy)
        state = finished(newcomer.read())
        mx.eval(state)
        cost = written_by(lambda track=newcomer, one=state: lane.join(track, one), slots)
        # Its own layers in the shape of the others', and a layer that is written at that time.
        assert cost <= 2 * row + SLACK
        assert cost < ROWS * row / 2 or row < SLACK
    assert lane.rows == ROWS


# --- room -------------------------------------------------------------------------------------


class ForTheFirst(FixedPolicy):
    """Drafts for the first row alone: the model reads no other text."""

    def __init__(self) -> None:
        super().__init__([MODEL], 3)

    def plan(self, length: int, offers: Sequence[Sequence[Offer]], outlook: Outlook) -> Plan:
        rows = [PLAIN] * len(offers)
        rows[0] = self.current
        return planned(Choice(MODEL, 3), rows)


@pytest.fixture
def held_to_room(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[int]]:
    """Holds every pass from a call on to the room of its rows; returns what was left, by pass."""
    left: list[int] = []
    forward = FusedModel.forward

    def watched(
        self: FusedModel, tokens: mx.array, layers: Layers, offset: mx.array, length: int
    ) -> tuple[mx.array, Layers]:
        last = int(mx.max(offset).item()) + tokens.shape[1]
        left.append(min(capacity_of(layers), length) - last)
        assert left[-1] >= 0, "a row writes past its room"
        return forward(self, tokens, layers, offset, length)

    def watch() -> list[int]:
        monkeypatch.setattr(FusedModel, "forward", watched)
        return left

    return watch


@pytest.mark.parametrize("joins_after", [0, 3])
def test_no_row_writes_past_the_room_of_a_draft_that_has_not_read_it(
    held_to_room: Callable[[], list[int]], joins_after: int
) -> None:
    """Beside a short text that it drafts for stand a long one and a place that a long one left."""
    engine = Engine(model("llama"), draft_for(model("llama"), "half"), compiled=False)
    left = held_to_room()
    options = {"max_tokens": 40, "draft_tokens": 3}
    rounds = engine.rounds.of(engine.request([1], **options))
    lane = Lane(rounds, lambda _: ForTheFirst())
    short = joined(lane, engine, prompt_of(9), **options)
    for _ in range(joins_after):
        lane.step()
    longs = [joined(lane, engine, prompt_of(700, seed), **options) for seed in range(2)]
    while short.left:
        lane.step()
        if longs[1] in lane.tracks and len(longs[1].text) > 710:
            lane.leave(longs[1])
    assert left
    assert MODEL in short.drafts.read
    assert MODEL not in longs[0].drafts.read
    for track in (short, longs[0]):
        prompt = list(track.request.tokens)
        expected = plain(model("llama"), prompt, 40)
        assert track.text[len(prompt) :] == expected[: len(track.text) - len(prompt)]


# --- what stays -------------------------------------------------------------------------------


def steps_until(batch: Batch, done: Callable[[], bool]) -> None:
    while not done():
        batch.step()


def test_a_thousand_texts_beside_one_leave_nothing_behind() -> None:
    """Whether they end or are cancelled while they are read, wait or are written."""
    engine = Engine(model("llama"), draft_for(model("llama"), "half"), compiled=False)
    batch = engine.batch(max_rows=4)
    stays = batch.add(prompt_of(9), max_tokens=100_000, draft_tokens=1)
    tracks: list[weakref.ref[Track]] = []

    def some(count: int) -> int:
        for seed in range(count):
            row = batch.add(prompt_of(3 + seed % 5, seed), max_tokens=2, draft_tokens=1)
            if seed % 3 == 0:
                batch.step()
                row.cancel()
            steps_until(batch, lambda: batch.waiting == 0)
            if row._track is not None:
                tracks.append(weakref.ref(row._track))
        steps_until(batch, lambda: batch.running == 1)
        for _ in range(12):  # and the rows that are free go
            batch.step()
        batch.prefixes.clear()  # which keeps what it may for later texts
        gc.collect()
        mx.synchronize()
        mx.clear_cache()
        assert stays._lane is not None
        return mx.get_active_memory() - bytes_of(stays._lane.state)  # which grows with its text

    before = some(60)
    assert some(940) <= before + SLACK
    assert stays._lane is not None
    assert stays._lane.rows == 1
    assert [one for one in tracks if one() is not None] == []
    assert list(batch._rows.values()) == [stays]
    assert list(batch._lanes) == [stays._lane]
