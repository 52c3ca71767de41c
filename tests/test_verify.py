"""Whole sampled rounds, driven many rows at a time, draw from the target's own distribution.

`check` compares n draws over V outcomes with probabilities p. For the total variation distance
TV between frequencies and p, E[TV] ≤ ½ Σᵥ √(pᵥ(1 − pᵥ)/n) by Jensen, and as one draw moves TV by
at most 1/n, P(TV ≥ E[TV] + t) ≤ exp(−2nt²) by McDiarmid. With t = √(ln(1/δ)/(2n)) and δ = 1e-9 a
right implementation fails a check once in 1e9 streams of random numbers; seeds are fixed, so a
check that passes keeps passing until the numbers are drawn otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import build, reference_p

from mlxspec import verify
from mlxspec.cache import stack
from mlxspec.drafters import ModelDrafter
from mlxspec.engine import Engine
from mlxspec.params import SamplingParams
from mlxspec.round import Round, RoundState
from mlxspec.sampling import knobs_of
from mlxspec.verify import Draft, Verdict

FALSE_ALARM = 1e-9
FIRST = 2  # the token that every row continues

HOT = SamplingParams(temperature=1.0)
PARAMETERS = {
    "plain": HOT,
    "cold": SamplingParams(temperature=0.5),
    "top_p": SamplingParams(temperature=1.0, top_p=0.6),
    "top_k": SamplingParams(temperature=1.3, top_k=3),
    "min_p": SamplingParams(temperature=0.8, min_p=0.2),
    "all": SamplingParams(temperature=0.9, top_p=0.9, top_k=5, min_p=0.05),
}


def check(drawn: np.ndarray, p: np.ndarray) -> None:
    n = len(drawn)
    frequency = np.bincount(drawn, minlength=len(p)) / n
    assert not frequency[p == 0].any()
    distance = np.abs(frequency - p).sum() / 2
    expected = np.sqrt(p * (1 - p) / n).sum() / 2
    assert distance <= expected + np.sqrt(np.log(1 / FALSE_ALARM) / (2 * n))


class Bigram(nn.Module):
    """The next token depends on the last one alone: no caches, so that many rows are cheap."""

    def __init__(self, table: np.ndarray) -> None:
        super().__init__()
        self.table = mx.array(table, mx.float32)

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        return self.table[tokens]


def tables(vocabulary: int, drafts: int | None = None, scale: float = 1.5) -> list[np.ndarray]:
    """Logits of a target and of a draft that is like it, but not much."""
    rng = np.random.default_rng(vocabulary)
    target = rng.normal(size=(vocabulary, vocabulary)) * scale
    size = drafts or vocabulary
    draft = rng.normal(size=(size, size)) * scale
    common = min(size, vocabulary)
    draft[:common, :common] += target[:common, :common] / 2
    return [target, draft]


def rounds_of(target: np.ndarray, draft: np.ndarray, params: SamplingParams) -> Round:
    drafter = ModelDrafter(Bigram(draft), len(draft), len(target), params.method)
    return Round(Bigram(target), drafter, params.method, compiled=False)


def bigram_state(rows: int, params: SamplingParams, seed: int = 0) -> RoundState:
    return RoundState(
        position=mx.full((rows,), 5, mx.int32),
        last_two=mx.full((rows, 2), FIRST, mx.int32),
        key=mx.random.key(seed),
        knobs=knobs_of(params, rows),
        target=[],
        draft=[],
    )


def emitted(
    rounds: Round, state: RoundState, count: int, draft_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` tokens of every row, and how many proposals its first round kept."""
    texts: list[list[int]] = [[] for _ in state.position.tolist()]
    kept = None
    for _ in range(count):
        state, result = rounds(state, draft_tokens=draft_tokens, length=64)
        committed = result.tolist()
        kept = kept or [row[-1] for row in committed]
        for text, row in zip(texts, committed, strict=True):
            text += row[: row[-1] + 1]
    return np.array([text[:count] for text in texts]), np.array(kept)


def check_rounds(params: SamplingParams, *, draft_tokens: int = 2, count: int = 1) -> None:
    """Check the joint distribution of the first `count` tokens, vocabulary 8."""
    target, draft = tables(8)
    state = bigram_state(40_000, params)
    tokens, _ = emitted(rounds_of(target, draft, params), state, count, draft_tokens)
    check(joint_outcomes(tokens, 8), joint_p(target, params, count))


def joint_outcomes(tokens: np.ndarray, vocabulary: int) -> np.ndarray:
    return tokens @ vocabulary ** np.arange(tokens.shape[1])[::-1]


def joint_p(table: np.ndarray, params: SamplingParams, count: int) -> np.ndarray:
    steps = np.stack([reference_p(row, params) for row in table])
    p = steps[FIRST]
    for _ in range(count - 1):
        p = (p.reshape(-1, len(table))[..., None] * steps).reshape(-1)
    return p


# --- the rounds as they are -----------------------------------------------------------------


@pytest.mark.parametrize("draft_tokens", [1, 3])
@pytest.mark.parametrize("params", PARAMETERS.values(), ids=PARAMETERS)
def test_next_token(params: SamplingParams, draft_tokens: int) -> None:
    check_rounds(params, draft_tokens=draft_tokens)


@pytest.mark.parametrize("draft_tokens", [0, 1, 2, 4])
def test_three_tokens_jointly(draft_tokens: int) -> None:
    # Over several rounds: a key that is used twice ties their tokens to each other.
    check_rounds(HOT, draft_tokens=draft_tokens, count=3)


def test_one_row_alone() -> None:
    # MLX draws from a single distribution in another way than from many.
    target, draft = tables(8)
    rounds = rounds_of(target, draft, HOT)
    state = bigram_state(1, HOT)
    results = [
        rounds(state._replace(key=key), draft_tokens=1, length=64)[1]
        for key in mx.random.split(mx.random.key(0), 1500)
    ]
    check(np.array(mx.concatenate(results)[:, 0]), joint_p(target, HOT, 1))


def test_two_filtered_tokens_jointly() -> None:
    check_rounds(PARAMETERS["top_p"], count=2)


@pytest.mark.parametrize("drafts", [5, 11])
@pytest.mark.parametrize("params", [HOT, PARAMETERS["top_p"]], ids=["plain", "top_p"])
def test_draft_of_another_vocabulary(params: SamplingParams, drafts: int) -> None:
    target, draft = tables(8, drafts)
    state = bigram_state(40_000, params)
    tokens, kept = emitted(rounds_of(target, draft, params), state, 2, 3)
    check(joint_outcomes(tokens, 8), joint_p(target, params, 2))
    assert 0 < kept.mean() < 3


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.6, top_p=0.9),
        SamplingParams(temperature=1.0, top_k=20),
    ],
    ids=["plain", "top_p", "top_k"],
)
def test_large_vocabulary(params: SamplingParams) -> None:
    check_large(params)


def check_large(params: SamplingParams) -> None:
    """Check the next token, vocabulary 4,096.

    The likely tokens one by one, the others by their ranks modulo 8: any partition is checked by
    the same bound, and with few parts it is tight.
    """
    target, draft = large_tables()
    p = reference_p(target[FIRST], params)
    rank = np.argsort(np.argsort(-p))
    part = np.where(rank < 40, rank, 40 + rank % 8)
    rounds = rounds_of(target, draft, params)
    tokens = [emitted(rounds, bigram_state(500, params, seed), 1, 1)[0][:, 0] for seed in range(10)]
    check(part[np.concatenate(tokens)], np.bincount(part, weights=p))


def large_tables() -> list[np.ndarray]:
    """Rows of 4,096 logits, each that of one of four tokens, with some likely tokens."""
    rng = np.random.default_rng(0)
    target = rng.normal(size=(4, 4096)) * 1.0
    target[:, :30] += 6
    draft = target * 0.7 + rng.normal(size=target.shape)
    return [np.tile(table, (1024, 1)).astype(np.float32) for table in (target, draft)]


@pytest.mark.parametrize("params", [HOT, PARAMETERS["all"]], ids=["plain", "all"])
def test_as_many_proposals_are_kept_as_can_be(params: SamplingParams) -> None:
    # Σ min(p, q) of the first ones. By Hoeffding, the bound of `check` for two outcomes holds.
    target, draft = tables(8)
    state = bigram_state(40_000, params)
    _, kept = emitted(rounds_of(target, draft, params), state, 1, 1)
    overlap = np.minimum(reference_p(target[FIRST], params), reference_p(draft[FIRST], params))
    check(kept, np.array([1 - overlap.sum(), overlap.sum()]))


@pytest.mark.parametrize("params", [HOT, PARAMETERS["top_p"]], ids=["plain", "top_p"])
def test_models_with_caches(params: SamplingParams) -> None:
    target, draft = (build("llama", vocabulary=8, seed=seed) for seed in (0, 1))
    for network in (target, draft):
        network.model.norm.weight = network.model.norm.weight * 0.4
    engine = Engine(target, draft, compiled=False)
    prompt, rows = [1, 4, 6], 256
    one = engine.prefilled(prompt)
    drafter = ModelDrafter(draft, 8, 8, params.method)
    rounds = Round(target, drafter, params.method, compiled=False)
    many = RoundState(
        position=mx.repeat(one.position, rows),
        last_two=mx.repeat(one.last_two, rows, axis=0),
        key=one.key,
        knobs=knobs_of(params, rows),
        target=stack([one.target] * rows),
        draft=stack([one.draft] * rows),
    )
    tokens = np.concatenate(
        [emitted(rounds, many._replace(key=mx.random.key(seed)), 2, 2)[0] for seed in range(12)]
    )
    p = reference_p(np.array(target(mx.array([prompt]))[0, -1]), params)
    after = np.array(target(mx.array([[*prompt, token] for token in range(8)]))[:, -1])
    steps = np.stack([reference_p(logits, params) for logits in after])
    check(joint_outcomes(tokens, 8), (p[:, None] * steps).reshape(-1))


def test_greedy_keeps_what_agrees() -> None:
    best = np.array([[3, 1, 2, 5], [3, 1, 2, 5], [3, 1, 2, 5], [0, 0, 0, 7]])
    proposed = mx.array([[3, 1, 2], [3, 0, 2], [1, 1, 2], [0, 0, 1]], mx.int32)
    verdict = verify.greedy(mx.array(np.eye(8)[best], mx.float32), Draft(proposed, None))
    assert verdict.accepted.tolist() == [3, 1, 0, 2]
    assert verdict.next_token.tolist() == [5, 1, 3, 0]


def test_rounding_that_leaves_no_residual() -> None:
    # p < q everywhere but for rounding, and a rejection: whatever is drawn must be possible.
    log_p = mx.array([[[-mx.inf, 0.0, -mx.inf]] * 2] * 64)
    draft = Draft(mx.zeros((64, 1), mx.int32), mx.array([[[0.0, 0.0, -mx.inf]]] * 64))
    verdict = verify.token_rule(log_p, draft, mx.random.key(0))
    assert set(verdict.accepted.tolist()) == {0}
    assert set(verdict.next_token.tolist()) == {1}


# --- rules that are wrong -------------------------------------------------------------------

Rule = Callable[[mx.array, Draft, mx.array], Verdict]


def rule(*, swapped: bool = False, residual: bool = True) -> Rule:
    """The token rule for one proposed token, right as it stands."""

    def token_rule(log_p: mx.array, draft: Draft, key: mx.array) -> Verdict:
        assert draft.log_q is not None
        accept_key, next_key = mx.random.split(key)
        p, q = mx.exp(log_p[:, 0]), mx.exp(draft.log_q[:, 0])
        ratio = mx.take_along_axis(q / p if swapped else p / q, draft.tokens, axis=1)[:, 0]
        accepted = mx.random.uniform(shape=ratio.shape, key=accept_key) < ratio
        rest = mx.maximum(p - q, 0) if residual else p
        weights = mx.where(accepted[:, None], log_p[:, 1], mx.log(rest))
        drawn = mx.random.categorical(weights, key=next_key)
        return Verdict(accepted.astype(mx.int32), drawn.astype(mx.int32))

    return token_rule


def greedy_rule(log_p: mx.array, draft: Draft, key: mx.array) -> Verdict:
    return verify.greedy(log_p, draft)


def test_another_rule_that_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "token_rule", rule())
    check_rounds(HOT, draft_tokens=1)
    check_rounds(HOT, draft_tokens=1, count=2)


@pytest.mark.parametrize(
    "wrong",
    [rule(residual=False), rule(swapped=True), greedy_rule],
    ids=["draws from p after a rejection", "accepts with q / p", "verifies greedily"],
)
def test_wrong_rules_are_noticed(monkeypatch: pytest.MonkeyPatch, wrong: Rule) -> None:
    monkeypatch.setattr(verify, "token_rule", wrong)
    with pytest.raises(AssertionError):
        check_rounds(HOT, draft_tokens=1)
    with pytest.raises(AssertionError):
        check_large(HOT)


def test_q_of_before_the_filter_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = ModelDrafter._choose

    def unfiltered(self: ModelDrafter, logits: mx.array, *rest: Any) -> tuple[mx.array, mx.array]:
        token, _ = choose(self, logits, *rest)
        return token, logits - mx.logsumexp(logits, axis=-1, keepdims=True)

    monkeypatch.setattr(ModelDrafter, "_choose", unfiltered)
    with pytest.raises(AssertionError):
        check_rounds(PARAMETERS["top_p"], draft_tokens=1)


def test_a_key_used_twice_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    target, draft = tables(8)
    rounds = rounds_of(target, draft, HOT)

    class SameKey:
        def __call__(self, state: RoundState, **options: int) -> tuple[RoundState, mx.array]:
            after, result = rounds(state, **options)
            return after._replace(key=state.key), result

    tokens, _ = emitted(SameKey(), bigram_state(40_000, HOT), 3, 1)  # type: ignore[arg-type]
    check(tokens[:, 0], joint_p(target, HOT, 1))
    with pytest.raises(AssertionError):
        check(joint_outcomes(tokens, 8), joint_p(target, HOT, 3))
