"""Whatever is asked for, speculation writes what plain decoding writes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import mlx.core as mx
import pytest
from conftest import (
    KINDS,
    TOKENIZER,
    VOCABULARY,
    build,
    cut,
    draft_for,
    model,
    plain,
    processors_of_mlx_lm,
    side_by_side,
    tokens_of,
)
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from mlx_lm.generate import generate_step
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper

from mlxspec.decode.engine import Engine
from mlxspec.decode.round import FusedRound
from mlxspec.defaults import MODEL
from mlxspec.drafters.graph import ModelDrafter
from mlxspec.metrics import Generation
from mlxspec.params import Penalties, SamplingParams
from mlxspec.sampling.sampler import Sampler


def examples(count: int) -> Any:
    return settings(
        max_examples=count,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def tokens_up_to(vocabulary: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, vocabulary - 1), min_size=1, max_size=40)


PROMPTS = tokens_up_to(VOCABULARY)
CONTEXTS = st.tuples(*[st.sampled_from([0, 1, 2, 5, 20, 60])] * 3)
SEEDS = st.integers(0, 2**64 - 1)
KINDS_OF_DRAFT = st.sampled_from(KINDS)
PROPOSALS = st.integers(0, 8)
LENGTHS = st.integers(1, 40)


@st.composite
def penalties_with(draw: st.DrawFn, contexts: tuple[int, int, int]) -> Penalties:
    repetition, presence, frequency = contexts
    return Penalties(
        repetition=draw(st.sampled_from([1.1, 1.5, 0.7])),
        presence=draw(st.sampled_from([0.5, 2.0, -0.5])),
        frequency=draw(st.sampled_from([0.3, 1.0, -0.2])),
        repetition_context=repetition,
        presence_context=presence,
        frequency_context=frequency,
    )


PENALTIES = st.just(Penalties()) | CONTEXTS.flatmap(penalties_with)
BIASES = st.dictionaries(
    st.integers(0, VOCABULARY - 1), st.sampled_from([float("-inf"), -2.0, 3.0]), max_size=4
)


@st.composite
def samplings(draw: st.DrawFn, *, penalties: st.SearchStrategy[Penalties]) -> SamplingParams:
    return SamplingParams(
        temperature=draw(st.sampled_from([0.3, 1.0, 2.0])),
        top_p=draw(st.sampled_from([0.5, 0.9, 0.99])),
        min_p=draw(st.sampled_from([0.01, 0.1])),
        top_k=draw(st.sampled_from([0, 3, 40])),
        xtc_probability=draw(st.sampled_from([0.0, 0.5])),
        seed=draw(SEEDS),
        penalties=draw(penalties),
        logit_bias=draw(BIASES),
        verify="coupled",
    )


@cache
def engine_of(kind: str) -> Engine:
    target = model("llama")
    return Engine(target, draft_for(target, kind), compiled=False)


def written(engine: Engine, prompt: Sequence[int], **options: Any) -> Generation:
    """The result of a run, whose events are found to add up to it."""
    run = engine.run(prompt, **options)
    events = [event for event in run if event.prefill is None]
    result = run.generation
    assert [token for event in events for token in event.tokens] == result.tokens
    assert "".join(event.text for event in events) == result.text
    assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1].finish_reason == result.finish_reason
    assert len(events) == result.speculation.rounds
    return result


def plainly(prompt: Sequence[int], count: int, sampling: SamplingParams) -> list[int]:
    """Greedy decoding by mlx-lm, the oracle."""
    processors = processors_of_mlx_lm(sampling.penalties, sampling.logit_bias)
    steps = generate_step(
        mx.array(prompt), model("llama"), max_tokens=count, logits_processors=processors
    )
    return [token for token, _ in steps]


@examples(30)
@given(PROMPTS, LENGTHS, PROPOSALS, KINDS_OF_DRAFT, PENALTIES, BIASES)
def test_greedy_text_is_the_plain_one(
    prompt: list[int],
    max_tokens: int,
    draft_tokens: int,
    kind: str,
    penalties: Penalties,
    bias: dict[int, float],
) -> None:
    sampling = SamplingParams(penalties=penalties, logit_bias=bias)
    result = written(
        engine_of(kind),
        prompt,
        max_tokens=max_tokens,
        draft_tokens=draft_tokens,
        sampling=sampling,
    )
    assert result.tokens == plainly(prompt, max_tokens, sampling)
    assert result.finish_reason == "length"


@examples(30)
@given(PROMPTS, LENGTHS, st.integers(1, 8), KINDS_OF_DRAFT, samplings(penalties=PENALTIES))
def test_coupled_text_is_the_plain_one(
    prompt: list[int], max_tokens: int, draft_tokens: int, kind: str, sampling: SamplingParams
) -> None:
    engine = engine_of(kind)
    speculative, without = (
        written(engine, prompt, max_tokens=max_tokens, draft_tokens=count, sampling=sampling)
        for count in (draft_tokens, 0)
    )
    assert speculative.tokens == without.tokens
    assert len(without.tokens) == max_tokens


# --- ends -----------------------------------------------------------------------------------

# What stop strings can be made of; half characters among them.
WORDS = sorted({*map(TOKENIZER.convert_tokens_to_ids, ["ab", "Ġa", "bc"]), *tokens_of("abc! é")})


@cache
def speller() -> Any:
    """A model that writes the tokens of the tokenizer."""
    return build("llama", vocabulary=len(TOKENIZER))


@cache
def spelling(kind: str, ends: tuple[int, ...] = ()) -> Engine:
    """An engine with that model whose texts end at any of these tokens."""
    tokenizer = TokenizerWrapper(
        TOKENIZER._tokenizer, BPEStreamingDetokenizer, eos_token_ids=list(ends)
    )
    return Engine(speller(), draft_for(speller(), kind), tokenizer, compiled=False)


@examples(30)
@given(
    st.data(),
    tokens_up_to(len(TOKENIZER)),
    LENGTHS,
    st.integers(1, 8),
    KINDS_OF_DRAFT,
    st.sampled_from([0.0, 1.0]),
    SEEDS,
)
def test_text_ends_where_the_plain_one_does(
    data: st.DataObject,
    prompt: list[int],
    max_tokens: int,
    draft_tokens: int,
    kind: str,
    temperature: float,
    seed: int,
) -> None:
    bias = {token: float("-inf") for token in range(len(TOKENIZER)) if token not in WORDS}
    options: dict[str, Any] = {
        "max_tokens": max_tokens,
        "sampling": SamplingParams(
            temperature=temperature, seed=seed, verify="coupled", logit_bias=bias
        ),
    }
    whole = written(spelling(kind), prompt, draft_tokens=0, **options)
    assert set(whole.tokens) <= set(WORDS)
    assert len(whole.tokens) == max_tokens

    ends = data.draw(st.sets(st.sampled_from(whole.tokens + WORDS), max_size=1))
    start = data.draw(st.integers(0, max(len(whole.text) - 1, 0)))
    size = data.draw(st.integers(1, 4))
    stops = [whole.text[start : start + size], data.draw(st.text("abc! é", max_size=3))]
    # A half character is shown as something else once its other half follows.
    stop = [text for text in stops if text and "\ufffd" not in text]
    engine = spelling(kind, tuple(sorted(ends)))
    speculative, without = (
        written(engine, prompt, draft_tokens=count, stop=stop, **options)
        for count in (draft_tokens, 0)
    )
    for result in (speculative, without):
        assert result.tokens == whole.tokens[: len(result.tokens)]
        assert not set(result.tokens) & ends
        assert not any(text in result.text for text in stop)
        if result.finish_reason == "length":
            assert len(result.tokens) == max_tokens
    before_end = next((i for i, t in enumerate(whole.tokens) if t in ends), max_tokens)
    assert len(speculative.tokens) <= before_end
    if not any(text in whole.text for text in stop):
        assert len(speculative.tokens) == before_end
    # Where no token ends it, the text is the whole one up to the stop string.
    if before_end == max_tokens:
        assert speculative.text == cut(whole.text, stop)
    assert speculative.tokens == without.tokens
    assert speculative.text == without.text
    assert speculative.finish_reason == without.finish_reason


# --- the context ----------------------------------------------------------------------------


@cache
def bounded(context: int, kind: str) -> Engine:
    target = build("llama", max_position_embeddings=context)
    return Engine(target, draft_for(target, kind), compiled=False)


@examples(25)
@given(PROMPTS, st.sampled_from([2, 9, 24, 41]), PROPOSALS, KINDS_OF_DRAFT, SEEDS | st.none())
def test_text_ends_with_the_context(
    prompt: list[int], context: int, draft_tokens: int, kind: str, seed: int | None
) -> None:
    prompt = prompt[: context - 1]
    engine = bounded(context, kind)
    sampling = SamplingParams()
    if seed is not None:
        sampling = SamplingParams(temperature=1.0, seed=seed, verify="coupled")
    options: dict[str, Any] = {"max_tokens": 100, "sampling": sampling}
    result = written(engine, prompt, draft_tokens=draft_tokens, **options)
    assert len(prompt) + len(result.tokens) == context
    assert result.finish_reason == "length"
    if seed is None:
        assert result.tokens == plain(engine.target, prompt, context - len(prompt))
    else:
        assert result.tokens == written(engine, prompt, draft_tokens=0, **options).tokens


# --- rows side by side ----------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["greedy", "coupled", "block", "token"])
@examples(10)
@given(st.data(), st.integers(1, 5), KINDS_OF_DRAFT, CONTEXTS)
def test_rows_that_end_at_different_times(
    rule: Any, data: st.DataObject, draft_tokens: int, kind: str, contexts: tuple[int, int, int]
) -> None:
    prompts = [data.draw(PROMPTS) for _ in range(3)]
    ends = data.draw(st.lists(st.integers(1, 20), min_size=3, max_size=3, unique=True))
    assume(len(set(map(tuple, prompts))) == 3)
    rows = [
        SamplingParams(
            temperature=0.0 if rule == "greedy" else data.draw(st.sampled_from([0.5, 1.0, 2.0])),
            top_p=data.draw(st.sampled_from([0.5, 0.95])),
            seed=data.draw(SEEDS),
            penalties=data.draw(penalties_with(contexts)),
            logit_bias={data.draw(st.integers(0, VOCABULARY - 1)): 2.0},
            verify=rule,
        )
        for _ in range(3)
    ]
    engine = engine_of(kind)
    sampler = Sampler(rows[0].method(whole=256), VOCABULARY)
    assert all(row.method(whole=256) == sampler.method for row in rows)
    drafter = ModelDrafter(engine.models[1], sampler.vocabulary)
    rounds = FusedRound(engine.models[0], {MODEL: drafter}, sampler, compiled=False)
    state = side_by_side(
        [
            engine.prefilled(prompt, row, sampler=sampler, capacity=256)
            for prompt, row in zip(prompts, rows, strict=True)
        ]
    )
    texts: list[list[int]] = [[], [], []]
    while any(len(text) < end for text, end in zip(texts, ends, strict=True)):
        state, result = rounds(state, draft_tokens=draft_tokens, length=256)
        for text, (*tokens, accepted) in zip(texts, result.tolist(), strict=True):
            assert accepted >= 0
            text += tokens[: accepted + 1]
    for prompt, row, text, end in zip(prompts, rows, texts, ends, strict=True):
        alone: list[int] = []
        state = engine.prefilled(prompt, row, sampler=sampler, capacity=256)
        while len(alone) < end:
            state, result = rounds(state, draft_tokens=draft_tokens, length=256)
            *tokens, accepted = result.tolist()[0]
            alone += tokens[: accepted + 1]
        assert text[:end] == alone[:end]
        if rule == "greedy":
            assert text[:end] == plainly(prompt, end, row)
        if rule == "coupled":
            assert (
                text[:end]
                == engine.generate(prompt, max_tokens=end, draft_tokens=0, sampling=row).tokens
            )
