"""One function from logits to the distribution, and it is mlx-lm's."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import draft_for, model, prompt_of
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

from mlxspec.engine import Engine
from mlxspec.errors import UsageError
from mlxspec.params import SamplingParams
from mlxspec.sampling import knobs_of, log_probs

VOCABULARY = 50


def logits_of(rows: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=(rows, VOCABULARY)) * 3, mx.float32)


def ours(logits: mx.array, params: SamplingParams) -> np.ndarray:
    return np.array(log_probs(logits[:, None], params.method, knobs_of(params, len(logits))))[:, 0]


def theirs(logits: mx.array, params: SamplingParams) -> np.ndarray:
    """The chain of mlx-lm's `make_sampler`, up to the draw."""
    x = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    if 0 < params.top_p < 1:
        x = apply_top_p(x, params.top_p)
    if params.min_p:
        x = apply_min_p(x, params.min_p)
    if params.top_k:
        x = apply_top_k(x, params.top_k)
    x = x * (1 / params.temperature)
    return np.array(x - mx.logsumexp(x, axis=-1, keepdims=True))


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
    params = SamplingParams(temperature=temperature, **filters)
    logits = logits_of(200)
    got, expected = ours(logits, params), theirs(logits, params)
    assert not np.isnan(got).any()
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(expected))
    np.testing.assert_allclose(np.exp(got), np.exp(expected), atol=2e-6)
    np.testing.assert_allclose(np.exp(got).sum(axis=-1), 1, atol=1e-5)


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
        SamplingParams(temperature=t, top_p=p, min_p=m)
        for t, p, m in [(0.5, 0.9, 0.01), (1.0, 0.5, 0.1), (2.0, 0.2, 0.3)]
    ]
    together = log_probs(
        logits[:, None],
        rows[0].method,
        type(knobs_of(rows[0], 1))(
            *map(mx.concatenate, zip(*(knobs_of(row, 1) for row in rows), strict=True))
        ),
    )
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(
            np.array(together[i]), ours(logits[i : i + 1], row), err_msg=str(row)
        )


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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("top_p", -0.1),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("top_k", -1),
        ("seed", -1),
        ("seed", 2**64),
    ],
)
def test_values_out_of_range(name: str, value: float) -> None:
    with pytest.raises(UsageError) as raised:
        SamplingParams(**{name: value})
    assert name in str(raised.value)
    assert raised.value.hint


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
