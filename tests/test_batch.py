"""Many texts through one batch: each is the one that it would be alone, and ends on its own."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from architectures import build
from conftest import draft_for, foreign, model, plain, prompt_of, with_vocabulary
from test_quantized import SHAPE

from mlxspec.control.estimates import Knowledge
from mlxspec.decode import lane
from mlxspec.decode.batch import MAX_ROWS, TAKES_TURNS, Batch, Row
from mlxspec.decode.engine import Engine
from mlxspec.defaults import MODEL
from mlxspec.drafters.history import History
from mlxspec.errors import BrokenOutput, MlxspecError, OutOfMemory, UsageError
from mlxspec.metrics import Event
from mlxspec.models.pace import Pace
from mlxspec.params import KVQuantization, Penalties, SamplingParams

pytestmark = pytest.mark.usefixtures("rooms")

COUNT = 24
SAMPLED = SamplingParams(temperature=0.8, seed=4)
# The last two take turns: rounds of llama4 wait, and those of gemma2 are of one row.
NAMES = ["llama", "gemma3_text", "qwen3_next", "recurrent_gemma", "llama4", "gemma2"]


def engine_of(name: str = "llama", kind: str = "half", **options: Any) -> Engine:
    target = model(name)
    return Engine(target, draft_for(target, kind), compiled=False, **options)


def finish(batch: Batch) -> list[tuple[Row, Event]]:
    events = []
    while not batch.done:
        events += batch.step()
    return events


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("draft_tokens", [0, 3, "auto"])
def test_texts_are_the_plain_ones_whatever_their_length(name: str, draft_tokens: Any) -> None:
    prompts = [prompt_of(length, length) for length in (1, 2, 40, 1, 9, 3)]
    engine = engine_of(name)
    results = engine.generate_many(prompts, max_rows=4, max_tokens=COUNT, draft_tokens=draft_tokens)
    assert [one.tokens for one in results] == [plain(model(name), one, COUNT) for one in prompts]
    assert all(one.finish_reason == "length" for one in results)
    takes_turns = name in ("llama4", "gemma2")
    assert all((TAKES_TURNS in one.notes) == takes_turns for one in results)


class Guess:
    """A head that proposes what the target's output layer makes of its own features."""

    taps, most = ("model.norm",), 3

    def __init__(self, target: Any) -> None:
        self._embedding = target.model.embed_tokens

    def begin(self, capacity: int) -> mx.array:
        return self._embedding(mx.zeros((1, 1), mx.int32))

    def propose(
        self, past: Any, last_two: Any, position: Any, picks: Any, count: int, length: int
    ) -> Any:
        for _ in range(count):
            picks.pick(self._embedding.as_linear(past))
        return past

    def commit(self, past: Any, tokens: Any, features: Any, position: Any, kept: Any) -> Any:
        feature = features["model.norm"]
        last = feature.shape[1] - 1 if kept is None else kept - 1
        return mx.take_along_axis(feature, mx.array(last).reshape(-1, 1, 1), axis=1)


@cache
def engines() -> dict[str, Engine]:
    target, wide = model("llama"), build("llama", **SHAPE)
    other, shared = foreign(target)
    return {
        "quantised": Engine(wide, wide, kv=KVQuantization(8, 32), compiled=False),
        "another tokenizer": Engine(target, other, shared=shared, compiled=False),
        "two drafts": Engine(
            target, {"one": draft_for(target, "half"), "two": target}, compiled=False
        ),
        "fewer tokens": Engine(target, with_vocabulary(target, 40), compiled=False),
        "a head": Engine(target, heads={"guess": Guess(target)}, compiled=False),
        "compiled": Engine(target, draft_for(target, "half"), texts=[History], compiled=True),
    }


ENGINES = ["quantised", "another tokenizer", "two drafts", "fewer tokens", "a head", "compiled"]


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("draft_tokens", [2, "auto"])
def test_whatever_drafts_drafts_beside_others(kind: str, draft_tokens: Any) -> None:
    engine = engines()[kind]
    prompts = [prompt_of(length, length) for length in (30, 1, 9, 4, 12)]
    options = {"max_tokens": COUNT, "draft_tokens": draft_tokens}
    for sampling in (SamplingParams(), SamplingParams(temperature=0.9, seed=3, verify="coupled")):
        alone = [engine.generate(one, sampling=sampling, **options).tokens for one in prompts]
        results = engine.generate_many(prompts, max_rows=3, sampling=sampling, **options)
        assert [one.tokens for one in results] == alone
        drafted = sum(one.speculation.drafted for one in results)
        assert drafted > 0 or draft_tokens == "auto"  # which may find that it does not pay


def test_ways_of_sampling_side_by_side() -> None:
    """Each with its seed, penalties, biases and processors, as alone."""

    def never_seven(tokens: mx.array, logits: mx.array) -> mx.array:
        logits[:, 7] = -mx.inf
        return logits

    options: list[dict[str, Any]] = [
        {},
        {"sampling": SAMPLED},
        {"sampling": SamplingParams(temperature=1.3, seed=5)},
        {"sampling": SamplingParams(temperature=0.8, seed=4, verify="block"), "draft_tokens": 3},
        {"sampling": SamplingParams(temperature=0.8, seed=4, top_k=5)},
        {"sampling": SamplingParams(penalties=Penalties(repetition=1.3))},
        {"sampling": SamplingParams(logit_bias={3: 2.0})},
        {"sampling": SamplingParams(logit_bias={5: 9.0})},
        {"processors": [never_seven]},
        {"prediction": prompt_of(30, 1)},
        {"max_tokens": 3},
    ]
    engine = engine_of(texts=[History])
    everything = [{"max_tokens": COUNT, "draft_tokens": "auto"} | some for some in options]
    alone = [engine_of(texts=[History]).generate(prompt_of(9), **some) for some in everything]
    batch = engine.batch(max_rows=8)
    rows = [batch.add(prompt_of(9), **some) for some in everything]
    finish(batch)
    assert [row.generation.tokens for row in rows] == [one.tokens for one in alone]


def test_the_order_of_arrival_decides_nothing() -> None:
    prompts = [prompt_of(length) for length in (3, 30, 9, 60, 12)]
    engine = engine_of()
    forwards = engine.generate_many(prompts, max_rows=4, max_tokens=COUNT, sampling=SAMPLED)
    backwards = engine.generate_many(prompts[::-1], max_rows=2, max_tokens=COUNT, sampling=SAMPLED)
    assert [one.tokens for one in forwards] == [one.tokens for one in backwards[::-1]]


def test_events_tell_what_happens() -> None:
    batch = engine_of().batch(max_rows=2)
    rows = [batch.add(prompt_of(9, seed), max_tokens=COUNT) for seed in range(3)]
    assert (batch.running, batch.waiting) == (0, 3)
    events = finish(batch)
    for row in rows:
        own = [event for one, event in events if one is row and event.prefill is None]
        assert [token for event in own for token in event.tokens] == row.generation.tokens
        assert [event.finish_reason for event in own[-2:]] == [None, "length"]
        assert row.done
        assert row.generation.timing.time_to_first_token_s > 0
    assert batch.step() == []
    assert [row.index for row in rows] == [0, 1, 2]


@pytest.mark.parametrize("when", [0, 1, 4])
def test_a_cancelled_text_frees_its_row_within_a_round(when: int) -> None:
    batch = engine_of().batch(max_rows=1)
    first = batch.add(prompt_of(9), max_tokens=200)
    second = batch.add(prompt_of(9, 1), max_tokens=COUNT)
    for _ in range(when):
        batch.step()
    first.cancel()
    assert (first, Event(finish_reason="interrupted")) in batch.step()
    assert first.done
    assert batch.running + batch.waiting == 1
    finish(batch)
    assert (
        first.generation.tokens
        == plain(model("llama"), prompt_of(9), 200)[: len(first.generation.tokens)]
    )
    assert second.generation.tokens == plain(model("llama"), prompt_of(9, 1), COUNT)


def test_a_text_that_is_cancelled_while_others_are_read_is_in_no_round_after_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = engine_of().batch(max_rows=4)
    first, second = (batch.add(prompt_of(9, seed), max_tokens=200) for seed in range(2))
    while batch.running < 2:
        batch.step()
    read_piece = Batch._read_piece

    def cancelling(self: Batch) -> list[tuple[Row, Event]]:
        first.cancel()
        return read_piece(self)

    monkeypatch.setattr(Batch, "_read_piece", cancelling)
    batch.add(prompt_of(40), max_tokens=200)
    events = batch.step()
    assert [event for row, event in events if row is first] == [Event(finish_reason="interrupted")]
    assert [bool(event.tokens) for row, event in events if row is second] == [True]
    batch.close()


class Nowhere(nn.Module):
    """A model whose scores are no distribution after token 63."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        return mx.where((tokens == 63)[..., None], mx.nan, self.inner(tokens, cache=cache))

    @property
    def layers(self) -> Any:
        return self.inner.layers


def test_a_text_without_a_distribution_ends_alone() -> None:
    target = Nowhere(model("llama"))
    batch = Engine(target, compiled=False).batch()
    bad = batch.add([*prompt_of(9), 63], max_tokens=COUNT)
    good = batch.add(prompt_of(9), max_tokens=COUNT)
    finish(batch)
    assert isinstance(bad.error, BrokenOutput)
    assert bad.generation.finish_reason == "error"
    assert good.error is None
    assert good.generation.tokens == plain(model("llama"), prompt_of(9), COUNT)


def test_a_processor_that_raises_ends_its_own_text() -> None:
    def raises(tokens: mx.array, logits: mx.array) -> mx.array:
        raise ValueError("no")

    batch = engine_of().batch()
    bad = batch.add(prompt_of(9), max_tokens=COUNT, processors=[raises])
    good = batch.add(prompt_of(9), max_tokens=COUNT)
    finish(batch)
    assert isinstance(bad.error, MlxspecError)
    assert "ValueError: no" in bad.error.message
    assert good.generation.tokens == plain(model("llama"), prompt_of(9), COUNT)


@pytest.mark.parametrize("times", [{0}, {3}, {2, 9}, {4, 5}])
def test_where_memory_runs_out_nothing_is_lost_or_repeated(
    monkeypatch: pytest.MonkeyPatch, times: set[int]
) -> None:
    calls = iter(range(10**6))

    def evaluate(*arrays: Any) -> None:
        if next(calls) in times:
            raise RuntimeError("[malloc] Unable to allocate 123 bytes.")
        mx.eval(*arrays)

    monkeypatch.setattr(lane.mx, "async_eval", evaluate)
    prompts = [prompt_of(9, seed) for seed in range(4)]
    results = engine_of().generate_many(prompts, max_rows=4, max_tokens=COUNT, draft_tokens=2)
    assert [one.tokens for one in results] == [plain(model("llama"), one, COUNT) for one in prompts]


def test_memory_that_is_never_enough_is_an_error_of_each_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("[malloc] Unable to allocate 123 bytes.")

    monkeypatch.setattr(lane.mx, "async_eval", fails)
    batch = engine_of().batch(max_rows=2)
    rows = [batch.add(prompt_of(9, seed), max_tokens=COUNT) for seed in range(3)]
    finish(batch)
    assert all(isinstance(row.error, OutOfMemory) for row in rows)


@pytest.mark.parametrize("rows", [0, MAX_ROWS + 1])
def test_rows_have_a_range(rows: int) -> None:
    with pytest.raises(UsageError, match=f"max_rows is {rows}"):
        engine_of().batch(rows)


def test_closing_ends_every_text_where_it_is() -> None:
    batch = engine_of().batch(max_rows=1)
    rows = [batch.add(prompt_of(9), max_tokens=200) for _ in range(2)]
    for _ in range(4):
        batch.step()
    batch.close()
    assert batch.done
    assert [row.generation.finish_reason for row in rows] == ["interrupted"] * 2
    assert rows[0].generation.tokens


def test_a_batch_tells_what_its_texts_do_and_why() -> None:
    engine = engine_of()
    costs = (1.0, 2.0, 3.0)
    engine.learned.learn(9, {MODEL: Knowledge(costs, (0.5, 0.5))}, rows=2)
    batch = engine.batch(max_rows=2)
    for length in (5, 9):
        batch.add(prompt_of(length), max_tokens=COUNT, draft_tokens="auto")
    seen = [batch.doing()]
    while not batch.done:
        batch.step()
        seen.append(batch.doing())
    assert seen[0] == seen[-1] == []
    together = [one for several in seen for one in several if one.texts == one.rows == 2]
    # Nothing is proposed where that was seen to take longer than it brings.
    assert {one.draft_tokens for one in together} == {0}
    parked = next(one.parked for one in together if one.parked is not None)
    assert parked.why.startswith("2 texts at a time: proposing costs more than it brings")
    assert max(together, key=lambda one: len(one.costs)).costs[MODEL] == pytest.approx(
        {1: 2.0, 2: 3.0}, rel=0.5
    )


@pytest.mark.parametrize(("between_s", "running"), [(60.0, 4), (0.0, 1)])
def test_short_texts_that_wait_are_read_in_the_same_step(
    between_s: float, running: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlxspec.decode.batch.BETWEEN_S", between_s)
    batch = engine_of().batch(max_rows=4)
    for length in (3, 4, 5, 6):
        batch.add(prompt_of(length), max_tokens=COUNT, draft_tokens=0)
    batch.step()
    assert batch.running == running
    batch.close()


def test_a_batch_begins_with_what_the_one_before_has_found_out() -> None:
    engine = engine_of()
    policies = []
    for _ in range(2):
        batch = engine.batch(max_rows=2)
        for length in (5, 9):
            batch.add(prompt_of(length), max_tokens=COUNT, draft_tokens="auto")
        while batch.running < 2:
            batch.step()
        policies.append(next(iter(batch._lanes)).policy)
        finish(batch)
    assert policies[0] is policies[1]


def test_what_a_draft_reads_between_rounds_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what a round takes beyond its own time, where its draft had to catch up first."""
    engine, prompts = engine_of(), [prompt_of(40, 1), prompt_of(30, 2)]
    engine.learned.learn(9, {MODEL: Knowledge((1.0, 0.9), (0.9, 0.9))}, rows=2)
    seen: list[tuple[int, int, float]] = []
    monkeypatch.setattr(Pace, "caught_up", lambda self, *one: seen.append(one))
    started = time.perf_counter()
    for _ in range(3):  # the first rounds are built, and not timed
        engine.generate_many(prompts, max_tokens=12, draft_tokens="auto")
    assert (68, 2) in [(rows, texts) for rows, texts, _ in seen]  # both prompts but two tokens each
    assert sum(seconds for *_, seconds in seen) < time.perf_counter() - started
