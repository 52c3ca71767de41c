"""Rows that are sampled by unlike steps share rounds: no row notices the steps of another."""

from __future__ import annotations

from functools import reduce
from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import VOCABULARY, draft_for, model, plain, prompt_of
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxspec.decode import lane
from mlxspec.decode.batch import TAKES_TURNS, UNLIKE, Batch, Row
from mlxspec.decode.engine import Engine
from mlxspec.params import Method, Penalties, SamplingParams
from mlxspec.sampling.sampler import Knobs, Sampler, knobs_of
from mlxspec.sampling.union import union

COUNT = 24
WHOLE = 64  # tokens that a text may reach
GREEDY = SamplingParams()
COUPLED = {"temperature": 0.9, "seed": 7, "verify": "coupled"}
WAYS = [
    GREEDY,
    SamplingParams(**COUPLED),
    SamplingParams(**COUPLED | {"temperature": 1.4}, top_k=5),
    SamplingParams(**COUPLED, top_k=20, top_p=0.8),
    SamplingParams(**COUPLED, min_p=0.05, xtc_probability=0.5),
    SamplingParams(**COUPLED, penalties=Penalties(frequency=0.7, frequency_context=3)),
    SamplingParams(penalties=Penalties(repetition=1.5, presence=0.4)),
    SamplingParams(logit_bias={3: 6.0, 9: -float("inf")}),
]


def united(ways: list[SamplingParams]) -> Method:
    methods = [one.method(WHOLE) for one in ways]

    def both(one: Method, other: Method) -> Method:
        found = union(one, other)
        assert found is not None
        return found

    return reduce(both, methods)


def row_of(array: mx.array, row: int) -> np.ndarray:
    return np.array(array[row : row + 1])


PENALTIES = st.builds(
    Penalties,
    repetition=st.sampled_from([0.0, 1.0, 1.3]),
    presence=st.sampled_from([0.0, 0.6]),
    frequency=st.sampled_from([0.0, 0.3]),
    repetition_context=st.sampled_from([0, 2, 20]),
    presence_context=st.sampled_from([0, 3]),
    frequency_context=st.sampled_from([0, 5, 40]),
)
SOME = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.0, 1e-35, 0.3, 1.0, 2.5]),
    top_p=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    top_k=st.sampled_from([0, 0, 1, 7, VOCABULARY - 1, VOCABULARY, 1000]),
    min_p=st.sampled_from([0.0, 0.1]),
    xtc_probability=st.sampled_from([0.0, 0.4, 1.0]),
    xtc_special_tokens=st.just((2, 5)),
    penalties=PENALTIES,
    logit_bias=st.sampled_from([{}, {3: 2.5, 11: -float("inf")}]),
    seed=st.just(0),
)


@given(ways=st.lists(SOME, min_size=2, max_size=4), seed=st.integers(0, 99), size=st.integers(0, 1))
@settings(max_examples=60)
def test_rows_have_the_numbers_that_they_have_alone(
    ways: list[SamplingParams], seed: int, size: int
) -> None:
    """To the last bit, over the whole vocabulary and over that of a draft with fewer tokens."""
    rng = np.random.default_rng(seed)
    size = (VOCABULARY, VOCABULARY - 20)[size]
    logits = mx.array(rng.normal(0, 4, (len(ways), 3, size)), mx.float32)
    logits = mx.where(mx.array(rng.random(logits.shape) < 0.1), mx.round(logits), logits)
    text = mx.array(rng.integers(0, VOCABULARY, (len(ways), 50)), mx.int32)
    together = Sampler(united(ways), VOCABULARY)
    knobs = [knobs_of(way, 1, VOCABULARY) for way in ways]
    stacked = Knobs(*map(mx.concatenate, zip(*map(together.knobs_for, knobs), strict=True)))

    def before(sampler: Sampler) -> mx.array:
        """The last tokens before the three rows, and two proposals."""
        return mx.concatenate([sampler.recent_of(text[:, :48]), text[:, 48:]], axis=1)

    scores = together.scores(logits, before(together), stacked)
    log_p = None if together.method.greedy else together.log_probs(scores, stacked)
    for row, way in enumerate(ways):
        alone = Sampler(way.method(WHOLE), VOCABULARY)
        own = alone.scores(logits[row : row + 1], before(alone)[row : row + 1], knobs[row])
        np.testing.assert_array_equal(row_of(scores, row), np.array(own))
        if log_p is not None and way.temperature:
            expected = np.array(alone.log_probs(own, knobs[row]))
            np.testing.assert_array_equal(row_of(log_p, row), expected)
            greedy = row_of(together.unless_greedy(log_p, scores, stacked), row)
            np.testing.assert_array_equal(greedy, expected)
        elif log_p is not None:
            greedy = row_of(together.unless_greedy(log_p, scores, stacked), row)
            np.testing.assert_array_equal(greedy, np.array(own))


def test_a_union_is_the_same_in_any_order() -> None:
    for one, other, third in product(WAYS, repeat=3):
        assert united([one, other, third]) == united([third, one, other, one])
        assert united([one, one]) == one.method(WHOLE)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"verify": "block"}, {"verify": "coupled"}),
        ({"verify": "block"}, {"verify": "relaxed"}),
        ({"verify": "relaxed", "temperature": 0.0}, {"verify": "relaxed"}),
        ({"verify": "relaxed", "temperature": 0.0}, {"temperature": 0.0}),
        (
            {"xtc_probability": 0.1, "xtc_special_tokens": (1,)},
            {"xtc_probability": 0.1, "xtc_special_tokens": (2,)},
        ),
    ],
)
def test_some_have_no_union(one: dict[str, Any], other: dict[str, Any]) -> None:
    methods = [SamplingParams(**{"temperature": 1.0} | way).method() for way in (one, other)]
    assert union(*methods) is None
    assert union(*methods[::-1]) is None


# --- batches ----------------------------------------------------------------------------------


def finish(batch: Batch) -> int:
    """The number of steps until all texts are done."""
    steps = 0
    while not batch.done:
        batch.step()
        steps += 1
    return steps


def lanes(batch: Batch, rows: list[Row]) -> list[lane.Lane]:
    """Write all texts to their end; returns the lane of each."""
    found: dict[Row, lane.Lane] = {}
    while not batch.done:
        found |= {row: row._lane for row in rows if row._lane is not None}
        batch.step()
    return [found[row] for row in rows]


@pytest.mark.parametrize("agreement", ["agrees", "half"])
@pytest.mark.parametrize(
    ("rule", "draft_tokens"), [("coupled", "auto"), ("coupled", 3), ("block", 3), ("token", 2)]
)
def test_unlike_rows_share_rounds(rule: Any, draft_tokens: Any, agreement: str) -> None:
    engine = Engine(model("llama"), draft_for(model("llama"), agreement), compiled=False)
    ways = [
        SamplingParams(**{name: getattr(way, name) for name in vars(way)} | {"verify": rule})
        if way.temperature
        else way
        for way in WAYS
    ]
    options = {"max_tokens": COUNT, "draft_tokens": draft_tokens}
    prompts = [prompt_of(9, seed) for seed in range(len(ways))]
    alone = [
        engine.generate(prompt, sampling=way, **options).tokens
        for prompt, way in zip(prompts, ways, strict=True)
    ]
    assert alone[0] == plain(model("llama"), prompts[0], COUNT)
    texts = list(zip(prompts, ways, alone, strict=True))
    # What the first ones need is more than what later ones need, or less.
    for in_order in (texts, texts[::-1]):
        batch = engine.batch(max_rows=8)
        rows = [batch.add(prompt, sampling=way, **options) for prompt, way, _ in in_order]
        assert len(set(lanes(batch, rows))) == 1
        assert [row.generation.tokens for row in rows] == [one for _, _, one in in_order]
        notes = [note for row in rows for note in row.generation.notes]
        assert not {UNLIKE, TAKES_TURNS} & set(notes)


def test_what_cannot_share_takes_turns_and_says_so() -> None:
    engine = Engine(model("llama"), draft_for(model("llama"), "half"), compiled=False)
    ways = [SamplingParams(temperature=0.9, seed=7, verify=rule) for rule in ("block", "coupled")]
    ways += [GREEDY, GREEDY]
    counts = [3, 3, 3, 2]
    batch = engine.batch(max_rows=4)
    rows = [
        batch.add(prompt_of(9), max_tokens=COUNT, sampling=way, draft_tokens=count)
        for way, count in zip(ways, counts, strict=True)
    ]
    found = lanes(batch, rows)
    assert [UNLIKE in row.generation.notes for row in rows] == [False, True, False, True]
    assert found[2] is found[0]
    assert len(set(found)) == 3
    for way, count, row in zip(ways, counts, rows, strict=True):
        alone = engine.generate(prompt_of(9), max_tokens=COUNT, sampling=way, draft_tokens=count)
        assert row.generation.tokens == alone.tokens


def test_steps_are_those_that_texts_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alike texts keep their graph, unlike ones add to it, and what no text needs goes again."""
    monkeypatch.setattr(lane, "PATIENCE", 5)
    engine = Engine(model("llama"), compiled=False)
    batch = engine.batch(max_rows=4)
    first, second = (batch.add(prompt_of(9, seed), max_tokens=60) for seed in range(2))
    greedy = engine.rounds.of(first.request, beside=True)
    for _ in range(4):
        batch.step()
    shared = first._lane
    assert shared is not None
    assert shared.rounds is greedy
    drawn = batch.add(prompt_of(9), max_tokens=4, sampling=WAYS[3])
    biased = batch.add(prompt_of(9), max_tokens=6, sampling=WAYS[7])
    while not drawn.done:
        batch.step()
    every = shared.rounds.sampler.method
    assert every == united([GREEDY, WAYS[3], WAYS[7]])
    while not biased.done:
        assert shared.rounds.sampler.method == every
        batch.step()
    for _ in range(7):
        batch.step()
    assert shared.rounds is greedy
    assert shared.state.knobs.bias.shape[1] == 0
    # Once more, and no rounds are made anew.
    made = engine.rounds._built.cache_info().misses
    again = batch.add(prompt_of(9), max_tokens=4, sampling=WAYS[3])
    while not again.done:
        batch.step()
    assert engine.rounds._built.cache_info().misses <= made + 1  # those without biases
    finish(batch)
    assert again.generation.tokens == drawn.generation.tokens
    for seed, row in enumerate((first, second)):
        assert row.generation.tokens == plain(model("llama"), prompt_of(9, seed), 60)


def test_a_text_may_need_what_stands_in_the_way_of_what_others_needed() -> None:
    """The rule of a text that has gone keeps none of another rule out."""
    engine = Engine(model("llama"), draft_for(model("llama"), "half"), compiled=False)
    batch = engine.batch(max_rows=4)
    ways = [SamplingParams(temperature=0.9, seed=7, verify=rule) for rule in ("block", "coupled")]
    options = {"draft_tokens": 2}
    batch.add(prompt_of(9), max_tokens=60, **options)
    block = batch.add(prompt_of(9), max_tokens=5, sampling=ways[0], **options)
    while not block.done:
        batch.step()
    coupled = batch.add(prompt_of(9), max_tokens=COUNT, sampling=ways[1], **options)
    finish(batch)
    assert coupled._lane is block._lane
    alone = engine.generate(prompt_of(9), max_tokens=COUNT, sampling=ways[1], **options)
    assert coupled.generation.tokens == alone.tokens
