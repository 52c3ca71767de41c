"""Rounds say what plain decoding says, and leave the caches as it would."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import (
    KINDS,
    MODELS,
    build,
    draft_for,
    model,
    plain,
    plain_of,
    prompt_of,
    side_by_side,
    with_vocabulary,
)
from mlx.utils import tree_flatten

from mlxspec.decode.engine import Engine
from mlxspec.decode.round import FusedRound
from mlxspec.decode.session import Session
from mlxspec.decode.state import RoundState
from mlxspec.defaults import MODEL
from mlxspec.device import lengths
from mlxspec.drafters.graph import ModelDrafter
from mlxspec.models.caches.layers import capacity_of
from mlxspec.params import Penalties, SamplingParams, Verify
from mlxspec.sampling.sampler import NO_TOKEN, Sampler

GREEDY = SamplingParams()
SAMPLED = SamplingParams(temperature=1.0, seed=3)


def engine_of(name: str, kind: str, *, compiled: bool = False) -> Engine:
    target = model(name)
    return Engine(target, draft_for(target, kind), compiled=compiled)


def drain(session: Session) -> list[int]:
    tokens: list[int] = []
    while step := session.step().tokens:
        tokens += step
    return tokens


# --- greedy identity ------------------------------------------------------------------------


# Every K, with every kind of cache, is in test_every_cache.
@pytest.mark.parametrize("draft_tokens", [1, 2, 3, 8])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_is_the_plain_one(name: str, kind: str, draft_tokens: int) -> None:
    length = (1, 2, 7, 70)[draft_tokens % 4]
    expected = plain_of(name, length, 24)
    result = engine_of(name, kind).generate(
        prompt_of(length), max_tokens=24, draft_tokens=draft_tokens
    )
    assert result.tokens == expected
    rate = result.speculation.acceptance_rate
    if kind == "agrees":
        assert rate == 1.0
    if kind == "never":
        assert rate == 0.0


@pytest.mark.parametrize("length", [1, 2, 70])
@pytest.mark.parametrize("name", MODELS)
def test_prompts_of_any_length(name: str, length: int) -> None:
    session = engine_of(name, "half").session(prompt_of(length), max_tokens=30, draft_tokens=3)
    assert drain(session) == plain_of(name, length, 30)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("draft_tokens", [1, 4])
def test_compiled_rounds_say_the_same(kind: str, draft_tokens: int) -> None:
    engine = engine_of("llama", kind, compiled=True)
    for length in (1, 7, 70):
        session = engine.session(prompt_of(length), max_tokens=30, draft_tokens=draft_tokens)
        assert drain(session) == plain_of("llama", length, 30)


def test_compiled_rounds_take_parameters_as_data() -> None:
    eager, compiled = (engine_of("llama", "half", compiled=compiled) for compiled in (False, True))
    texts = []
    for temperature, top_p, seed in [(1.0, 0.99, 1), (3.0, 0.99, 1), (3.0, 0.9, 1), (3.0, 0.9, 2)]:
        options = {
            "max_tokens": 40,
            "draft_tokens": 2,
            "sampling": SamplingParams(temperature=temperature, top_p=top_p, seed=seed),
        }
        texts.append(compiled.generate(prompt_of(7), **options).tokens)
        assert texts[-1] == eager.generate(prompt_of(7), **options).tokens
    assert len(set(map(tuple, texts))) == 4


def test_prompt_of_several_chunks() -> None:
    run = engine_of("llama", "half").run(prompt_of(1100), max_tokens=20, draft_tokens=3)
    events = list(run)
    assert run.generation.tokens == plain_of("llama", 1100, 20)
    pieces = [event.prefill for event in events if event.prefill is not None]
    assert len(pieces) > 1
    assert [piece.read for piece in pieces] == sorted({piece.read for piece in pieces})
    assert {piece.total for piece in pieces} == {1099}


def test_measurements_leave_the_session_as_it_was() -> None:
    session = engine_of("llama", "half").session(prompt_of(7), max_tokens=40, draft_tokens=3)
    tokens: list[int] = []
    while step := session.step().tokens:
        tokens += step
        state, length = session.ahead(2)
        if not state.drafts:  # before the first proposal
            continue
        propose, commit = session.rounds.halves(3, length)
        draft, middle = propose(state)
        halves = commit(middle, draft)[1]
        whole = session.rounds(state, draft_tokens=3, length=length)[1]
        assert halves.tolist() == whole.tolist()
    assert tokens == plain_of("llama", 7, 40)


def test_rounds_after_the_end_have_room_for_what_was_kept_beyond_the_limit() -> None:
    beyond = set()
    for limit in range(20, 28):
        session = engine_of("llama", "agrees").session(
            prompt_of(61), max_tokens=limit, draft_tokens=8
        )
        while session.step().tokens:
            pass
        position = session.ahead(0)[0].position.item()
        beyond.add(position + 1 - len(session.text))
        rounds = (128 - len(session.text)) // 9  # as many as the text, cut at its limit, leaves
        state, length = session.ahead(rounds)
        assert position + 1 + rounds * 9 <= length <= state.capacity
    assert max(beyond) >= 7


@pytest.mark.usefixtures("rooms")
@pytest.mark.parametrize(("kind", "draft_tokens"), [("agrees", 8), ("half", 4), ("half", 1)])
def test_text_that_outgrows_its_caches_twice(
    monkeypatch: pytest.MonkeyPatch, kind: str, draft_tokens: int
) -> None:
    monkeypatch.setattr(lengths, "reserved", lengths.attended)  # by less, so sooner
    session = engine_of("llama", kind).session(
        prompt_of(60), max_tokens=210, draft_tokens=draft_tokens
    )
    capacities = []
    tokens: list[int] = []
    while step := session.step().tokens:
        tokens += step
        capacities.append(session.ahead(0)[0].capacity)
    assert tokens == plain_of("llama", 60, 210)
    assert len(set(capacities)) >= 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("draft_tokens", [1, 3])
def test_exactly_as_many_entries_as_promised_are_enough(
    monkeypatch: pytest.MonkeyPatch, kind: str, draft_tokens: int
) -> None:
    # No rounding up: a length or a capacity that is one too small shows at once, and before it
    # is used, because MLX does not check where it writes.
    engine = engine_of("llama", kind)
    monkeypatch.setattr(lengths, "attended", lambda length: length)
    monkeypatch.setattr(lengths, "reserved", lambda length: length)
    monkeypatch.setattr("mlxspec.decode.reader.MAX_DRAFT_TOKENS", 0)
    session = engine.session(prompt_of(7), max_tokens=40, draft_tokens=draft_tokens)
    run = FusedRound.__call__

    def checked(self: FusedRound, state: RoundState, **options: int) -> tuple[RoundState, mx.array]:
        end = state.position.item() + options["draft_tokens"] + 1
        assert end <= options["length"] <= state.capacity
        if options["draft_tokens"]:
            room = capacity_of(state.drafts[MODEL].layers)
            assert end - 1 <= options["draft_length"] <= room
        return run(self, state, **options)

    monkeypatch.setattr(FusedRound, "__call__", checked)
    assert drain(session) == plain_of("llama", 7, 40)


def test_no_proposals() -> None:
    expected = plain_of("qwen3", 7, 40)
    engine = engine_of("qwen3", "half")
    assert engine.generate(prompt_of(7), max_tokens=40, draft_tokens=0).tokens == expected
    without = Engine(model("qwen3"), compiled=False)
    assert without.generate(prompt_of(7), max_tokens=40, draft_tokens=5).tokens == expected
    assert without.generate(prompt_of(7), max_tokens=40).speculation.draft_tokens == 0


def test_text_ends_with_the_context() -> None:
    target = build("llama", max_position_embeddings=40)
    engine = Engine(target, target, compiled=False)
    result = engine.generate(prompt_of(7), max_tokens=100, draft_tokens=4)
    assert result.tokens == plain(target, prompt_of(7), 33)
    assert result.finish_reason == "length"


def test_number_of_proposals_may_change_between_steps() -> None:
    engine = engine_of("llama", "agrees")
    session = engine.session(prompt_of(7), max_tokens=100, draft_tokens=8)
    tokens: list[int] = []
    while stats := (step := session.step()).stats:
        tokens += step.tokens
        assert stats.accepted <= stats.drafted
        session._track.draft_tokens = 1 if session.draft_tokens == 8 else 8
    assert tokens == plain_of("llama", 7, 100)


# --- back ends ------------------------------------------------------------------------------


@pytest.mark.parametrize("draft_tokens", [0, 2])
@pytest.mark.parametrize("verify", [None, "coupled", "token", "block", "relaxed"])
def test_nothing_is_computed_without_elements(verify: Verify | None, draft_tokens: int) -> None:
    # MLX's CUDA back end divides by the size of what a fused kernel computes.
    engine = engine_of("llama", "half")
    sampling = SamplingParams(temperature=float(verify is not None), verify=verify)
    rounds = rounds_of(engine, sampling)
    state = engine.prefilled(prompt_of(9), sampling)
    mx.eval(state)

    def body(position: mx.array) -> list[mx.array]:
        after, result = rounds(
            state._replace(position=position), draft_tokens=draft_tokens, length=64
        )
        return [result, *(array for _, array in tree_flatten(after))]

    steps: list[dict[str, Any]] = []
    mx.export_function(steps.append, body, state.position)
    computed = [step for step in steps if step["type"] == "primitive"]
    assert len(computed) > 100
    empty = {step["name"] for step in computed if any(0 in one[1] for one in step["outputs"])}
    assert empty <= {"Slice"}


# --- vocabularies that differ ---------------------------------------------------------------


class Recorder(nn.Module):
    """A model that remembers which tokens it was shown."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.layers = inner.layers
        self.seen: list[mx.array] = []

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        self.seen.append(tokens)
        return self.inner(tokens, cache=cache)

    def highest(self) -> int:
        return max(int(tokens.max()) for tokens in self.seen)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("vocabulary", [40, 96])
def test_draft_of_another_vocabulary(vocabulary: int, sampling: SamplingParams) -> None:
    target = model("llama")
    draft = Recorder(with_vocabulary(target, vocabulary))
    prompt = prompt_of(30, vocabulary=min(vocabulary, 64))
    engine = Engine(target, draft, compiled=False)
    draft.seen.clear()
    result = engine.generate(prompt, max_tokens=60, draft_tokens=3, sampling=sampling)
    assert draft.highest() < vocabulary
    assert max(result.tokens) < 64
    # The draft has the target's weights: with a larger vocabulary it is never wrong.
    rate = result.speculation.acceptance_rate
    assert rate is not None
    assert rate > 0.9 if vocabulary > 64 else 0 < rate < 1
    if sampling is GREEDY:
        assert result.tokens == plain(target, prompt, 60)
    else:
        assert max(result.tokens) >= 40


def test_prompt_with_tokens_that_the_draft_does_not_have() -> None:
    target = model("llama")
    draft = Recorder(with_vocabulary(target, 40))
    prompt = [63, 5, 50, 7, 62]
    engine = Engine(target, draft, compiled=False)
    draft.seen.clear()
    result = engine.generate(prompt, max_tokens=20, draft_tokens=3)
    assert result.tokens == plain(target, prompt, 20)
    assert draft.highest() < 40


# --- caches after a round -------------------------------------------------------------------


def rounds_of(
    engine: Engine, sampling: SamplingParams = GREEDY, *, compiled: bool = False
) -> FusedRound:
    sampler = Sampler(sampling.method(), 64)
    drafter = ModelDrafter(engine.models[1], sampler.vocabulary)
    return FusedRound(engine.models[0], {MODEL: drafter}, sampler, compiled=compiled)


def assert_same_entries(actual: list[Any], expected: list[Any], count: int) -> None:
    for ours, fresh in zip(actual, expected, strict=True):
        for some, other in zip(ours, fresh, strict=True):
            assert some.shape[2] >= count
            np.testing.assert_allclose(
                np.array(some[:, :, :count]), np.array(other[:, :, :count]), atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_caches_equal_a_fresh_prefill_after_every_round(name: str, kind: str) -> None:
    engine = engine_of(name, kind)
    rounds = rounds_of(engine)
    tokens = prompt_of(9)
    state = engine.prefilled(tokens)
    for _ in range(5):
        state, result = rounds(state, draft_tokens=3, length=64)
        *committed, accepted = result.tolist()[0]
        tokens = tokens + committed[: accepted + 1]
        fresh = engine.prefilled(tokens)
        position = len(tokens) - 1
        assert state.position.tolist() == fresh.position.tolist() == [position]
        assert state.last_two.tolist() == fresh.last_two.tolist()
        assert_same_entries(state.target, fresh.target, position)
        # The next round feeds the draft the last two tokens.
        assert_same_entries(*(one.drafts[MODEL].layers for one in (state, fresh)), position - 1)
        if kind == "never":
            assert accepted == 0


@pytest.mark.parametrize("length", [2, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_looked_back_on_are_the_last_ones(kind: str, length: int) -> None:
    engine = engine_of("llama", kind)
    looking_back = SamplingParams(
        penalties=Penalties(presence=0.5, presence_context=6, frequency=0.1, frequency_context=3)
    )
    rounds = rounds_of(engine, looking_back)
    tokens = prompt_of(length)
    state = engine.prefilled(tokens, looking_back, sampler=rounds.sampler)
    for _ in range(5):
        assert state.recent.tolist() == [([NO_TOKEN] * 6 + tokens)[-6:]]
        state, result = rounds(state, draft_tokens=3, length=64)
        *committed, accepted = result.tolist()[0]
        tokens = tokens + committed[: accepted + 1]
    assert state.recent.tolist() == [tokens[-6:]]


# --- rows side by side ----------------------------------------------------------------------


def texts(
    rounds: FusedRound, state: RoundState, count: int, draft_tokens: int = 3
) -> tuple[list[list[int]], list[list[int]]]:
    """The tokens of each row and how many proposals each round kept."""
    rows: list[list[int]] = [[] for _ in state.position.tolist()]
    kept: list[list[int]] = []
    for _ in range(count):
        state, result = rounds(state, draft_tokens=draft_tokens, length=128)
        committed = result.tolist()
        kept.append([row[-1] for row in committed])
        for tokens, row in zip(rows, committed, strict=True):
            tokens += row[: row[-1] + 1]
    return rows, kept


BY_ROW = [name for name in MODELS if name != "gemma2"]


@pytest.mark.parametrize("name", [*MODELS, "gemma3_text", "qwen3_next", "lfm2", "mamba2"])
def test_what_cannot_stand_beside_others_is_told(name: str) -> None:
    # mlx-lm's Gemma 2 lines the mask's batch axis up with its key heads.
    assert engine_of(name, "half").models[0].beside == (name != "gemma2")


@pytest.mark.parametrize("batch", [2, 3])
@pytest.mark.parametrize("name", BY_ROW)
def test_rows_do_not_see_each_other(name: str, batch: int) -> None:
    engine = engine_of(name, "half")
    rounds = rounds_of(engine)
    prompts = [prompt_of(length) for length in (4, 9, 31)][:batch]
    rows, kept = texts(rounds, side_by_side([engine.prefilled(p) for p in prompts]), 12)
    assert any(len(set(counts)) > 1 for counts in kept)
    for row, prompt in zip(rows, prompts, strict=True):
        assert row == plain(engine.target, prompt, len(row))
        assert [row] == texts(rounds, engine.prefilled(prompt), 12)[0]


@pytest.mark.parametrize("rule", ["token", "block", "coupled"])
def test_sampled_rows_do_not_see_each_other(rule: Verify) -> None:
    engine = engine_of("llama", "half")
    sampling = [SamplingParams(temperature=2.0, verify=rule, seed=seed) for seed in (3, 3, 4)]
    rounds = rounds_of(engine, sampling[0])
    prompts = [prompt_of(length) for length in (4, 31, 4)]
    states = [engine.prefilled(*each) for each in zip(prompts, sampling, strict=True)]
    rows, kept = texts(rounds, side_by_side(states), 12)
    assert any(len(set(counts)) > 1 for counts in kept)
    assert rows[0] != rows[2]
    for row, prompt, params in zip(rows, prompts, sampling, strict=True):
        assert [row] == texts(rounds, engine.prefilled(prompt, params), 12)[0]


# --- capacity and memory --------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_capacity_does_not_change_the_text(kind: str) -> None:
    engine = engine_of("qwen2", kind)
    small, large = (
        engine.session(prompt_of(7), max_tokens=40, draft_tokens=3, capacity=capacity)
        for capacity in (256, 1024)
    )
    assert small.ahead(0)[0].capacity * 4 == large.ahead(0)[0].capacity
    assert drain(small) == drain(large) == plain_of("qwen2", 7, 40)


def bytes_of(state: RoundState) -> int:
    return sum(
        array.nbytes for layer in state.target + state.drafts[MODEL].layers for array in layer
    )


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kept", [False, True], ids=["dropped", "kept"])
def test_caches_are_updated_in_place(compiled: bool, kept: bool) -> None:
    engine = engine_of("llama", "half")
    rounds = rounds_of(engine, compiled=compiled)
    state, result = rounds(
        engine.prefilled(prompt_of(7), capacity=2**15), draft_tokens=3, length=64
    )
    mx.eval(state, result)
    size = bytes_of(state)
    assert size >= 2**24
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    old = state if kept else None
    state, result = rounds(state, draft_tokens=3, length=64)
    mx.eval(state, result)
    grown = mx.get_peak_memory() - before
    if kept:
        # What the measurement shows when a copy is made: it can fail.
        assert old is not None
        assert grown >= size
    else:
        assert grown < size / 16


def test_sessions_hold_on_to_no_old_state() -> None:
    engine = engine_of("llama", "half")
    before = mx.get_active_memory()
    session = engine.session(prompt_of(7), max_tokens=100, draft_tokens=3, capacity=2**15)
    session.step()
    mx.reset_peak_memory()
    for _ in range(6):
        session.step()
    size = bytes_of(session.ahead(0)[0])
    assert mx.get_peak_memory() - before < size * 17 / 16
