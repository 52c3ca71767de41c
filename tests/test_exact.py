"""Every outcome of the sampling rules, added up: what they emit is the target's own distribution.

Toy models over 3 to 5 tokens whose next token depends on the last one or two. Every proposal that
a draft can make is judged by the rules' own functions in float64, and every outcome of their tests
is followed; so the joint distribution of the first emitted tokens is known, not estimated, and is
compared with the product of the target's conditional probabilities.

The coupled rule draws by Gumbel noise, which cannot be enumerated. What is shown of it here is
that whatever is proposed, each emitted token is the argmax of the target's scores: log p of its
place plus the noise of its place. That is a draw from p by the Gumbel-max trick as long as the
noise is Gumbel noise, unlike at unlike places, which `test_verify.py` checks by drawing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest

from mlxspec.sampling import verify
from mlxspec.sampling.verify import BLOCK, TOKEN, AcceptanceTests, Draft, Rule

TOLERANCE = 1e-12
NOTICED = 1e-6
RULES = {"token": TOKEN, "block": BLOCK}


@pytest.fixture(autouse=True)
def precise_exp(monkeypatch: pytest.MonkeyPatch) -> None:
    # MLX computes the exp of a float64 on a CPU with float32's precision, but not its expm1.
    exp = mx.exp

    def precise(x: mx.array) -> mx.array:
        return mx.expm1(x) + 1 if x.dtype == mx.float64 else exp(x)

    monkeypatch.setattr(mx, "exp", precise)


@pytest.fixture(autouse=True, scope="module")
def on_the_cpu() -> Iterator[None]:
    before = mx.default_device()
    mx.set_default_device(mx.cpu)  # the only one with float64
    yield
    mx.set_default_device(before)


# --- models ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A target and a draft: [V, V, V], p of the token that follows two others.

    Args:
        draft: [V', V', V'], V' ≤ V.
        told: the q that the rule is told, where it is not the one that is drawn from.
        certain: whether the draft proposes its likeliest token, as a point mass.
    """

    target: np.ndarray
    draft: np.ndarray
    told: np.ndarray | None = None
    certain: bool = False

    @property
    def vocabulary(self) -> int:
        return len(self.target)

    def q_after(self, text: np.ndarray, table: np.ndarray | None = None) -> np.ndarray:
        """q of the token after each row of texts; the draft is shown tokens that it has."""
        table = self.draft if table is None else table
        before, last = np.minimum(text[:, -2:], len(table) - 1).T
        return table[before, last]


def model(seed: int, vocabulary: int, order: int = 2) -> np.ndarray:
    rng = np.random.default_rng([seed, vocabulary])
    p = rng.dirichlet(np.full(vocabulary, 0.8), size=(vocabulary if order == 2 else 1, vocabulary))
    return np.broadcast_to(p, (vocabulary,) * 3)


def filtered(p: np.ndarray, top_p: float) -> np.ndarray:
    """Top-p: a token stays while those that are more likely do not reach it."""
    descending = -np.sort(-p, axis=-1)
    above = np.cumsum(descending, axis=-1) - descending
    least = np.min(np.where(above < top_p, descending, np.inf), axis=-1, keepdims=True)
    kept = np.where(p >= least, p, 0)
    return kept / kept.sum(axis=-1, keepdims=True)


def mixed(p: np.ndarray, q: np.ndarray, share: float) -> np.ndarray:
    return share * p + (1 - share) * q


def partly_equal(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """q, but p after every second token: weights of 1 and nothing left beside them."""
    even = (np.arange(len(p)) % 2 == 0)[None, :, None]
    return np.where(even, p, q)


def likeliest(p: np.ndarray) -> np.ndarray:
    return np.eye(p.shape[-1])[p.argmax(axis=-1)]


PAIRS = {
    "order 1": Pair(model(0, 4, order=1), model(1, 4, order=1)),
    "order 2, three tokens": Pair(model(0, 3), model(1, 3)),
    "order 2": Pair(model(2, 4), model(3, 4)),
    "order 2 by order 1": Pair(model(4, 4), model(5, 4, order=1)),
    "much alike": Pair(model(6, 4), mixed(model(6, 4), model(7, 4), 0.9)),
    "equal": Pair(model(8, 3), model(8, 3)),
    "equal at times": Pair(model(9, 4), partly_equal(model(9, 4), model(10, 4))),
    "both filtered": Pair(filtered(model(11, 5), 0.7), filtered(model(12, 5), 0.8)),
    "target filtered": Pair(filtered(model(13, 4), 0.5), model(14, 4)),
    "draft filtered": Pair(model(15, 4), filtered(model(16, 4), 0.5)),
    "target certain": Pair(likeliest(model(17, 3)), model(18, 3)),
    "unlikely proposals": Pair(model(19, 3), mixed(likeliest(model(20, 3)), model(19, 3), 1e-6)),
    "fewer tokens": Pair(model(21, 5), model(22, 3)),
    "fewer tokens, filtered": Pair(filtered(model(23, 5), 0.8), filtered(model(24, 4), 0.7)),
    "point mass": Pair(model(25, 4), model(26, 4), certain=True),
    "point mass, filtered": Pair(filtered(model(27, 4), 0.6), model(28, 4), certain=True),
    "point mass, fewer tokens": Pair(model(29, 5), model(30, 3), certain=True),
}
CERTAIN = [name for name, pair in PAIRS.items() if pair.certain]


# --- one round ------------------------------------------------------------------------------


class Proposals(NamedTuple):
    """All proposals after all contexts, as rows of one batch; N of them.

    text: [N, 2 + K], context and proposal. chance: [N], of the proposal after its context.
    p: [N, K + 1, V]. q: [N, K, V'], as the rule is told it, or None for a point mass.
    """

    text: np.ndarray
    chance: np.ndarray
    p: np.ndarray
    q: np.ndarray | None

    @property
    def context(self) -> np.ndarray:
        """The number of each row's context."""
        return self.text[:, 0] * self.p.shape[-1] + self.text[:, 1]

    @property
    def draft(self) -> Draft:
        log_q = None if self.q is None else in_float64(self.q)
        return Draft(mx.array(self.text[:, 2:], mx.int32), log_q)

    @property
    def log_p(self) -> mx.array:
        return in_float64(self.p)

    def rows(self, chosen: np.ndarray, count: int) -> Proposals:
        """Of the chosen rows the first `count` proposed tokens."""
        q = None if self.q is None else self.q[chosen, :count]
        text = self.text[chosen, : 2 + count]
        return Proposals(text, self.chance[chosen], self.p[chosen, : count + 1], q)


def in_float64(p: np.ndarray) -> mx.array:
    with np.errstate(divide="ignore"):
        return mx.array(np.log(p), mx.float64)


def proposals(pair: Pair, count: int) -> Proposals:
    size = pair.vocabulary
    text = np.array(list(itertools.product(range(size), repeat=2)))
    chance = np.ones(len(text))
    for _ in range(count):
        q = pair.q_after(text)
        q = likeliest(q) if pair.certain else q
        row, token = np.nonzero(q)  # what is never proposed has no log q
        text = np.column_stack([text[row], token])
        chance = chance[row] * q[row, token]
    places = range(count + 1)
    p = np.stack([pair.target[text[:, i], text[:, i + 1]] for i in places], axis=1)
    told = None
    if count and not pair.certain:
        rows = [pair.q_after(text[:, : 2 + i], pair.told) for i in range(count)]
        told = np.stack(rows, axis=1)
    return Proposals(text, chance, p, told)


def kept_chances(rule: Rule, acceptance: AcceptanceTests) -> np.ndarray:
    """How likely each row is to keep 0 … K tokens, [N, K + 1]."""
    passing = np.array(mx.exp(acceptance.log_h))
    rows, count = passing.shape
    chances = np.zeros((rows, count + 1))
    for outcome in itertools.product([False, True], repeat=count):
        kept = rule.kept(mx.array([outcome])).item()
        chances[:, kept] += np.where(outcome, passing, 1 - passing).prod(axis=-1)
    return chances


# From weights w, [N, V], to the distribution that is drawn from.
Normalise = Callable[[np.ndarray], np.ndarray]


def divided_by_their_sum(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum(axis=-1, keepdims=True)


def judged(
    rule: Rule, made: Proposals, normalise: Normalise = divided_by_their_sum
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """For each number of kept tokens: its chances [N], and the next token's distribution [N, V].

    Of rows that never keep so many, the distribution is 0.
    """
    count = made.text.shape[1] - 2
    if count == 0:  # as a round does: there is nothing to judge
        yield 0, np.ones(len(made.p)), made.p[:, 0]
        return
    log_p, draft = made.log_p, made.draft
    acceptance = rule.accept(log_p, draft)
    chances = kept_chances(rule, acceptance)
    for kept in range(count + 1):
        log_weights = rule.follow(log_p, draft, acceptance, mx.full(len(made.p), kept, mx.int32))
        following = np.zeros(made.p[:, 0].shape)
        there = chances[:, kept] > 0
        following[there] = normalise(np.array(mx.exp(log_weights))[there])
        yield kept, chances[:, kept], following


# For each number of kept tokens m, how likely each context is to be continued by the round with
# each text of m + 1 tokens: [V², V, …, V].
Committed = list[np.ndarray]


def committed(
    rule: Rule, made: Proposals, normalise: Normalise = divided_by_their_sum
) -> Committed:
    size = made.p.shape[-1]
    result = []
    for kept, chances, following in judged(rule, made, normalise):
        mass = np.zeros((size**2, size**kept, size))
        begun = made.text[:, 2 : 2 + kept] @ size ** np.arange(kept)[::-1].astype(int)
        mass_of_rows = (made.chance * chances)[:, None] * following
        np.add.at(mass, (made.context, begun), mass_of_rows)
        result.append(mass.reshape(size**2, *[size] * (kept + 1)))
    return result


def kept_by_context(rule: Rule, pair: Pair, count: int) -> np.ndarray:
    """How likely the first round after each context is to keep 0 … K tokens: [V², K + 1]."""
    masses = committed(rule, proposals(pair, count))
    return np.stack([mass.sum(axis=tuple(range(1, mass.ndim))) for mass in masses], axis=1)


# --- rows side by side ------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("rule", [TOKEN, BLOCK], ids=["token", "block"])
def test_a_row_is_judged_by_its_own_limit(rule: Rule, name: str) -> None:
    """As if the proposal ended there, whatever fills the rectangle past it."""
    count = 3
    made = proposals(PAIRS[name], count)
    chosen = np.random.default_rng(0).permutation(len(made.p))[:200]
    made = made.rows(chosen, count)
    limits = np.arange(len(made.p)) % (count + 1)
    draft = made.draft._replace(limit=mx.array(limits, mx.int32))
    acceptance = rule.accept(made.log_p, draft)
    outcomes = mx.ones((len(made.p), count), mx.bool_)
    assert rule.kept(draft.within(outcomes)).tolist() == limits.tolist()
    for limit in range(count + 1):
        rows = np.flatnonzero(limits == limit)
        alone = made.rows(rows, limit)
        tests = rule.accept(alone.log_p, alone.draft) if limit else None
        if tests is not None:
            found = np.exp(np.array(acceptance.log_h)[rows, :limit])
            np.testing.assert_allclose(found, np.exp(np.array(tests.log_h)), atol=1e-12)
        for kept in range(limit + 1):
            keeps = mx.full((len(made.p),), kept, mx.int32)
            log_w = rule.follow(made.log_p, draft, acceptance, keeps)
            found = np.exp(np.array(log_w))[rows]
            expected = alone.log_p[:, 0]
            if tests is not None:
                expected = rule.follow(alone.log_p, alone.draft, tests, keeps[: len(rows)])
            np.testing.assert_allclose(found, np.exp(np.array(expected)), atol=1e-12)


@pytest.mark.parametrize("name", [name for name in PAIRS if name not in CERTAIN])
@pytest.mark.parametrize("rule", [TOKEN, BLOCK], ids=["token", "block"])
def test_a_certain_row_stands_beside_drawn_ones(rule: Rule, name: str) -> None:
    count = 3
    made = proposals(PAIRS[name], count)
    chosen = np.random.default_rng(0).permutation(len(made.p))[:200]
    made = made.rows(chosen, count)
    is_certain = np.arange(len(made.p)) % 2 == 0
    mixed_draft = made.draft._replace(certain=mx.array(is_certain))
    point = made.draft._replace(log_q=None)
    for draft, rows in ((made.draft, ~is_certain), (point, is_certain)):
        expected = rule.accept(made.log_p, draft)
        found = rule.accept(made.log_p, mixed_draft)
        np.testing.assert_array_equal(np.array(found.log_h)[rows], np.array(expected.log_h)[rows])
        for kept in range(count + 1):
            keeps = mx.full((len(made.p),), kept, mx.int32)
            np.testing.assert_array_equal(
                np.array(rule.follow(made.log_p, mixed_draft, found, keeps))[rows],
                np.array(rule.follow(made.log_p, draft, expected, keeps))[rows],
            )


# --- many rounds ----------------------------------------------------------------------------

# K of the next round, from the text, context included, and how many the last round kept.
Policy = Callable[[tuple[int, ...], int], int]

POLICIES: dict[str, Policy] = {
    **{f"always {count}": lambda text, kept, count=count: count for count in range(1, 5)},
    "none after token 0": lambda text, kept: 0 if text[-1] == 0 else 3,
    "none after a rejection": lambda text, kept: 2 if kept == 2 or len(text) == 2 else 0,
    "one more than was kept": lambda text, kept: min(kept + 1, 4) if len(text) > 2 else 2,
    "fewer once many were kept": lambda text, kept: max(3 - kept, 0) if len(text) > 2 else 4,
    "by the last two tokens": lambda text, kept: (text[-1] + 2 * text[-2]) % 5,
}


def emitted(
    rounds: Callable[[int], Committed], policy: Policy, context: tuple[int, int], count: int
) -> np.ndarray:
    """The joint distribution of the first `count` tokens after a context: [V, …, V]."""
    size = rounds(1)[0].shape[-1]
    result = np.zeros((size,) * count)
    # By how many tokens there are: rounds only add to them.
    masses: list[dict[tuple[tuple[int, ...], int], float]] = [{} for _ in range(count)]
    masses[0][context, 0] = 1.0
    for written in range(count):
        missing = count - written
        for (text, last_kept), mass in masses[written].items():
            begun = text[2:]
            for kept, table in enumerate(rounds(policy(text, last_kept))):
                following = mass * table[text[-2] * size + text[-1]]
                if kept + 1 >= missing:  # what is past `count` is left out
                    result[begun] += following.sum(axis=tuple(range(missing, kept + 1)))
                    continue
                later = masses[written + kept + 1]
                for tokens in np.argwhere(following):
                    state = text + tuple(tokens.tolist()), kept
                    later[state] = later.get(state, 0.0) + following[tuple(tokens)]
    return result


def joint(target: np.ndarray, context: tuple[int, int], count: int) -> np.ndarray:
    """The target's own."""
    size = len(target)
    result = np.zeros((size,) * count)
    for tokens in itertools.product(range(size), repeat=count):
        text = context + tokens
        result[tokens] = np.prod([target[text[i : i + 3]] for i in range(count)])
    return result


def deviation(
    rounds: Callable[[int], Committed], pair: Pair, policy: Policy, count: int = 3
) -> float:
    """The largest error of a joint probability of the first `count` tokens, after any context."""
    contexts = itertools.product(range(pair.vocabulary), repeat=2)
    return max(
        np.abs(emitted(rounds, policy, context, count) - joint(pair.target, context, count)).max()
        for context in contexts
    )


def rounds_of(
    rule: Rule, pair: Pair, normalise: Normalise = divided_by_their_sum
) -> Callable[[int], Committed]:
    """Rounds of every K, each enumerated when it is first asked for."""
    return cache(lambda count: committed(rule, proposals(pair, count), normalise))


# --- the rules as they are ------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("pair", PAIRS)
def test_three_tokens_are_distributed_as_the_target_has_them(pair: str, rule: str) -> None:
    rounds = rounds_of(RULES[rule], PAIRS[pair])
    for name, policy in POLICIES.items():
        assert deviation(rounds, PAIRS[pair], policy) < TOLERANCE, name


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("pair", [name for name in PAIRS if PAIRS[name].vocabulary == 3])
def test_so_are_all_the_tokens_of_a_round_and_those_after_it(pair: str, rule: str) -> None:
    rounds = rounds_of(RULES[rule], PAIRS[pair])
    for count in range(1, 5):
        policy = POLICIES[f"always {count}"]
        assert deviation(rounds, PAIRS[pair], policy, count=count + 2) < TOLERANCE


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("pair", ["both filtered", "fewer tokens", "point mass"])
def test_rows_are_judged_alone(pair: str, rule: str) -> None:
    # The enumeration has every context and proposal as a row of one call.
    made = proposals(PAIRS[pair], 2)
    together = list(judged(RULES[rule], made))
    for row in np.random.default_rng(0).integers(len(made.p), size=10):
        alone = judged(RULES[rule], made.rows(np.array([row]), 2))
        for (_, chances, following), (_, chance, distribution) in zip(together, alone, strict=True):
            np.testing.assert_array_equal(chances[row], chance[0])
            np.testing.assert_array_equal(following[row], distribution[0])


@pytest.mark.parametrize("count", range(1, 5))
@pytest.mark.parametrize("pair", PAIRS)
def test_block_keeps_no_fewer_than_token(pair: str, count: int) -> None:
    token, block = (
        kept_by_context(rule, PAIRS[pair], count) @ np.arange(count + 1) for rule in (TOKEN, BLOCK)
    )
    assert (block >= token - TOLERANCE).all()
    if count == 1:
        np.testing.assert_allclose(block, token, atol=TOLERANCE, rtol=0)
    elif pair in ("order 1", "order 2", "much alike"):
        assert (block > token + 1e-3).any()


@pytest.mark.parametrize("count", range(1, 5))
@pytest.mark.parametrize("pair", CERTAIN)
def test_of_a_point_mass_both_keep_as_many(pair: str, count: int) -> None:
    token, block = (kept_by_context(rule, PAIRS[pair], count) for rule in (TOKEN, BLOCK))
    np.testing.assert_allclose(block, token, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("pair", CERTAIN)
def test_a_point_mass_is_a_q_of_zeros_and_a_one(pair: str, rule: str) -> None:
    certain = PAIRS[pair]
    sampled = replace(certain, draft=likeliest(certain.draft), certain=False)
    for count in (1, 3):
        masses = (committed(RULES[rule], proposals(some, count)) for some in (certain, sampled))
        for ours, theirs in zip(*masses, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("pair", PAIRS)
def test_token_keeps_the_first_one_as_often_as_can_be(pair: str) -> None:
    ours = PAIRS[pair]
    size = ours.vocabulary
    contexts = np.array(list(itertools.product(range(size), repeat=2)))
    q = ours.q_after(contexts)
    q = likeliest(q) if ours.certain else q
    p = ours.target.reshape(size**2, size)[:, : q.shape[-1]]
    for count in range(1, 5):
        kept = kept_by_context(TOKEN, ours, count)[:, 1:].sum(axis=-1)
        np.testing.assert_allclose(kept, np.minimum(p, q).sum(axis=-1), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("distance", [0.0, 1e-6, 1e-3, 1.0, 10.0])
def test_float32_is_enough_for_50_000_tokens(distance: float, rule: str) -> None:
    # Of one proposal: every token's test, and the one residual that follows a rejection.
    size = 50_000
    rng = np.random.default_rng(0)
    logits = rng.normal(size=size) * 3
    log_p, log_q = (
        mx.array(values - np.log(np.exp(values).sum()), mx.float32)
        for values in (logits, logits + rng.normal(size=size) * distance)
    )

    def batch(rows: int) -> tuple[mx.array, mx.array]:
        return mx.broadcast_to(log_p, (rows, 2, size)), mx.broadcast_to(log_q, (rows, 1, size))

    p_rows, q_rows = batch(size)
    draft = Draft(mx.arange(size)[:, None], q_rows)
    log_h = RULES[rule].accept(p_rows, draft).log_h
    p_rows, q_rows = batch(1)
    draft = Draft(mx.zeros((1, 1), mx.int32), q_rows)
    acceptance = RULES[rule].accept(p_rows, draft)
    log_weights = RULES[rule].follow(p_rows, draft, acceptance, mx.zeros((1,), mx.int32))[0]
    p, q, h, weights = (
        np.exp(np.array(values, np.float64)) for values in (log_p, log_q, log_h[:, 0], log_weights)
    )
    p, q = p / p.sum(), q / q.sum()
    drawn = q * h + (q * (1 - h)).sum() * weights / weights.sum()
    assert np.abs(drawn - p).sum() / 2 < 1e-6


# --- the coupled rule -----------------------------------------------------------------------


def best_text(pair: Pair, noise: np.ndarray, context: tuple[int, int]) -> tuple[int, ...]:
    """The target's text by Gumbel-max, one token after another, of noise [N, V] by place."""
    text = context
    with np.errstate(divide="ignore"):
        for at_place in noise:
            text += (int(np.argmax(np.log(pair.target[text[-2:]]) + at_place)),)
    return text


def coupled_continuation(
    pair: Pair, noise: np.ndarray, text: tuple[int, ...], count: int
) -> list[tuple[int, ...]]:
    """What a round commits after `text`, for each of all the proposals of `count` tokens."""
    written = len(text) - 2
    size = pair.vocabulary
    proposed = np.array(list(itertools.product(range(size), repeat=count)), int)
    proposed = proposed.reshape(size**count, count)
    rows = np.column_stack([np.tile(text[-2:], (len(proposed), 1)), proposed])
    p = np.stack([pair.target[rows[:, i], rows[:, i + 1]] for i in range(count + 1)], axis=1)
    scores = in_float64(p) + mx.array(noise[written : written + count + 1], mx.float64)
    verdict = verify.greedy(scores, Draft(mx.array(proposed, mx.int32), None))
    verdicts = zip(proposed.tolist(), *(part.tolist() for part in verdict), strict=True)
    return [(*tokens[:accepted], last) for tokens, accepted, last in verdicts]


@pytest.mark.parametrize("pair", ["order 1", "order 2", "both filtered", "target certain"])
def test_coupled_text_is_the_best_by_the_noise_whatever_is_proposed(pair: str) -> None:
    ours = PAIRS[pair]
    longest = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        noise = rng.gumbel(size=(3 + 5, ours.vocabulary))
        context = tuple(rng.integers(ours.vocabulary, size=2).tolist())
        expected = best_text(ours, noise, context)
        # Whatever a round commits is the text's own, so the next one begins at a place of it:
        # every rule of how many to propose next is covered by every K at every place.
        for written, count in itertools.product(range(3), range(5)):
            text = expected[: 2 + written]
            for tokens in coupled_continuation(ours, noise, text, count):
                assert tokens == expected[len(text) : len(text) + len(tokens)]
                longest = max(longest, len(tokens))
    assert longest == 5


# --- rules that are wrong -------------------------------------------------------------------


def worst(
    rule: Rule, pairs: list[Pair] | None = None, normalise: Normalise = divided_by_their_sum
) -> float:
    """The deviation that is found in all of the pairs, by rounds of 2 and of 3."""
    pairs = [PAIRS["order 1"], PAIRS["order 2"]] if pairs is None else pairs
    return min(
        deviation(rounds_of(rule, pair, normalise), pair, POLICIES[f"always {count}"])
        for pair in pairs
        for count in (2, 3)
    )


@pytest.mark.parametrize("rule", RULES)
def test_a_residual_that_does_not_add_up_is_noticed(rule: str) -> None:
    def missing_to_token_0(weights: np.ndarray) -> np.ndarray:
        weights = weights.copy()
        weights[:, 0] += 1 - weights.sum(axis=-1)
        return weights

    assert worst(RULES[rule], normalise=missing_to_token_0) > NOTICED


def with_weights_of(rule: Rule, other: Rule) -> Rule:
    """A rule whose residual is scaled as the other's is."""

    def follow(
        log_p: mx.array, draft: Draft, acceptance: AcceptanceTests, kept: mx.array
    ) -> mx.array:
        weights = other.accept(log_p, draft).log_weight
        return rule.follow(log_p, draft, acceptance._replace(log_weight=weights), kept)

    return rule._replace(follow=follow)


@pytest.mark.parametrize(("rule", "other"), [(BLOCK, TOKEN), (TOKEN, BLOCK)], ids=RULES)
def test_the_residual_of_another_rule_is_noticed(rule: Rule, other: Rule) -> None:
    assert worst(with_weights_of(rule, other)) > NOTICED
    assert worst(with_weights_of(rule, rule)) < TOLERANCE


def test_the_tests_of_another_rule_are_noticed() -> None:
    # The token rule's tests are of one token each: without the weight of those before it.
    def accept(log_p: mx.array, draft: Draft) -> AcceptanceTests:
        weights = BLOCK.accept(log_p, draft).log_weight
        return TOKEN.accept(log_p, draft)._replace(log_weight=weights)

    assert worst(BLOCK._replace(accept=accept)) > NOTICED


def test_block_without_its_last_weight_is_noticed() -> None:
    def accept(log_p: mx.array, draft: Draft) -> AcceptanceTests:
        right = BLOCK.accept(log_p, draft)
        alone = TOKEN.accept(log_p, draft).log_h[:, -1:]
        return right._replace(log_h=mx.concatenate([right.log_h[:, :-1], alone], axis=1))

    assert worst(BLOCK._replace(accept=accept)) > NOTICED


@pytest.mark.parametrize(
    ("rule", "kept"), [(BLOCK, verify.leading), (TOKEN, verify.last)], ids=RULES
)
def test_counting_as_another_rule_does_is_noticed(
    rule: Rule, kept: Callable[[mx.array], mx.array]
) -> None:
    assert worst(rule._replace(kept=kept)) > NOTICED


@pytest.mark.parametrize("rule", RULES)
def test_q_of_before_the_filter_is_noticed(rule: str) -> None:
    target, draft = (model(seed, 4) for seed in (40, 41))
    wrong = Pair(filtered(target, 0.7), filtered(draft, 0.7), told=draft)
    assert worst(RULES[rule], [wrong]) > NOTICED
    assert worst(RULES[rule], [replace(wrong, told=wrong.draft)]) < TOLERANCE


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("pair", ["order 1", "order 2"])
def test_dropping_tokens_for_their_own_q_is_noticed(pair: str, rule: str) -> None:
    # What decides K must be known before the token is drawn.
    ours = PAIRS[pair]

    @cache
    def rounds(count: int) -> Committed:
        made = proposals(ours, count)
        assert made.q is not None
        proposed = made.text[:, 2:, None]
        likely = np.take_along_axis(made.q, proposed, axis=-1)[..., 0] >= 0.3
        left = np.cumprod(likely, axis=-1).sum(axis=-1)
        size = ours.vocabulary
        total = [np.zeros((size**2, *[size] * (kept + 1))) for kept in range(count + 1)]
        for fewer in range(count + 1):
            for kept, mass in enumerate(committed(RULES[rule], made.rows(left == fewer, fewer))):
                total[kept] += mass
        return total

    for count in (1, 2, 3):
        assert deviation(rounds, ours, POLICIES[f"always {count}"]) > NOTICED
