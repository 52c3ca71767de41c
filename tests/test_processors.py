"""Biases, penalties and a caller's own processors say what they say in mlx-lm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import (
    KINDS,
    VOCABULARY,
    build,
    draft_for,
    model,
    plain_of,
    processors_of_mlx_lm,
    prompt_of,
    with_vocabulary,
)
from mlx.utils import tree_map
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import (
    apply_min_p,
    apply_top_k,
    apply_top_p,
    make_repetition_penalty,
)

from mlxspec.decode.engine import Engine
from mlxspec.decode.round import FusedRound
from mlxspec.errors import BrokenOutput, UsageError
from mlxspec.metrics import Generation
from mlxspec.params import Penalties, SamplingParams
from mlxspec.sampling import noise
from mlxspec.sampling.sampler import NO_TOKEN, Processor, Sampler, knobs_of

BIAS = {0: 1.5, 7: -2.0, 9: float("-inf"), VOCABULARY - 1: 0.5}


def plainly(
    target: Any,
    prompt: Sequence[int],
    count: int,
    processors: Sequence[Processor],
    sampler: Callable[[mx.array], mx.array] | None = None,
) -> list[int]:
    """The text of mlx-lm, the oracle."""
    steps = generate_step(
        mx.array(prompt),
        target,
        max_tokens=count,
        sampler=sampler,
        logits_processors=list(processors),
    )
    return [token for token, _ in steps]


def engine_of(name: str, kind: str, *, compiled: bool = False) -> Engine:
    target = model(name)
    return Engine(target, draft_for(target, kind), compiled=compiled)


# --- scores ---------------------------------------------------------------------------------

ALL = {"repetition": 1.3, "presence": 0.7, "frequency": 0.4}


def with_windows(repetition: int, presence: int, frequency: int) -> Penalties:
    return Penalties(
        **ALL,
        repetition_context=repetition,
        presence_context=presence,
        frequency_context=frequency,
    )


def scored(
    params: SamplingParams, logits: mx.array, history: Sequence[int], proposed: Sequence[int]
) -> np.ndarray:
    """Our scores of logits [N, V] that follow `history` and 0 … N - 1 proposed tokens."""
    sampler = Sampler(params.method(whole=64), VOCABULARY)
    window = sampler.context
    last = list(history[max(len(history) - window, 0) :])
    recent = [NO_TOKEN] * (window - len(last)) + last + list(proposed)
    return np.array(
        sampler.scores(
            logits[None],
            mx.array(recent, mx.int32)[None],
            knobs_of(params, batch=1, vocabulary=VOCABULARY),
        )
    )[0]


@pytest.mark.parametrize(
    "penalties",
    [
        *(Penalties(**{name: value}) for name, value in ALL.items()),
        Penalties(repetition=0.6, presence=-0.7, frequency=-0.4),
        Penalties(repetition=1.0, presence=0.5),
        *(with_windows(window, window, window) for window in (0, 1, 3, 20)),
        with_windows(1, 3, 20),
        with_windows(20, 1, 3),
        with_windows(3, 0, 1),
        with_windows(0, 5, 0),
    ],
    ids=str,
)
def test_scores_are_those_of_mlx_lm(penalties: Penalties) -> None:
    rng = np.random.default_rng(1)
    for bias in [None, BIAS]:
        params = SamplingParams(penalties=penalties, logit_bias=bias or {})
        for length in [1, 2, 3, 19, 20, 21, 45]:
            # Of few tokens, so that many are there again.
            for few in [3, VOCABULARY]:
                rows = int(rng.integers(1, 6))
                history = rng.integers(0, few, length).tolist()
                proposed = rng.integers(0, few, rows - 1).tolist()
                logits = mx.array(rng.normal(size=(rows, VOCABULARY)) * 3, mx.float32)
                got = scored(params, logits, history, proposed)
                for row in range(rows):
                    expected = logits[row : row + 1]
                    before = mx.array(history + proposed[:row])
                    for processor in processors_of_mlx_lm(penalties, bias):
                        expected = processor(before, expected)
                    np.testing.assert_allclose(
                        got[row], np.array(expected)[0], rtol=1e-6, atol=1e-6, err_msg=f"{row}"
                    )


@pytest.mark.parametrize("bias", [{}, {9: -1.0}], ids=["unbiased", "biased"])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_scores_are_float32(dtype: mx.Dtype, bias: dict[int, float]) -> None:
    params = SamplingParams(penalties=with_windows(3, 3, 3), logit_bias=bias)
    logits = mx.array(np.random.default_rng(0).normal(size=(2, VOCABULARY)), dtype)
    got, wide = (scored(params, x, [1, 2], [5]) for x in (logits, logits.astype(mx.float32)))
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, wide)


# --- texts ----------------------------------------------------------------------------------

# A prompt, penalties and biases for each model: windows shorter and longer than the prompt.
SETTINGS: dict[str, tuple[int, Penalties, dict[int, float]]] = {
    "llama": (7, with_windows(20, 20, 20), {}),
    "qwen2": (30, Penalties(repetition=1.5, repetition_context=3), BIAS),
    "mixtral": (40, with_windows(0, 1, 5), BIAS),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SETTINGS)
def test_greedy_text_is_that_of_mlx_lm(name: str, kind: str) -> None:
    length, penalties, bias = SETTINGS[name]
    prompt = prompt_of(length)
    expected = plainly(model(name), prompt, 40, processors_of_mlx_lm(penalties, bias))
    assert expected != plain_of(name, length, 40)
    for draft_tokens in [1, 3, 8] if kind != "half" else [0, 1, 2, 5]:
        result = engine_of(name, kind).generate(
            prompt,
            max_tokens=40,
            draft_tokens=draft_tokens,
            sampling=SamplingParams(penalties=penalties, logit_bias=bias),
        )
        assert result.tokens == expected
        if draft_tokens and kind == "agrees":  # it sees the same tokens before each of its own
            assert result.speculation.acceptance_rate == 1.0


def test_compiled_rounds_say_the_same() -> None:
    engine = engine_of("llama", "half", compiled=True)
    for values in [ALL, {"repetition": 2.0, "presence": 0.1, "frequency": 2.0}]:
        penalties, bias = Penalties(**values), {5: 1.0}
        expected = plainly(model("llama"), prompt_of(7), 40, processors_of_mlx_lm(penalties, bias))
        result = engine.generate(
            prompt_of(7),
            max_tokens=40,
            draft_tokens=3,
            sampling=SamplingParams(penalties=penalties, logit_bias=bias),
        )
        assert result.tokens == expected


def test_a_window_of_the_whole_text_without_an_end_is_that_of_the_context() -> None:
    target = build("qwen3", max_position_embeddings=80)
    penalties = with_windows(0, 0, 0)
    session = Engine(target, target, compiled=False).session(
        prompt_of(5), draft_tokens=3, sampling=SamplingParams(penalties=penalties)
    )
    tokens: list[int] = []
    while step := session.step().tokens:
        tokens += step
    assert tokens == plainly(target, prompt_of(5), 75, processors_of_mlx_lm(penalties))


class Coupled:
    """A sampler for mlx-lm that draws with the noise of the place that a token is chosen for."""

    def __init__(self, prompt: Sequence[int], params: SamplingParams, seed: int) -> None:
        self._place = len(prompt)
        self._params = params
        self._key = noise.row_key(seed)

    def __call__(self, logprobs: mx.array) -> mx.array:
        params, x = self._params, logprobs
        if 0 < params.top_p < 1:
            x = apply_top_p(x, params.top_p)
        if params.min_p:
            x = apply_min_p(x, params.min_p)
        if params.top_k:
            x = apply_top_k(x, params.top_k)
        x = x * (1 / params.temperature)
        key = noise.keys_of(
            self._key[None], noise.TARGET_NOISE, mx.array([[self._place]], mx.int32)
        )
        self._place += 1
        x = x - mx.logsumexp(x, axis=-1, keepdims=True)
        return mx.argmax(x + noise.gumbel(key, x.shape[-1])[0], axis=-1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "filters"),
    [
        ("llama", {"temperature": 1.0}),
        ("qwen2", {"temperature": 0.6, "top_p": 0.9, "min_p": 0.02, "top_k": 20}),
        ("mixtral", {"temperature": 1.7, "top_k": 5}),
    ],
)
def test_coupled_text_is_that_of_mlx_lm(name: str, filters: dict[str, Any], kind: str) -> None:
    length, penalties, bias = SETTINGS[name]
    prompt, processors = prompt_of(length), processors_of_mlx_lm(penalties, bias)
    params = SamplingParams(
        verify="coupled", seed=3, penalties=penalties, logit_bias=bias, **filters
    )
    expected = plainly(model(name), prompt, 30, processors, Coupled(prompt, params, seed=3))
    assert expected != plainly(model(name), prompt, 30, processors)
    for draft_tokens in [1, 6] if kind != "half" else [0, 3]:
        result = engine_of(name, kind).generate(
            prompt, max_tokens=30, draft_tokens=draft_tokens, sampling=params
        )
        assert result.tokens == expected
        if draft_tokens and kind == "agrees":  # the same distribution and the same noise
            assert result.speculation.acceptance_rate == 1.0


# --- biases that decide ---------------------------------------------------------------------

SAMPLINGS = {
    "greedy": SamplingParams(),
    "token": SamplingParams(temperature=1.0, seed=5, verify="token"),
    "block": SamplingParams(temperature=1.0, seed=5, verify="block"),
    "coupled": SamplingParams(temperature=1.0, seed=5, verify="coupled"),
}
EVERY_WAY = pytest.mark.parametrize("rule", SAMPLINGS)


def with_bias(sampling: SamplingParams, bias: dict[int, float]) -> SamplingParams:
    values = {name: getattr(sampling, name) for name in ("temperature", "seed", "verify")}
    return SamplingParams(**values, logit_bias=bias)


@EVERY_WAY
@pytest.mark.parametrize("draft_tokens", [0, 3])
def test_a_bias_forbids_and_forces(draft_tokens: int, rule: str) -> None:
    engine = engine_of("llama", "half")
    sampling = SAMPLINGS[rule]

    def text(bias: dict[int, float]) -> list[int]:
        return engine.generate(
            prompt_of(7),
            max_tokens=30,
            draft_tokens=draft_tokens,
            sampling=with_bias(sampling, bias),
        ).tokens

    free = text({})
    common = sorted(set(free), key=free.count)[-5:]
    for nothing in [float("-inf"), -1000.0]:
        assert not set(text(dict.fromkeys(common, nothing))) & set(common)
    assert text({11: 100.0}) == [11] * 30
    assert set(text(dict.fromkeys((11, 12), 100.0))) <= {11, 12}


@EVERY_WAY
def test_a_bias_reaches_tokens_that_the_draft_lacks(rule: str) -> None:
    target = model("llama")
    engine = Engine(target, with_vocabulary(target, 40), compiled=False)
    options: dict[str, Any] = {"max_tokens": 24, "draft_tokens": 3}

    def text(bias: dict[int, float]) -> list[int]:
        sampling = with_bias(SAMPLINGS[rule], bias)
        return engine.generate(prompt_of(7), sampling=sampling, **options).tokens

    assert text({5: 9.0}) != text({3: 0.0})
    assert text({50: 100.0}) == [50] * 24


@pytest.mark.parametrize("token", [VOCABULARY, 10**9])
def test_a_bias_of_a_token_that_the_model_lacks_is_refused(token: int) -> None:
    sampling = SamplingParams(logit_bias={3: 1.0, token: 100.0})
    with pytest.raises(UsageError, match=f"no token {token}") as caught:
        Engine(model("llama"), compiled=False).request([1], sampling=sampling)
    assert f"0 to {VOCABULARY - 1}" in caught.value.hint


# --- processors of a caller's own -----------------------------------------------------------


def no_repeat(tokens: mx.array, logits: mx.array) -> mx.array:
    """A graph alone: no token of the last five again."""
    seen = mx.any(mx.arange(logits.shape[-1]) == tokens[-5:, None], axis=0)
    return mx.where(seen, -mx.inf, logits)


def looks(tokens: mx.array, logits: mx.array) -> mx.array:
    """One that looks at values: after an even token an odd one, and by how the text begins."""
    logits[:, tokens[-1].item() % 2 :: 2] = -mx.inf
    return logits - 0.01 * (tokens.tolist()[0] % 7) * mx.arange(logits.shape[-1])


def dense(tokens: mx.array, logits: mx.array) -> mx.array:
    """One that knows how many tokens the target has."""
    mask = np.zeros((1, VOCABULARY), np.float32)
    mask[:, (len(tokens) * 3) % VOCABULARY :: 3] = -2
    return logits + mx.array(mask)


OWN: dict[str, list[Processor]] = {
    "a graph": [no_repeat],
    "looks": [looks],
    "dense": [dense],
    "several": [dense, no_repeat, looks],
    "mlx-lm's": [
        make_repetition_penalty(1.5, 6),
        *processors_of_mlx_lm(Penalties(presence=1.0), {4: 2.0}),
    ],
}


@cache
def own_text(which: str) -> list[int]:
    return plainly(model("llama"), prompt_of(7), 30, OWN[which])


@pytest.mark.parametrize("draft", [*KINDS, "fewer tokens"])
@pytest.mark.parametrize("which", OWN)
def test_own_processors_say_what_they_say_in_mlx_lm(which: str, draft: str) -> None:
    target = model("llama")
    small = draft == "fewer tokens"
    # Asked for compiled rounds: the processors' values would not be there in a trace.
    engine = Engine(
        target,
        with_vocabulary(target, 40) if small else draft_for(target, draft),
        compiled=True,
    )
    expected = own_text(which)
    assert expected != plain_of("llama", 7, 30)
    for draft_tokens in [0, 1, 3]:
        result = engine.generate(
            prompt_of(7), max_tokens=30, draft_tokens=draft_tokens, processors=OWN[which]
        )
        assert result.tokens == expected
        assert any("not compiled" in note for note in result.notes)
        if draft_tokens and draft == "agrees":
            assert result.speculation.acceptance_rate == 1.0
        if draft_tokens and small:
            assert result.speculation.acceptance_rate
    # And nothing of it stays with the engine.
    without = engine.generate(prompt_of(7), max_tokens=10, draft_tokens=3)
    assert without.tokens == plain_of("llama", 7, 40)[:10]
    assert without.notes == []


def test_rounds_with_processors_are_not_compiled_however_they_are_made() -> None:
    engine = engine_of("llama", "half")
    sampler = Sampler(SamplingParams().method(), VOCABULARY, [looks])
    rounds = FusedRound(engine.models[0], {}, sampler, compiled=True)
    state = engine.prefilled(prompt_of(7), sampler=sampler, draft=False)
    _, result = rounds(state, draft_tokens=0, length=64)
    assert result.tolist() == [[*plainly(engine.target, prompt_of(7), 1, [looks]), 0]]


@pytest.mark.parametrize("draft_tokens", [0, 1, 3])
@EVERY_WAY
def test_mlx_lm_s_own_penalties_are_ours(rule: str, draft_tokens: int) -> None:
    engine = engine_of("llama", "half")
    sampling = SAMPLINGS[rule]
    penalties = Penalties(repetition=1.4, presence=0.8, presence_context=4)
    own = engine.generate(
        prompt_of(9),
        max_tokens=40,
        draft_tokens=draft_tokens,
        sampling=sampling,
        processors=processors_of_mlx_lm(penalties),
    )
    values = {name: getattr(sampling, name) for name in ("temperature", "seed", "verify")}
    built_in = engine.generate(
        prompt_of(9),
        max_tokens=40,
        draft_tokens=draft_tokens,
        sampling=SamplingParams(**values, penalties=penalties),
    )
    assert own.tokens == built_in.tokens
    assert len(processors_of_mlx_lm(penalties)) == 2


def test_own_processors_come_before_bias_and_penalties() -> None:
    penalties = with_windows(5, 6, 7)
    engine = engine_of("llama", "half")
    expected = plainly(
        model("llama"), prompt_of(7), 40, [looks, dense, *processors_of_mlx_lm(penalties, {5: 3.0})]
    )
    result = engine.generate(
        prompt_of(7),
        max_tokens=40,
        draft_tokens=3,
        sampling=SamplingParams(penalties=penalties, logit_bias={5: 3.0}),
        processors=[looks, dense],
    )
    assert result.tokens == expected


@pytest.mark.parametrize("draft_tokens", [0, 1, 3])
def test_own_processors_of_coupled_samples(draft_tokens: int) -> None:
    params = SamplingParams(temperature=0.9, top_p=0.9, verify="coupled", seed=8)
    prompt = prompt_of(7)
    expected = plainly(model("llama"), prompt, 40, OWN["several"], Coupled(prompt, params, 8))
    result = engine_of("llama", "half").generate(
        prompt,
        max_tokens=40,
        draft_tokens=draft_tokens,
        sampling=params,
        processors=OWN["several"],
    )
    assert result.tokens == expected


@pytest.mark.parametrize("draft_tokens", [0, 3])
def test_processors_are_shown_one_sequence_and_its_whole_text(draft_tokens: int) -> None:
    shown: list[tuple[list[int], tuple[int, ...], mx.Dtype]] = []

    def remembers(tokens: mx.array, logits: mx.array) -> mx.array:
        shown.append((tokens.tolist(), logits.shape, logits.dtype))
        return logits

    prompt = prompt_of(7)
    result = engine_of("llama", "half").generate(
        prompt, max_tokens=30, draft_tokens=draft_tokens, processors=[remembers]
    )
    assert {(shape, dtype) for _, shape, dtype in shown} == {((1, VOCABULARY), mx.float32)}
    # Of every place of the text it was asked what follows.
    whole = prompt + result.tokens
    seen = {tuple(tokens) for tokens, _, _ in shown}
    assert {tuple(whole[:end]) for end in range(len(prompt), len(whole))} <= seen
    assert all(tokens[: len(prompt)] == prompt for tokens, _, _ in shown)


# --- what cannot go on ----------------------------------------------------------------------


def forbids_after(count: int) -> Processor:
    """Allows nothing once there are so many tokens."""

    def processor(tokens: mx.array, logits: mx.array) -> mx.array:
        return logits - mx.inf if len(tokens) >= count else logits

    return processor


def check_usable(engine: Engine) -> None:
    result = engine.generate(prompt_of(7), max_tokens=8, draft_tokens=3)
    assert result.tokens == plain_of("llama", 7, 40)[:8]


def written_before_it_broke(engine: Engine, error: type[Exception], **options: Any) -> Generation:
    run = engine.run(prompt_of(7), max_tokens=40, **options)
    with pytest.raises(error) as raised:
        for _ in run:
            pass
    if error is BrokenOutput:
        whole = 7 + len(run.generation.tokens)
        assert f"after {whole} tokens" in str(raised.value)
        assert raised.value.hint  # type: ignore[attr-defined]
    assert run.generation.finish_reason == "interrupted"
    return run.generation


@EVERY_WAY
@pytest.mark.parametrize("draft_tokens", [0, 3])
@pytest.mark.parametrize("allowed", [0, 9])
def test_a_processor_that_forbids_everything(allowed: int, draft_tokens: int, rule: str) -> None:
    engine = engine_of("llama", "half")
    sampling = SAMPLINGS[rule]
    result = written_before_it_broke(
        engine,
        BrokenOutput,
        draft_tokens=draft_tokens,
        sampling=sampling,
        processors=[forbids_after(7 + allowed)],
    )
    # A round is given back whole or not at all.
    assert max(allowed - draft_tokens, 0) <= len(result.tokens) <= allowed
    free = engine.generate(prompt_of(7), max_tokens=9, draft_tokens=draft_tokens, sampling=sampling)
    assert result.tokens == free.tokens[: len(result.tokens)]
    check_usable(engine)


@EVERY_WAY
@pytest.mark.parametrize("draft_tokens", [0, 1, 2, 3, 5])
def test_nothing_may_follow_what_the_target_would_not_write(draft_tokens: int, rule: str) -> None:
    # The draft does not have token 50: where that one alone is allowed, it proposes something
    # else, and after that the processor allows nothing. Plain decoding never gets there.
    def alternates(tokens: mx.array, logits: mx.array) -> mx.array:
        written = tokens.tolist()[7:]
        turn = (5, 50)
        allowed = mx.full(logits.shape, -mx.inf)
        if all(token == turn[i % 2] for i, token in enumerate(written)):
            allowed[:, turn[len(written) % 2]] = 0
        return allowed

    target = model("llama")
    result = Engine(target, with_vocabulary(target, 40), compiled=False).generate(
        prompt_of(7),
        max_tokens=10,
        draft_tokens=draft_tokens,
        sampling=SAMPLINGS[rule],
        processors=[alternates],
    )
    assert result.tokens == [5, 50] * 5


class Refusal(Exception):
    pass


@pytest.mark.parametrize("draft_tokens", [0, 1, 3])
@pytest.mark.parametrize("error", [Refusal, ValueError, RuntimeError])
def test_an_exception_of_a_processor_comes_through(
    error: type[Exception], draft_tokens: int
) -> None:
    def refuses(tokens: mx.array, logits: mx.array) -> mx.array:
        if len(tokens) >= 17:
            raise error("enough")
        return logits

    engine = engine_of("llama", "half")
    result = written_before_it_broke(engine, error, draft_tokens=draft_tokens, processors=[refuses])
    assert result.tokens == plain_of("llama", 7, 40)[: len(result.tokens)]
    check_usable(engine)


def ruined(name: str) -> Any:
    """A model whose weights are not numbers."""
    broken = build(name)
    broken.update(tree_map(lambda array: array * mx.nan, broken.parameters()))
    return broken


@EVERY_WAY
@pytest.mark.parametrize("draft_tokens", [0, 3])
def test_a_target_that_is_broken(draft_tokens: int, rule: str) -> None:
    sampling = SAMPLINGS[rule]
    for draft in [model("llama"), None]:
        engine = Engine(ruined("llama"), draft, compiled=False)
        result = written_before_it_broke(
            engine, BrokenOutput, draft_tokens=draft_tokens, sampling=sampling
        )
        assert result.tokens == []


@pytest.mark.parametrize("rule", ["greedy", "coupled"])
def test_a_draft_that_is_broken_changes_nothing(rule: str) -> None:
    engine = Engine(model("llama"), ruined("llama"), compiled=False)
    texts = [
        engine.generate(
            prompt_of(7), max_tokens=40, draft_tokens=draft_tokens, sampling=SAMPLINGS[rule]
        ).tokens
        for draft_tokens in [0, 1, 3]
    ]
    assert texts[0] == texts[1] == texts[2]
    assert len(texts[0]) == 40
    if rule == "greedy":
        assert texts[0] == plain_of("llama", 7, 40)
