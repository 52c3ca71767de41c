"""One function from logits to the distribution, and it is mlx-lm's."""

from __future__ import annotations

import dataclasses
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import draft_for, model, prompt_of
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p, apply_xtc

from mlxspec.decode.engine import Engine
from mlxspec.errors import UsageError
from mlxspec.params import VERIFY, Penalties, SamplingParams
from mlxspec.sampling.sampler import Knobs, Sampler, knobs_of, uniform_if_broken

VOCABULARY = 50


def logits_of(rows: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=(rows, VOCABULARY)) * 3, mx.float32)


def log_probs(logits: mx.array, params: SamplingParams, knobs: Knobs) -> np.ndarray:
    sampler = Sampler(params.method(), logits.shape[-1])
    nothing_before = mx.zeros((len(logits), 0), mx.int32)
    scores = sampler.scores(logits[:, None], nothing_before, knobs)
    return np.array(sampler.log_probs(scores, knobs))[:, 0]


def ours(logits: mx.array, params: SamplingParams) -> np.ndarray:
    return log_probs(logits, params, knobs_of(params, *logits.shape))


def theirs(logits: mx.array, params: SamplingParams) -> np.ndarray:
    """The probabilities that the chain of mlx-lm's `make_sampler` draws from.

    It tosses one coin for XTC: what a token is drawn from is the mixture over its two sides.
    """
    share = params.xtc_probability
    if share == 0:
        return one_side(logits, params, None)
    left_out, kept = (one_side(logits, params, side) for side in (1.0, 0.0))
    return share * left_out + (1 - share) * kept


def one_side(logits: mx.array, params: SamplingParams, coin: float | None) -> np.ndarray:
    x = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    if 0 < params.top_p < 1:
        x = apply_top_p(x, params.top_p)
    if params.min_p:
        x = apply_min_p(x, params.min_p)
    if coin is not None:
        x = apply_xtc(x, coin, params.xtc_threshold, list(params.xtc_special_tokens or ()))
    if params.top_k:
        x = apply_top_k(x, params.top_k)
    x = x * (1 / params.temperature)
    return np.exp(np.array(x - mx.logsumexp(x, axis=-1, keepdims=True)))


def assert_as_in_mlx_lm(logits: mx.array, params: SamplingParams) -> None:
    got, expected = np.exp(ours(logits, params)), theirs(logits, params)
    assert not np.isnan(got).any()
    np.testing.assert_allclose(got, expected, atol=2e-6)
    np.testing.assert_allclose(got.sum(axis=-1), 1, atol=1e-5)
    if params.temperature > 0.1:  # far below, what is kept and what is not are both 0
        np.testing.assert_array_equal(got > 0, expected > 0)


@pytest.mark.parametrize("temperature", [1e-6, 0.3, 1.0, 100.0])
@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"top_p": 0.01},
        {"top_p": 0.5},
        {"top_p": 0.95},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 49},
        {"top_p": 0.9, "min_p": 0.02, "top_k": 5},
        {"top_p": 0.3, "min_p": 0.02, "top_k": 5},
    ],
    ids=str,
)
def test_same_distribution_as_mlx_lm(filters: dict[str, Any], temperature: float) -> None:
    assert_as_in_mlx_lm(logits_of(200), SamplingParams(temperature=temperature, **filters))


SPECIAL = (0, 3, 17, 40)


@pytest.mark.parametrize("temperature", [1e-6, 0.7, 100.0])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.5])
def test_xtc_is_a_mixture_over_its_coin(threshold: float, share: float, temperature: float) -> None:
    logits = logits_of(200)
    for special in [None, (), SPECIAL]:
        params = SamplingParams(
            temperature=temperature,
            xtc_probability=share,
            xtc_threshold=threshold,
            xtc_special_tokens=special,
        )
        assert_as_in_mlx_lm(logits, params)


# In mlx-lm's order, each of these leaves another one something to do.
@pytest.mark.parametrize(
    "filters",
    [
        {"top_p": 0.9},
        {"top_p": 0.3},
        {"min_p": 0.02},
        {"min_p": 0.5},
        {"top_k": 1},
        {"top_k": 3},
        {"top_p": 0.9, "top_k": 4},
        {"top_p": 0.95, "min_p": 0.02, "top_k": 5},
        {"top_p": 0.5, "min_p": 0.3, "top_k": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.5])
def test_xtc_stands_between_min_p_and_top_k(threshold: float, filters: dict[str, Any]) -> None:
    for temperature in [0.7, 100.0]:
        for special in [(), SPECIAL]:
            params = SamplingParams(
                temperature=temperature,
                xtc_probability=0.4,
                xtc_threshold=threshold,
                xtc_special_tokens=special,
                **filters,
            )
            assert_as_in_mlx_lm(logits_of(200), params)


def test_xtc_leaves_out_all_likely_tokens_but_the_least_likely_of_them() -> None:
    likely = [0.4, 0.3, 0.2, 0.06, 0.04]
    logits = mx.log(mx.array([likely]))
    params = SamplingParams(temperature=1.0, xtc_probability=1.0, xtc_threshold=0.1)
    expected = np.array([0, 0, 0.2, 0.06, 0.04]) / 0.3
    np.testing.assert_allclose(np.exp(ours(logits, params))[0], expected, atol=1e-6)
    spared = dataclasses.replace(params, xtc_special_tokens=(1, 99))
    expected = np.array([0, 0.3, 0.2, 0.06, 0.04]) / 0.6
    np.testing.assert_allclose(np.exp(ours(logits, spared))[0], expected, atol=1e-6)


@pytest.mark.parametrize("value", [float("-inf"), -1e30])
def test_forbidden_tokens_stay_so(value: float) -> None:
    forbidden = mx.arange(VOCABULARY) % 3 != 0
    logits = mx.where(forbidden, value, logits_of(50))
    for filters in [{}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 4}, {"top_k": 30}]:
        params = SamplingParams(temperature=1.5, **filters)
        assert_as_in_mlx_lm(logits, params)
        assert_as_in_mlx_lm(logits, dataclasses.replace(params, xtc_probability=0.5))
        assert np.exp(ours(logits, params))[:, np.array(forbidden)].max() == 0


@pytest.mark.parametrize("top_k", [VOCABULARY, VOCABULARY + 1, 10**9])
def test_top_k_of_everything_is_off(top_k: int) -> None:
    plain = SamplingParams(temperature=0.7)
    all_of_it = SamplingParams(temperature=0.7, top_k=top_k)
    np.testing.assert_array_equal(ours(logits_of(5), plain), ours(logits_of(5), all_of_it))


@pytest.mark.parametrize("top_p", [0.0, 1.0])
def test_top_p_of_nothing_or_everything_is_off(top_p: float) -> None:
    got = ours(logits_of(5), SamplingParams(temperature=0.7, top_p=top_p))
    np.testing.assert_array_equal(got, ours(logits_of(5), SamplingParams(temperature=0.7)))


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({"top_k": 1}, 2),
        ({"top_k": 2}, 2),
        ({"top_k": 3}, 5),
        ({"top_p": 0.1}, 2),
        ({"min_p": 0.9}, 2),
    ],
    ids=str,
)
def test_ties_stay_together(filters: dict[str, Any], kept: int) -> None:
    # p and q must not break a tie differently, so that all stay or none.
    logits = mx.array([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0, 0.0]])
    p = np.exp(ours(logits, SamplingParams(temperature=1.0, **filters)))[0]
    assert np.count_nonzero(p) == kept
    assert p[1] == p[3]
    assert p[2] == p[4] == p[5]


def test_rows_have_their_own_parameters() -> None:
    logits = logits_of(3)
    rows = [
        SamplingParams(temperature=t, top_p=p, min_p=m, xtc_probability=s, xtc_threshold=h)
        for t, p, m, s, h in [
            (0.5, 0.9, 0.01, 0.1, 0.1),
            (1.0, 0.5, 0.1, 0.5, 0.0),
            (2.0, 0.2, 0.3, 1.0, 0.2),
        ]
    ]
    knobs = [knobs_of(row, 1, VOCABULARY) for row in rows]
    stacked = Knobs(*map(mx.concatenate, zip(*knobs, strict=True)))
    together = log_probs(logits, rows[0], stacked)
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(together[i], ours(logits[i : i + 1], row)[0], str(row))


@pytest.mark.parametrize(
    ("used", "left_out"),
    [
        ({"top_p": 0.9}, {"top_p": 0.0}),
        ({"top_p": 0.9}, {"top_p": 1.0}),
        ({"min_p": 0.1}, {"min_p": 0.0}),
        ({"xtc_probability": 0.3, "xtc_threshold": 0.0}, {"xtc_probability": 0.0}),
        ({"penalties": Penalties(repetition=1.5)}, {"penalties": Penalties(repetition=0.0)}),
        ({"penalties": Penalties(repetition=1.5)}, {"penalties": Penalties(repetition=1.0)}),
        ({"penalties": Penalties(presence=0.5)}, {}),
        ({"penalties": Penalties(frequency=0.5)}, {}),
        ({"logit_bias": {3: 5.0}}, {"logit_bias": {3: 0.0}}),
    ],
    ids=["top_p 0", "top_p 1", "min_p", "xtc", "repetition 0", "repetition 1", "presence"]
    + ["frequency", "bias"],
)
@pytest.mark.parametrize("scale", [1, 5])
def test_a_row_may_leave_out_what_another_one_uses(
    scale: float, used: dict[str, Any], left_out: dict[str, Any]
) -> None:
    # Far apart, the sum of the tokens above one rounds to 1 before the last of them.
    logits = logits_of(10) * scale
    recent = mx.argsort(-logits)[:, :2]
    params = [SamplingParams(temperature=1.0, **values) for values in (used, left_out)]
    knobs = [knobs_of(one, len(logits), VOCABULARY) for one in params]

    def probabilities(params: SamplingParams, knobs: Knobs) -> np.ndarray:
        sampler = Sampler(params.method(), VOCABULARY)
        copies = len(knobs.temperature) // len(logits)
        scores = sampler.scores(
            mx.concatenate([logits] * copies)[:, None], mx.concatenate([recent] * copies), knobs
        )
        return np.exp(np.array(sampler.log_probs(scores, knobs)))[:, 0]

    together = probabilities(params[0], Knobs(*map(mx.concatenate, zip(*knobs, strict=True))))
    alone = [probabilities(*one) for one in zip(params, knobs, strict=True)]
    assert not np.allclose(alone[0], alone[1], rtol=1e-3, atol=0)
    np.testing.assert_allclose(together, np.concatenate(alone), rtol=1e-4)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_computed_in_float32(dtype: mx.Dtype) -> None:
    params = SamplingParams(temperature=0.8, top_p=0.9)
    narrow = logits_of(20).astype(dtype)
    np.testing.assert_array_equal(ours(narrow, params), ours(narrow.astype(mx.float32), params))


@pytest.mark.parametrize("temperature", [1e-40, 1e-30, 1e-10, 1e30])
def test_extreme_temperatures(temperature: float) -> None:
    p = np.exp(ours(logits_of(20), SamplingParams(temperature=temperature)))
    assert not np.isnan(p).any()
    if temperature < 1:
        np.testing.assert_array_equal(p.argmax(-1), np.array(logits_of(20)).argmax(-1))
        np.testing.assert_allclose(p.max(-1), 1)


FILTERS = {"top_p": 0.5, "min_p": 0.5, "top_k": 3, "xtc_probability": 0.5, "xtc_threshold": 0.0}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_draft_that_is_no_distribution_is_taken_as_uniform(value: float) -> None:
    # One such number, wherever it stands among sound ones.
    rows = np.array(logits_of(VOCABULARY))
    np.fill_diagonal(rows, value)
    check_uniform(mx.array(rows))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_draft_with_nothing_to_choose_from_is_taken_as_uniform(value: float) -> None:
    check_uniform(mx.full((2, VOCABULARY), value))


def check_uniform(broken: mx.array) -> None:
    sound = uniform_if_broken(broken)
    for filters in [{}, FILTERS, *({name: value} for name, value in FILTERS.items())]:
        got = ours(sound, SamplingParams(temperature=0.7, **filters))
        np.testing.assert_allclose(got, -np.log(VOCABULARY), atol=1e-5)


def test_a_sound_draft_is_left_alone() -> None:
    logits = np.array(logits_of(4))
    logits[1, ::2] = -np.inf
    logits[2, 1:] = -np.inf
    logits[3] = np.float32(-3e38)
    np.testing.assert_array_equal(np.array(uniform_if_broken(mx.array(logits))), logits)


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", INFINITY),
        ("temperature", 1e39),
        ("temperature", NAN),
        ("top_p", -0.1),
        ("top_p", 1.1),
        ("top_p", NAN),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", NAN),
        ("top_k", -1),
        ("seed", -1),
        ("seed", 2**64),
        ("xtc_probability", -0.1),
        ("xtc_probability", 1.1),
        ("xtc_probability", NAN),
        ("xtc_threshold", -0.1),
        ("xtc_threshold", 0.51),
        ("xtc_threshold", NAN),
        ("logit_bias", {-1: 0.0}),
        ("logit_bias", {"3": 1.0}),
        ("logit_bias", {3.5: 1.0}),
        ("logit_bias", {3: INFINITY}),
        ("logit_bias", {3: 1e39}),
        ("logit_bias", {2: 1.0, 3: NAN}),
    ],
)
def test_values_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(UsageError) as raised:
        SamplingParams(**{name: value})
    assert name in str(raised.value)
    assert raised.value.hint


@pytest.mark.parametrize("value", [-0.1, 1.1, NAN])
def test_acceptance_threshold_out_of_range(value: float) -> None:
    with pytest.raises(UsageError, match="acceptance_threshold") as raised:
        SamplingParams(verify="relaxed", acceptance_threshold=value)
    assert raised.value.hint


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("repetition", -0.1),
        ("repetition", INFINITY),
        ("repetition", NAN),
        ("repetition", 1e-39),
        ("repetition", 1e39),
        ("presence", INFINITY),
        ("presence", -INFINITY),
        ("presence", -1e39),
        ("presence", NAN),
        ("frequency", -INFINITY),
        ("frequency", NAN),
        ("frequency", 1e39),
        ("repetition_context", -1),
        ("presence_context", -1),
        ("frequency_context", -1),
    ],
)
def test_penalties_out_of_range(name: str, value: float) -> None:
    with pytest.raises(UsageError) as raised:
        Penalties(**{name: value})  # type: ignore[arg-type]
    assert name in str(raised.value)
    assert raised.value.hint


@pytest.mark.parametrize("name", ["repetition", "presence", "frequency"])
def test_a_penalty_of_the_whole_text_needs_an_end(name: str) -> None:
    values: dict[str, Any] = {name: 1.5, f"{name}_context": 0}
    params = SamplingParams(penalties=Penalties(**values))
    assert getattr(params.method(100).windows, name) == 100
    with pytest.raises(UsageError, match=f"{name}_context") as raised:
        params.method()
    assert "max_tokens" in raised.value.hint
    # A penalty that is off looks back on nothing.
    values[name] = 0.0
    assert SamplingParams(penalties=Penalties(**values)).method().windows.longest == 0


@pytest.mark.parametrize("verify", [None, *(rule for rule in VERIFY if rule != "relaxed")])
def test_an_acceptance_threshold_is_of_the_relaxed_rule_alone(verify: Any) -> None:
    with pytest.raises(UsageError, match="acceptance threshold") as raised:
        SamplingParams(verify=verify, acceptance_threshold=0.5)
    assert "relaxed" in raised.value.hint


def test_greedy_verification_of_samples_is_refused() -> None:
    with pytest.raises(UsageError, match=r"temperature 0\.5") as raised:
        SamplingParams(verify="greedy", temperature=0.5)
    assert "temperature 0" in raised.value.hint


def test_an_unknown_rule() -> None:
    with pytest.raises(UsageError, match="'blokk'") as raised:
        SamplingParams(verify="blokk")  # type: ignore[arg-type]
    assert all(rule in raised.value.hint for rule in VERIFY)


@pytest.mark.parametrize(
    ("verify", "temperature", "rule"),
    [
        (None, 0.0, "greedy"),
        (None, 0.5, "block"),
        ("block", 0.0, "greedy"),
        ("token", 0.0, "greedy"),
        ("coupled", 0.0, "greedy"),
        ("greedy", 0.0, "greedy"),
        ("token", 0.5, "token"),
        ("coupled", 0.5, "coupled"),
        ("relaxed", 0.0, "relaxed"),
        ("relaxed", 0.5, "relaxed"),
    ],
)
def test_the_rule_that_is_used(verify: Any, temperature: float, rule: str) -> None:
    params = SamplingParams(temperature=temperature, verify=verify)
    assert params.rule == params.method().rule == rule
    assert params.is_exact == (rule != "relaxed")


def test_the_seed_decides_the_text() -> None:
    target = model("llama")
    engine = Engine(target, draft_for(target, "half"), compiled=False)

    def text(seed: int | None) -> tuple[list[int], int]:
        params = SamplingParams(temperature=1.0, seed=seed)
        result = engine.generate(prompt_of(7), max_tokens=40, draft_tokens=3, sampling=params)
        return result.tokens, result.seed

    assert text(1) == text(1)
    assert text(1)[0] != text(2)[0]
    assert text(2**64 - 1) == text(2**64 - 1)
    drawn, seed = text(None)
    assert text(seed)[0] == drawn
