"""A draft of another tokenizer: the text is the target's own, and tokens mean what they meant."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from conftest import (
    VOCABULARY,
    draft_for,
    foreign,
    model,
    plain,
    plain_of,
    processors_of_mlx_lm,
    prompt_of,
    with_vocabulary,
)
from mlx_lm.generate import generate_step

from mlxspec.decode.engine import Engine
from mlxspec.defaults import MODEL
from mlxspec.drafters.graph import ModelDrafter
from mlxspec.drafters.picks import Picks
from mlxspec.drafters.translation import Translated
from mlxspec.drafters.vocabulary import Shared
from mlxspec.metrics import Generation
from mlxspec.models.cached_model import kind_of
from mlxspec.params import Penalties, SamplingParams
from mlxspec.sampling.noise import DRAFT_NOISE, gumbel, keys_of
from mlxspec.sampling.sampler import Sampler

LENGTH = 60
FEW, MANY = (4, 17, 40, 63), range(0, 60, 10)  # 6% and 9% of the tokens
WARM = SamplingParams(temperature=1.0, top_p=0.9, seed=5)
RULED = SamplingParams(
    logit_bias={3: 3.0, 9: -2.0, 40: 2.0}, penalties=Penalties(repetition=1.3, presence=0.4)
)


def pair(missing: tuple[int, ...] | range = (), *, compiled: bool = False) -> Engine:
    """The Llama with itself in other ids as its draft."""
    draft, shared = foreign(model("llama"), missing)
    return Engine(model("llama"), draft, shared=shared, compiled=compiled)


def rate(result: Generation) -> float:
    assert result.speculation.acceptance_rate is not None
    return result.speculation.acceptance_rate


# --- greedy -----------------------------------------------------------------------------


@pytest.mark.parametrize("draft_tokens", range(1, 6))
@pytest.mark.parametrize("length", [1, 2, 30])
def test_other_ids_change_nothing(length: int, draft_tokens: int) -> None:
    result = pair().generate(prompt_of(length), max_tokens=LENGTH, draft_tokens=draft_tokens)
    assert result.tokens == plain_of("llama", length, LENGTH)
    assert rate(result) == 1


def test_compiled_rounds() -> None:
    result = pair(FEW, compiled=True).generate(prompt_of(9), max_tokens=LENGTH, draft_tokens=2)
    assert result.tokens == plain_of("llama", 9, LENGTH)


@pytest.mark.parametrize("draft_tokens", range(1, 6))
@pytest.mark.parametrize("missing", [FEW, MANY], ids=["few", "many"])
def test_tokens_that_are_not_shared_change_no_text(
    missing: tuple[int, ...] | range, draft_tokens: int
) -> None:
    # They are in the prompt and in the text.
    text = plain_of("llama", 30, LENGTH)
    assert set(missing) & set(prompt_of(30))
    assert set(missing) & set(text)
    result = pair(missing).generate(prompt_of(30), max_tokens=LENGTH, draft_tokens=draft_tokens)
    assert result.tokens == text
    assert 0.05 < rate(result) < 1


@pytest.mark.parametrize("name", ["qwen3", "lfm2", "recurrent_gemma", "llama4"])
def test_drafts_with_other_pasts(name: str) -> None:
    # Windows, states, and mlx-lm's own caches.
    _, shared = foreign(model("llama"), FEW)
    engine = Engine(model("llama"), model(name), shared=shared, compiled=False)
    result = engine.generate(prompt_of(9), max_tokens=LENGTH, draft_tokens=3)
    assert result.tokens == plain_of("llama", 9, LENGTH)


def test_a_target_whose_embedding_is_padded() -> None:
    target = with_vocabulary(model("llama"), 96)
    draft, shared = foreign(model("llama"))
    prompt = [*prompt_of(9), 95, 70]
    engine = Engine(target, draft, shared=shared, compiled=False)
    result = engine.generate(prompt, max_tokens=LENGTH, draft_tokens=3)
    assert result.tokens == plain(target, prompt, LENGTH)


def test_a_draft_whose_tokenizer_has_more_tokens_than_its_model() -> None:
    draft, shared = foreign(model("llama"), FEW)
    beyond = {token: VOCABULARY + place for place, token in enumerate(FEW)}
    wide = replace(shared, partners={**shared.partners, **beyond}, placeholder=VOCABULARY + 9)
    engine = Engine(model("llama"), draft, shared=wide, compiled=False)
    logits = engine.draft(mx.array([[*FEW, 5]]))
    assert np.isinf(np.array(logits)).nonzero()[2].tolist() == [*FEW] * 5
    assert engine.draft is not None
    result = engine.generate(prompt_of(30), max_tokens=LENGTH, draft_tokens=3)
    assert result.tokens == plain_of("llama", 30, LENGTH)


# --- what a draft is shown, and what it says ---------------------------------------------


def test_what_is_shown_and_said() -> None:
    draft, shared = foreign(model("llama"), FEW)
    shared = replace(shared, stand_ins={17: 8, 40: 2})
    translated = Translated(draft, shared, VOCABULARY)
    tokens = [5, 17, 40, 4, 5]
    ids = [shared.partners[5], 8, 2, shared.placeholder, shared.partners[5]]
    own = np.array(draft(mx.array([ids])))
    logits = np.array(translated(mx.array([tokens])))
    for token in range(VOCABULARY):
        if token in FEW:
            assert (logits[..., token] == -np.inf).all()
        else:
            np.testing.assert_array_equal(logits[..., token], own[..., shared.partners[token]])


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_logits_keep_their_type(dtype: mx.Dtype) -> None:
    class Narrow(type(model("llama"))):  # type: ignore[misc]
        def __call__(self, *given: object, **named: object) -> mx.array:
            return super().__call__(*given, **named).astype(dtype)

    _, shared = foreign(model("llama"))
    narrow = Translated(Narrow(model("llama").args), shared, VOCABULARY)
    assert narrow(mx.array([[1]])).dtype == dtype


def test_q_is_over_what_is_shared() -> None:
    engine = pair(FEW)
    sampler = Sampler(replace(WARM, top_p=1.0).method(), VOCABULARY)
    state = engine.prefilled(prompt_of(9), WARM, sampler=sampler, capacity=64)
    drafter = ModelDrafter(engine.models[1], sampler.vocabulary)
    keys = keys_of(state.keys, DRAFT_NOISE + mx.arange(4), state.position[:, None])
    picks = Picks(sampler, state.recent, state.knobs, gumbel(keys, VOCABULARY))
    drafter.propose(state.drafts[MODEL], state.last_two, state.position, picks, 4, length=64)
    proposal = picks.draft_within(None)
    assert proposal.log_q is not None
    q = np.exp(np.array(proposal.log_q))[0]
    assert q.shape == (4, VOCABULARY)
    np.testing.assert_allclose(q.sum(axis=-1), 1, atol=1e-5)
    assert (q[:, list(FEW)] == 0).all()
    assert ((q > 0).sum(axis=-1) == VOCABULARY - len(FEW)).all()
    assert not set(np.array(proposal.tokens).flatten()) & set(FEW)


def ruled(prompt: list[int]) -> Iterator[int]:
    """Plain decoding by mlx-lm with the same biases and penalties."""
    processors = processors_of_mlx_lm(RULED.penalties, RULED.logit_bias)
    steps = generate_step(
        mx.array(prompt), model("llama"), max_tokens=LENGTH, logits_processors=processors
    )
    return (token for token, _ in steps)


def test_biases_and_penalties_mean_the_ids_of_the_target() -> None:
    result = pair().generate(prompt_of(9), max_tokens=LENGTH, draft_tokens=3, sampling=RULED)
    assert result.tokens == list(ruled(prompt_of(9)))
    assert rate(result) == 1
    partly = pair(FEW).generate(prompt_of(9), max_tokens=LENGTH, draft_tokens=3, sampling=RULED)
    assert partly.tokens == result.tokens


# --- sampling ---------------------------------------------------------------------------


@pytest.mark.parametrize("draft_tokens", [1, 3, 5])
@pytest.mark.parametrize("missing", [(), FEW, MANY], ids=["none", "few", "many"])
def test_coupled_text_is_the_seeds_alone(
    missing: tuple[int, ...] | range, draft_tokens: int
) -> None:
    sampling = replace(WARM, verify="coupled")
    undrafted = Engine(model("llama"), compiled=False).generate(
        prompt_of(9), max_tokens=LENGTH, sampling=sampling
    )
    result = pair(missing).generate(
        prompt_of(9), max_tokens=LENGTH, draft_tokens=draft_tokens, sampling=sampling
    )
    assert result.tokens == undrafted.tokens
    assert 0 < rate(result) <= 1
    assert (rate(result) == 1) is (not missing)


@pytest.mark.parametrize("rule", ["token", "block"])
def test_a_sampled_text_is_that_of_the_same_draft_in_the_targets_ids(rule: str) -> None:
    options = {"max_tokens": LENGTH, "draft_tokens": 3}
    sampling = replace(WARM, verify=rule)
    own = draft_for(model("llama"), "agrees")
    expected = Engine(model("llama"), own, compiled=False).generate(
        prompt_of(9), sampling=sampling, **options
    )
    result = pair().generate(prompt_of(9), sampling=sampling, **options)
    assert result.tokens == expected.tokens
    assert rate(result) == rate(expected)


# --- the engine -------------------------------------------------------------------------

NOTE = "the draft speaks another tokenizer: 93% of the target's tokens are shared"


def test_a_note_says_so_once_where_something_drafts() -> None:
    engine = pair(FEW)
    assert engine.generate(prompt_of(9), max_tokens=30, draft_tokens=2).notes == [NOTE]
    assert engine.generate(prompt_of(9), max_tokens=30, draft_tokens=0).notes == []


def test_an_engine_of_the_same_models_translates_once() -> None:
    engine = pair()
    again = Engine(engine.target, engine.draft, compiled=False)
    result = again.generate(prompt_of(9), max_tokens=LENGTH, draft_tokens=3)
    assert rate(result) == 1


def test_ids_that_mean_the_same_are_not_translated() -> None:
    target = model("llama")
    assert Engine(target, target, compiled=False).draft is target


def test_rounds_of_a_translated_draft_need_kernels_of_their_own() -> None:
    shared = Shared({0: 0}, {}, 0, 1)
    assert kind_of(Translated(model("llama"), shared, 1)) != kind_of(model("llama"))
