"""Whole sampled rounds, driven many rows at a time, draw from the target's own distribution.

`check` compares n draws over V outcomes with probabilities p. For the total variation distance
TV between frequencies and p, E[TV] ≤ ½ Σᵥ √(pᵥ(1 − pᵥ)/n) by Jensen, and as one draw moves TV by
at most 1/n, P(TV ≥ E[TV] + t) ≤ exp(−2nt²) by McDiarmid. With t = √(ln(1/δ)/(2n)) and δ = 1e-9 a
right implementation fails a check once in 1e9 streams of random numbers; seeds are fixed, so a
check that passes keeps passing until the numbers are drawn otherwise.

Beside it stands Pearson's χ² over the outcomes that are expected 25 times or more, the others
together as one, against the quantile of the same δ (Wilson and Hilferty's approximation). It weighs
an error of a rare outcome more than TV does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from statistics import NormalDist
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import Contrary, build, prompt_of, reference_p
from mlx_lm.models.cache import make_prompt_cache

from mlxspec.decode import round as round_module
from mlxspec.decode.engine import Engine
from mlxspec.decode.round import FusedRound
from mlxspec.decode.state import RoundState
from mlxspec.defaults import MODEL
from mlxspec.drafters.graph import ModelDrafter, Past
from mlxspec.drafters.heads.head import HeadDrafter
from mlxspec.drafters.picks import Picks
from mlxspec.drafters.translation import Translated
from mlxspec.drafters.vocabulary import Shared
from mlxspec.models.cached_model import FusedModel
from mlxspec.models.caches.layers import stack
from mlxspec.params import SamplingParams, Verify
from mlxspec.sampling import noise, verify
from mlxspec.sampling.sampler import Knobs, Sampler, knobs_of, normalised
from mlxspec.sampling.union import union
from mlxspec.sampling.verify import AcceptanceTests, Draft, Rule

FALSE_ALARM = 1e-9
FIRST = 2  # the token that every row continues
RULES: tuple[Verify, ...] = ("token", "block", "coupled")

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
    assert chi_squared(frequency * n, p * n) <= 1


def chi_squared(counts: np.ndarray, expected: np.ndarray) -> float:
    """Pearson's statistic over its quantile; see the module."""
    often = expected >= 25
    cells = [np.append(values[often], values[~often].sum()) for values in (counts, expected)]
    counts, expected = (values[cells[1] >= 25] for values in cells)
    freedom = len(counts) - 1
    if freedom == 0:
        return 0.0
    spread = 2 / (9 * freedom)
    deviate = NormalDist().inv_cdf(1 - FALSE_ALARM)
    quantile = freedom * (1 - spread + deviate * np.sqrt(spread)) ** 3
    return float(((counts - expected) ** 2 / expected).sum() / quantile)


def test_chi_squared_notices_a_rare_outcome_that_is_too_rare() -> None:
    p = np.array([0.9, 0.098, 0.002])
    drawn = np.repeat([0, 1, 2], [36_030, 3_960, 10])
    assert np.abs(np.bincount(drawn) / len(drawn) - p).sum() / 2 < 0.002
    with pytest.raises(AssertionError):
        check(drawn, p)
    check(np.random.default_rng(0).choice(3, 40_000, p=p), p)


class Bigram(nn.Module):
    """The next token depends on the last one alone: no caches, so that many rows are cheap.

    A table may have fewer rows than tokens, which then share them.
    """

    def __init__(self, table: np.ndarray) -> None:
        super().__init__()
        self.table = mx.array(table, mx.float32)

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        return self.table[tokens % len(self.table)]

    def make_cache(self) -> list[Any]:
        return []


def tables(vocabulary: int, drafts: int | None = None, scale: float = 1.5) -> list[np.ndarray]:
    """Logits of a target and of a draft that is like it, but not much."""
    rng = np.random.default_rng(vocabulary)
    target = rng.normal(size=(vocabulary, vocabulary)) * scale
    size = drafts or vocabulary
    draft = rng.normal(size=(size, size)) * scale
    common = min(size, vocabulary)
    draft[:common, :common] += target[:common, :common] / 2
    return [target, draft]


def rounds_of(
    target: np.ndarray,
    draft: np.ndarray | Translated,
    params: SamplingParams,
    kind: type[ModelDrafter] = ModelDrafter,
) -> FusedRound:
    sampler = Sampler(params.method(), target.shape[-1])
    model = draft if isinstance(draft, Translated) else Bigram(draft)
    drafter = kind(FusedModel(model), sampler.vocabulary)
    return FusedRound(FusedModel(Bigram(target)), {MODEL: drafter}, sampler, compiled=False)


def bigram_state(
    rows: int, params: SamplingParams, seed: int = 0, vocabulary: int = 8
) -> RoundState:
    """Rows that differ in nothing but their keys."""
    return RoundState(
        position=mx.full((rows,), 5, mx.int32),
        last_two=mx.full((rows, 2), FIRST, mx.int32),
        recent=mx.zeros((rows, 0), mx.int32),
        keys=mx.random.split(mx.random.key(seed), rows),
        knobs=knobs_of(params, rows, vocabulary),
        target=[],
        drafts={MODEL: Past([], mx.zeros((rows,), mx.int32))},
    )


def emitted(
    rounds: FusedRound | FromTheText | SideBySide, state: RoundState, count: int, draft_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` tokens of every row, and how many proposals its first round kept."""
    rows = state.position.shape[0]
    texts = np.full((rows, count), -1)
    written = np.zeros(rows, int)
    kept = None
    for _ in range(count):
        state, result = rounds(state, draft_tokens=draft_tokens, length=64)
        *committed, accepted = np.array(result).T
        for place, tokens in enumerate(committed):
            counts = (place <= accepted) & (written + place < count)
            texts[counts, written[counts] + place] = tokens[counts]
        written += accepted + 1
        kept = accepted if kept is None else kept
    assert kept is not None
    assert (texts >= 0).all()
    return texts, kept


def check_rounds(
    params: SamplingParams,
    *,
    draft_tokens: int = 2,
    count: int = 1,
    drafter: type[ModelDrafter] = ModelDrafter,
    logits: list[np.ndarray] | None = None,
) -> None:
    """Check the joint distribution of the first `count` tokens, vocabulary 8."""
    target, draft = logits or tables(8)
    rounds = rounds_of(target, draft, params, drafter)
    tokens, _ = emitted(rounds, bigram_state(40_000, params), count, draft_tokens)
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


def test_sampling_verifies_by_block_unless_told_otherwise() -> None:
    assert HOT.rule == "block"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("draft_tokens", [1, 3])
@pytest.mark.parametrize("params", PARAMETERS.values(), ids=PARAMETERS)
def test_next_token(params: SamplingParams, draft_tokens: int, rule: Verify) -> None:
    check_rounds(replace(params, verify=rule), draft_tokens=draft_tokens)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("draft_tokens", [0, 1, 2, 4])
def test_three_tokens_jointly(draft_tokens: int, rule: Verify) -> None:
    # Over several rounds: a key that is used twice ties their tokens to each other.
    check_rounds(replace(HOT, verify=rule), draft_tokens=draft_tokens, count=3)


@pytest.mark.parametrize("rule", RULES)
def test_one_row_alone(rule: Verify) -> None:
    # It draws what it draws among many, which the other tests compare with p.
    target, draft = tables(8)
    params = replace(HOT, verify=rule)
    rounds = rounds_of(target, draft, params)
    many = bigram_state(200, params)
    _, together = rounds(many, draft_tokens=2, length=64)
    one = bigram_state(1, params)
    alone = [
        rounds(one._replace(keys=key[None]), draft_tokens=2, length=64)[1] for key in many.keys
    ]
    assert mx.concatenate(alone).tolist() == together.tolist()


@pytest.mark.parametrize("rule", RULES)
def test_two_filtered_tokens_jointly(rule: Verify) -> None:
    check_rounds(replace(PARAMETERS["top_p"], verify=rule), count=2)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("drafts", [5, 11])
@pytest.mark.parametrize("params", [HOT, PARAMETERS["top_p"]], ids=["plain", "top_p"])
def test_draft_of_another_vocabulary(params: SamplingParams, drafts: int, rule: Verify) -> None:
    target, draft = tables(8, drafts)
    params = replace(params, verify=rule)
    tokens, kept = emitted(rounds_of(target, draft, params), bigram_state(40_000, params), 2, 3)
    check(joint_outcomes(tokens, 8), joint_p(target, params, 2))
    assert 0 < kept.mean() < 3


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("params", [HOT, PARAMETERS["top_p"]], ids=["plain", "top_p"])
def test_draft_of_another_tokenizer(params: SamplingParams, rule: Verify) -> None:
    # Eleven tokens in another order; two of the target's eight are not among them.
    target, draft = tables(8, 11)
    ids = np.random.default_rng(0).permutation(11)
    partners = {token: int(ids[token]) for token in range(8) if token not in (1, FIRST)}
    foreign = Translated(Bigram(draft[np.ix_(ids, ids)]), Shared(partners, {1: 3}, 0, 8), 8)
    params = replace(params, verify=rule)
    rounds = rounds_of(target, foreign, params)
    tokens, kept = emitted(rounds, bigram_state(40_000, params), 2, 3)
    check(joint_outcomes(tokens, 8), joint_p(target, params, 2))
    assert 0 < kept.mean() < 3


@pytest.mark.parametrize(
    ("rule", "params"),
    [
        *[(rule, HOT) for rule in RULES],
        ("block", SamplingParams(temperature=0.6, top_p=0.9)),
        ("block", SamplingParams(temperature=1.0, top_k=20)),
    ],
    ids=[*RULES, "block top_p", "block top_k"],
)
def test_vocabulary_of_500(params: SamplingParams, rule: Verify) -> None:
    check_large(replace(params, verify=rule), 500, rows=5000, draft_tokens=2)


# Few draws, which notice what is grossly wrong; `test_exact.py` bounds what rounding does.
@pytest.mark.parametrize(("rule", "draft_tokens"), [("token", 1), ("block", 2), ("coupled", 1)])
def test_vocabulary_of_50_000(rule: Verify, draft_tokens: int) -> None:
    params = replace(HOT, verify=rule)
    check_large(params, 50_000, rows=100, batches=2, draft_tokens=draft_tokens)


def check_large(
    params: SamplingParams, vocabulary: int, *, rows: int, batches: int = 1, draft_tokens: int = 1
) -> None:
    """Check the next token.

    The likely tokens one by one, the others by whether the draft overrates them: any partition
    is checked by the same bound, and with few parts it is tight.
    """
    target, draft = large_tables(vocabulary)
    p, q = (reference_p(table[FIRST], params) for table in (target, draft))
    rank = np.argsort(np.argsort(-p))
    part = np.where(rank < 12, rank, 12 + (q > p))
    rounds = rounds_of(target, draft, params)
    tokens = []
    for seed in range(batches):
        state = bigram_state(rows, params, seed, vocabulary)
        tokens.append(emitted(rounds, state, 1, draft_tokens)[0][:, 0])
    check(part[np.concatenate(tokens)], np.bincount(part, weights=p, minlength=14))


@cache
def large_tables(vocabulary: int) -> list[np.ndarray]:
    """Logits after each of four tokens, which the others share, with some likely tokens.

    Half the mass of the target is at the likely ones, and the draft overrates half of those.
    """
    rng = np.random.default_rng(0)
    target = rng.normal(size=(4, vocabulary))
    target[:, :20] += np.log(vocabulary / 20)
    draft = target + rng.normal(size=target.shape)
    draft[:, :10] += 2
    return [target, draft]


class FromTheText:
    """Rounds whose proposals are given: what a bigram table says is likely after the last token.

    As a chain does, every other round may be left to the model.
    """

    def __init__(self, rounds: FusedRound, table: np.ndarray, *, chained: bool) -> None:
        self._rounds = rounds
        self._best = mx.argmax(mx.array(table, mx.float32), axis=-1).astype(mx.int32)
        self._chained = chained
        self._calls = 0

    def __call__(
        self, state: RoundState, *, draft_tokens: int, length: int
    ) -> tuple[RoundState, mx.array]:
        self._calls += 1
        if self._chained and self._calls % 2 == 0:
            return self._rounds(state, draft_tokens=draft_tokens, length=length)
        likely = [state.last_two[:, 1]]
        for _ in range(draft_tokens):
            likely.append(self._best[likely[-1] % len(self._best)])
        given = mx.stack(likely[1:], axis=1)
        return self._rounds(state, draft_tokens=draft_tokens, length=length, given=given)


@pytest.mark.parametrize("chained", [False, True], ids=["alone", "in turns with a model"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("params", [HOT, PARAMETERS["all"]], ids=["plain", "all"])
def test_proposals_from_the_text(params: SamplingParams, rule: Verify, chained: bool) -> None:
    target, draft = tables(8)
    params = replace(params, verify=rule)
    rounds = FromTheText(rounds_of(target, draft, params), target, chained=chained)
    tokens, kept = emitted(rounds, bigram_state(40_000, params), 3, 3)
    check(joint_outcomes(tokens, 8), joint_p(target, params, 3))
    assert 0 < kept.mean() < 3


class SideBySide:
    """Rounds of rows that propose as many tokens as they like, in every other row the text's."""

    def __init__(self, rounds: FusedRound, table: np.ndarray) -> None:
        self._rounds = rounds
        self._best = mx.argmax(mx.array(table, mx.float32), axis=-1).astype(mx.int32)
        self._calls = 0

    def __call__(
        self, state: RoundState, *, draft_tokens: int, length: int
    ) -> tuple[RoundState, mx.array]:
        self._calls += 1
        rows = mx.arange(state.position.shape[0])
        limit = (rows // len(UNLIKE) + self._calls) % (draft_tokens + 1)
        first = self._best[state.last_two[:, 1]]
        given = mx.stack([first, *[self._best[first]] * (draft_tokens - 1)], axis=1)
        return self._rounds(
            state,
            draft_tokens=draft_tokens,
            length=length,
            given=given,
            limit=limit.astype(mx.int32),
            is_given=rows % 2 == 0,
        )


UNLIKE = (HOT, PARAMETERS["all"], replace(HOT, temperature=0.0))


def unlike_rounds(target: np.ndarray, draft: np.ndarray, rule: Verify) -> FusedRound:
    methods = [replace(one, verify=rule).method() for one in UNLIKE[:2]]
    rounds = rounds_of(target, draft, HOT)
    sampled = union(*methods)
    assert sampled is not None
    method = union(sampled, UNLIKE[2].method())
    assert method is not None
    return FusedRound(rounds.target, rounds.drafters, Sampler(method, 8), compiled=False)


def unlike_state(rows: int) -> RoundState:
    """Rows of three kinds in turns."""
    kinds = [knobs_of(one, rows // 3, 8) for one in UNLIKE]
    mixed = [mx.stack(arrays, axis=1) for arrays in zip(*kinds, strict=True)]
    knobs = Knobs._make(array.reshape(rows, *array.shape[2:]) for array in mixed)
    return bigram_state(rows, HOT)._replace(knobs=knobs)


@pytest.mark.parametrize("rule", RULES)
def test_three_unlike_rows_side_by_side(rule: Verify) -> None:
    """Sampled, sampled otherwise, and greedy, each with a number of proposals of its own."""
    target, draft = tables(8)
    target[:, 6] = target[:, 1] = target.max(axis=1)  # a greedy row takes the first of the best
    rounds = unlike_rounds(target, draft, rule)
    rows = 60_000
    tokens, kept = emitted(SideBySide(rounds, draft), unlike_state(rows), 2, 3)
    for kind, params in enumerate(UNLIKE[:2]):
        check(joint_outcomes(tokens[kind::3], 8), joint_p(target, params, 2))
        assert 0 < kept[kind::3].mean() < 3
    assert (tokens[2::3] == target[FIRST].argmax()).all()
    # As few as three rows draw what they draw among many.
    state = unlike_state(rows)
    few = state._replace(
        keys=state.keys[:3],
        knobs=Knobs(*(knob[:3] for knob in state.knobs)),
        position=state.position[:3],
        last_two=state.last_two[:3],
        recent=state.recent[:3],
        drafts={MODEL: Past([], mx.zeros((3,), mx.int32))},
    )
    assert emitted(SideBySide(rounds, draft), few, 2, 3)[0].tolist() == tokens[:3].tolist()


class TableHead:
    """A head that draws from a bigram table, and remembers nothing."""

    taps: tuple[str, ...] = ()
    most = 4

    def __init__(self, table: np.ndarray) -> None:
        self._table = mx.array(table, mx.float32)

    def begin(self, capacity: int) -> mx.array:
        return mx.zeros((1,))

    def propose(
        self, past: Any, last_two: Any, position: Any, picks: Picks, count: int, length: int
    ) -> Any:
        token = last_two[:, 1:]
        for _ in range(count):
            token = picks.pick(self._table[token % len(self._table)])
        return past

    def commit(self, past: Any, *_: Any) -> Any:
        return past


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("drafts", [8, 5])
def test_a_heads_proposals(drafts: int, rule: Verify) -> None:
    target, table = tables(8, drafts)
    params = replace(HOT, verify=rule)
    sampler = Sampler(params.method(), 8)
    head: Any = TableHead(table)
    cached = FusedModel(Bigram(target))
    rounds = FusedRound(cached, {MODEL: HeadDrafter(head)}, sampler, compiled=False)
    state = bigram_state(40_000, params)._replace(drafts={MODEL: mx.zeros((1,))})
    tokens, kept = emitted(rounds, state, 2, 3)
    check(joint_outcomes(tokens, 8), joint_p(target, params, 2))
    assert 0 < kept.mean() < 3


@pytest.mark.parametrize("rule", RULES)
def test_proposals_from_the_text_at_a_vocabulary_of_500(rule: Verify) -> None:
    params = replace(HOT, verify=rule)
    target, draft = large_tables(500)
    p = reference_p(target[FIRST], params)
    rounds = FromTheText(rounds_of(target, draft, params), target, chained=False)
    tokens = emitted(rounds, bigram_state(5000, params, vocabulary=500), 1, 2)[0][:, 0]
    part = np.minimum(np.argsort(np.argsort(-p)), 12)
    check(part[tokens], np.bincount(part, weights=p, minlength=13))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("params", [HOT, PARAMETERS["all"]], ids=["plain", "all"])
def test_as_many_proposals_are_kept_as_can_be(params: SamplingParams, rule: Verify) -> None:
    # Σ min(p, q) of the first ones. With coupled noise, token i is the best of both where every
    # other's exponential variate is the larger by max(pⱼ/pᵢ, qⱼ/qᵢ).
    # By Hoeffding, the bound of `check` for two outcomes holds.
    target, draft = tables(8)
    params = replace(params, verify=rule)
    _, kept = emitted(rounds_of(target, draft, params), bigram_state(40_000, params), 1, 1)
    p, q = (reference_p(table[FIRST], params) for table in (target, draft))
    expected = np.minimum(p, q).sum()
    if rule == "coupled":
        both = np.flatnonzero(np.minimum(p, q))
        expected = sum(1 / np.maximum(p / p[i], q / q[i]).sum() for i in both)
    check(kept, np.array([1 - expected, expected]))


def test_block_keeps_more_than_token() -> None:
    target, draft = tables(8)
    counts = []
    for rule in ("token", "block"):
        params = replace(HOT, verify=rule)
        state = bigram_state(40_000, params)
        counts.append(emitted(rounds_of(target, draft, params), state, 1, 4)[1])
    token, block = counts
    # Six standard errors: chance alone exceeds them once in 1e9.
    error = np.sqrt((token.var() + block.var()) / len(token))
    assert block.mean() - token.mean() > 6 * error


@pytest.mark.parametrize(
    ("rule", "params"),
    [*[(rule, HOT) for rule in RULES], ("block", PARAMETERS["top_p"])],
    ids=[*RULES, "block top_p"],
)
def test_models_with_caches(params: SamplingParams, rule: Verify) -> None:
    params = replace(params, verify=rule)
    target, draft = (flat_llama(seed, vocabulary=8) for seed in (0, 1))
    engine = Engine(target, draft, compiled=False)
    prompt, rows = [1, 4, 6], 256
    one = engine.prefilled(prompt)
    sampler = Sampler(params.method(), 8)
    drafter = ModelDrafter(FusedModel(draft), sampler.vocabulary)
    rounds = FusedRound(FusedModel(target), {MODEL: drafter}, sampler, compiled=False)
    many = RoundState(
        position=mx.repeat(one.position, rows),
        last_two=mx.repeat(one.last_two, rows, axis=0),
        recent=mx.repeat(one.recent, rows, axis=0),
        keys=mx.zeros((rows, 2), mx.uint32),
        knobs=knobs_of(params, rows, 8),
        target=stack([one.target] * rows),
        drafts={MODEL: Past(stack([one.drafts[MODEL].layers] * rows), mx.zeros((rows,), mx.int32))},
    )
    tokens = np.concatenate(
        [
            emitted(rounds, many._replace(keys=keys), 2, 2)[0]
            for keys in mx.random.split(mx.random.key(0), 8 * rows).reshape(8, rows, 2)
        ]
    )
    p = reference_p(np.array(target(mx.array([prompt]))[0, -1]), params)
    after = np.array(target(mx.array([[*prompt, token] for token in range(8)]))[:, -1])
    steps = np.stack([reference_p(logits, params) for logits in after])
    check(joint_outcomes(tokens, 8), (p[:, None] * steps).reshape(-1))


def flat_llama(seed: int, **changes: Any) -> Any:
    """A model that is less sure of itself than `build` makes them."""
    cached = build("llama", seed=seed, **changes)
    cached.model.norm.weight = cached.model.norm.weight * 0.4
    return cached


def test_greedy_keeps_what_agrees() -> None:
    best = np.array([[3, 1, 2, 5], [3, 1, 2, 5], [3, 1, 2, 5], [0, 0, 0, 7]])
    proposed = mx.array([[3, 1, 2], [3, 0, 2], [1, 1, 2], [0, 0, 1]], mx.int32)
    verdict = verify.greedy(mx.array(np.eye(8)[best], mx.float32), Draft(proposed, None))
    assert verdict.accepted.tolist() == [3, 1, 0, 2]
    assert verdict.next_token.tolist() == [5, 1, 3, 0]


@pytest.mark.parametrize("rule", [verify.TOKEN, verify.BLOCK], ids=["token", "block"])
def test_rounding_that_leaves_no_residual(rule: Rule) -> None:
    # p < q everywhere but for rounding, and a rejection: whatever is drawn must be possible.
    log_p = mx.array([[[-mx.inf, 0.0, -mx.inf]] * 2] * 3)
    draft = Draft(mx.zeros((3, 1), mx.int32), mx.array([[[0.0, 0.0, -mx.inf]]] * 3))
    acceptance = rule.accept(log_p, draft)
    assert mx.exp(acceptance.log_h).tolist() == [[0.0]] * 3
    following = rule.follow(log_p, draft, acceptance, mx.zeros((3,), mx.int32))
    assert mx.exp(following).tolist() == [[0.0, 1.0, 0.0]] * 3


# --- the coupled rule -----------------------------------------------------------------------


class Certain(nn.Module):
    """A model that is sure of one token, whatever stands before it."""

    def __init__(self, inner: Any, token: int) -> None:
        super().__init__()
        self.inner = inner
        self.token = token

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        logits = self.inner(tokens, cache=cache)
        return mx.where(mx.arange(logits.shape[-1]) == self.token, 1e9, logits)

    def make_cache(self) -> list[Any]:
        return make_prompt_cache(self.inner)


@cache
def flat_target() -> Any:
    return flat_llama(0, num_hidden_layers=1)


COUPLED_DRAFTS: dict[str, Callable[[], Any]] = {
    "the target": flat_target,
    "another model": lambda: flat_llama(1, num_hidden_layers=1),
    "inverted": lambda: Contrary(flat_target(), 1),
    "inverted at times": lambda: Contrary(flat_target(), 3),
    "a point mass": lambda: Certain(flat_target(), 7),
    "fewer tokens": lambda: flat_llama(0, vocabulary=40, num_hidden_layers=1),
}
TEXT = 16  # tokens of a text that is compared


def coupled_text(draft: Any, draft_tokens: int, seed: int) -> tuple[list[int], float | None]:
    result = Engine(flat_target(), draft, compiled=False).generate(
        prompt_of(5, vocabulary=40),
        max_tokens=TEXT,
        draft_tokens=draft_tokens,
        sampling=SamplingParams(temperature=1.0, verify="coupled", seed=seed),
    )
    return result.tokens, result.speculation.acceptance_rate


@cache
def undrafted_text(seed: int) -> list[int]:
    return coupled_text(None, 0, seed)[0]


@pytest.mark.parametrize("draft_tokens", range(1, 9))
@pytest.mark.parametrize("draft", COUPLED_DRAFTS)
def test_coupled_text_is_the_same_whatever_drafts(draft: str, draft_tokens: int) -> None:
    cached = COUPLED_DRAFTS[draft]()
    rates = []
    for seed in (draft_tokens, 2**63 + draft_tokens):
        tokens, rate = coupled_text(cached, draft_tokens, seed)
        assert tokens == undrafted_text(seed)
        rates.append(rate)
    if draft == "the target":
        assert rates == [1.0] * 2


def test_coupled_texts_of_other_seeds_differ() -> None:
    texts = {tuple(undrafted_text(seed)) for seed in range(1, 9)}
    assert len(texts) == 8
    rate = coupled_text(COUPLED_DRAFTS["inverted at times"](), 2, 1)[1]
    assert rate is not None
    assert 0 < rate < 1


def test_coupled_texts_depend_on_the_noise_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # Noise by the place in the round, not in the text: the comparison above can fail.
    target_noise = FusedRound._target_noise

    def by_place(self: FusedRound, state: RoundState, after: mx.array) -> mx.array:
        return target_noise(self, state._replace(position=state.position * 0), after)

    monkeypatch.setattr(FusedRound, "_target_noise", by_place)
    draft = COUPLED_DRAFTS["inverted at times"]()
    assert coupled_text(draft, 3, 1)[0] != coupled_text(None, 0, 1)[0]


def test_without_proposals_every_rule_says_the_same() -> None:
    texts = {
        tuple(
            Engine(flat_target(), compiled=False)
            .generate(
                prompt_of(5, vocabulary=40),
                max_tokens=TEXT,
                sampling=SamplingParams(temperature=1.0, verify=rule, seed=1),
            )
            .tokens
        )
        for rule in RULES
    }
    assert texts == {tuple(undrafted_text(1))}


# --- rules that are wrong -------------------------------------------------------------------


def one_proposal_rule(*, swapped: bool = False, residual: bool = True) -> Rule:
    """The token rule for one proposed token, right as it stands."""

    def accept(log_p: mx.array, draft: Draft) -> AcceptanceTests:
        assert draft.log_q is not None
        p, q = mx.exp(log_p[:, 0]), mx.exp(draft.log_q[:, 0])
        ratio = mx.take_along_axis(q / p if swapped else p / q, draft.tokens, axis=1)
        return AcceptanceTests(mx.log(ratio), mx.zeros(log_p.shape[:2]))

    def follow(log_p: mx.array, draft: Draft, _: AcceptanceTests, kept: mx.array) -> mx.array:
        assert draft.log_q is not None
        p, q = mx.exp(log_p[:, 0]), mx.exp(draft.log_q[:, 0])
        rest = mx.maximum(p - q, 0) if residual else p
        return mx.where(kept[:, None] == 1, log_p[:, 1], mx.log(rest))

    return Rule(accept, lambda passed: passed[:, 0].astype(mx.int32), follow)


def only_the_best() -> Rule:
    """Greedy verification."""

    def accept(log_p: mx.array, draft: Draft) -> AcceptanceTests:
        best = mx.argmax(log_p[:, :-1], axis=-1) == draft.tokens
        return AcceptanceTests(mx.where(best, 0.0, -mx.inf), mx.zeros(log_p.shape[:2]))

    def follow(log_p: mx.array, _d: Draft, _a: AcceptanceTests, kept: mx.array) -> mx.array:
        row = mx.take_along_axis(log_p, kept[:, None, None], axis=1)[:, 0]
        return mx.where(row == mx.max(row, axis=-1, keepdims=True), row, -mx.inf)

    return Rule(accept, verify.leading, follow)


def block_with_the_residual_of_token() -> Rule:
    def follow(
        log_p: mx.array, draft: Draft, acceptance: AcceptanceTests, kept: mx.array
    ) -> mx.array:
        weightless = acceptance._replace(log_weight=mx.zeros_like(acceptance.log_weight))
        return verify.follow_residual(log_p, draft, weightless, kept)

    return verify.BLOCK._replace(follow=follow)


def test_another_rule_that_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(round_module._RULES, "token", one_proposal_rule())
    params = replace(HOT, verify="token")
    check_rounds(params, draft_tokens=1)
    check_rounds(params, draft_tokens=1, count=2)


@pytest.mark.parametrize("name", ["token", "block"])
@pytest.mark.parametrize(
    "wrong",
    [one_proposal_rule(residual=False), one_proposal_rule(swapped=True), only_the_best()],
    ids=["draws from p after a rejection", "accepts with q / p", "verifies greedily"],
)
def test_wrong_rules_are_noticed(
    monkeypatch: pytest.MonkeyPatch, wrong: Rule, name: Verify
) -> None:
    monkeypatch.setitem(round_module._RULES, name, wrong)
    params = replace(HOT, verify=name)
    with pytest.raises(AssertionError):
        check_rounds(params, draft_tokens=1)
    with pytest.raises(AssertionError):
        check_large(params, 500, rows=5000)


@pytest.mark.parametrize(
    "wrong",
    [one_proposal_rule(swapped=True), only_the_best()],
    ids=["accepts with q / p", "verifies greedily"],
)
def test_wrong_rules_are_noticed_among_50_000(monkeypatch: pytest.MonkeyPatch, wrong: Rule) -> None:
    monkeypatch.setitem(round_module._RULES, "token", wrong)
    with pytest.raises(AssertionError):
        check_large(replace(HOT, verify="token"), 50_000, rows=100, batches=2)


def tables_that_need_the_weight() -> list[np.ndarray]:
    """Logits of a draft that proposes token 0 twice as often as the target has it.

    After it q is below p, but not below p / 2, for half of the tokens.
    """
    target, draft = tables(8)
    target[FIRST] = np.log([0.5, *[0.5 / 7] * 7])
    draft[FIRST] = np.log([0.93, *[0.01] * 7])
    target[0] = 0.0
    draft[0] = np.log([0.07, 0.07, 0.07, 0.07, 0.717, 0.001, 0.001, 0.001])
    return [target, draft]


def test_block_with_the_residual_of_token_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = tables_that_need_the_weight()
    check_rounds(HOT, count=2, logits=logits)
    monkeypatch.setitem(round_module._RULES, "block", block_with_the_residual_of_token())
    check_rounds(HOT, draft_tokens=1, count=2, logits=logits)  # of one token, they are the same
    with pytest.raises(AssertionError):
        check_rounds(HOT, count=2, logits=logits)


class Unfiltered(ModelDrafter):
    """Draws from q after the filter and reports q before it; of bigram models."""

    def propose(
        self,
        past: Any,
        last_two: mx.array,
        position: mx.array,
        picks: Picks,
        *rest: Any,
        **named: Any,
    ) -> Any:
        past = super().propose(past, last_two, position, picks, *rest, **named)
        before = mx.concatenate([last_two[:, 1:], *picks._tokens[:-1]], axis=1)
        picks._log_qs = [normalised(self.cached.model(before))]
        return past


@pytest.mark.parametrize("rule", ["token", "block"])
def test_q_of_before_the_filter_is_noticed(rule: Verify) -> None:
    params = replace(PARAMETERS["top_p"], verify=rule)
    with pytest.raises(AssertionError):
        check_rounds(params, draft_tokens=1, drafter=Unfiltered)
    # It is the filter that it is noticed by.
    check_rounds(replace(HOT, verify=rule), draft_tokens=1, drafter=Unfiltered)


# --- random numbers that are used twice -----------------------------------------------------


@pytest.mark.parametrize("rule", ["token", "block"])
def test_tests_with_the_noise_of_proposals_are_noticed(
    monkeypatch: pytest.MonkeyPatch, rule: Verify
) -> None:
    # As many tests as tokens: of the same key, another number of uniform ones is unlike.
    params = replace(HOT, verify=rule)
    check_rounds(params, draft_tokens=8)
    monkeypatch.setattr(noise, "ACCEPT_NOISE", noise.DRAFT_NOISE)
    with pytest.raises(AssertionError):
        check_rounds(params, draft_tokens=8)


@pytest.mark.parametrize("rule", ["token", "block"])
def test_proposals_with_the_noise_of_the_target_are_noticed(
    monkeypatch: pytest.MonkeyPatch, rule: Verify
) -> None:
    params = replace(HOT, verify=rule)
    monkeypatch.setattr(noise, "DRAFT_NOISE", noise.TARGET_NOISE)
    check_rounds(params, draft_tokens=1)
    with pytest.raises(AssertionError):
        check_rounds(params, draft_tokens=1, count=2)


@pytest.mark.parametrize("rule", RULES)
def test_noise_that_forgets_the_position_is_noticed(
    monkeypatch: pytest.MonkeyPatch, rule: Verify
) -> None:
    keys_of = noise.keys_of

    def without_position(rows: mx.array, stream: mx.array | int, positions: mx.array) -> mx.array:
        return keys_of(rows, stream, mx.zeros_like(positions))

    monkeypatch.setattr(noise, "keys_of", without_position)
    params = replace(HOT, verify=rule)
    check_rounds(params, draft_tokens=1)
    with pytest.raises(AssertionError):
        check_rounds(params, draft_tokens=1, count=3)


@pytest.mark.parametrize("rule", RULES)
def test_a_key_that_rows_share_is_noticed(monkeypatch: pytest.MonkeyPatch, rule: Verify) -> None:
    keys_of = noise.keys_of

    def of_the_first(rows: mx.array, stream: mx.array | int, positions: mx.array) -> mx.array:
        return keys_of(mx.broadcast_to(rows[:1], rows.shape), stream, positions)

    monkeypatch.setattr(noise, "keys_of", of_the_first)
    with pytest.raises(AssertionError):
        check_rounds(replace(HOT, verify=rule), draft_tokens=1)
