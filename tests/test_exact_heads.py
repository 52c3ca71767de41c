"""Heads that propose a block in one pass, with every outcome added up, as in `test_exact.py`.

Their q has another form than a model's. In a block of one pass (DFlash) q of a token depends on the
text before the block and on the token's place, and not on the tokens proposed before it; with a
Markov head (DSpark) on the one before it too; and a confidence may end a proposal, by the tokens
before its end.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache

import mlx.core as mx
import numpy as np
import pytest
from test_exact import (  # noqa: F401 (two of them are fixtures of the module)
    RULES,
    TOLERANCE,
    Committed,
    Pair,
    Proposals,
    deviation,
    kept_chances,
    model,
    on_the_cpu,
    precise_exp,
)

from mlxspec.sampling.verify import Draft, Rule

V = 3
TARGET = model(2, V)
# q of the token at a place of a block: of the two tokens before the block, the place, and the token
# before, as a table [V, V, place, V, V].
Head = np.ndarray
# How many tokens of a proposal are worth it: of the two tokens before it, and of itself.
Limit = Callable[[np.ndarray], int]

RNG = np.random.default_rng(5)
BLOCK_OF_ONE_PASS = np.broadcast_to(
    RNG.dirichlet(np.full(V, 0.7), size=(V, V, 3, 1)), (V, V, 3, V, V)
)
MARKOV = RNG.dirichlet(np.full(V, 0.7), size=(V, V, 3, V))
ALIKE = 0.8 * TARGET[None, :, None] + 0.2 * MARKOV
HEADS = {"one pass": BLOCK_OF_ONE_PASS, "Markov": MARKOV, "much alike": ALIKE}


def always(text: np.ndarray) -> int:
    return 3


def by_the_text_before(text: np.ndarray) -> int:
    return int(text[0] + 2 * text[1]) % 4


def until_a_zero(text: np.ndarray) -> int:
    """It ends behind the first 0 that is proposed."""
    zeros = np.flatnonzero(text[2:] == 0)
    return min(len(text) - 2, int(zeros[0]) + 1 if len(zeros) else 3)


def before_a_zero(text: np.ndarray) -> int:
    """What no drafter may do: it looks at the token that it then leaves out."""
    zeros = np.flatnonzero(text[2:] == 0)
    return min(len(text) - 2, int(zeros[0]) if len(zeros) else 3)


LIMITS = [always, by_the_text_before, until_a_zero]


def proposals(head: Head, count: int) -> Proposals:
    texts = np.array(list(itertools.product(range(V), repeat=2 + count)))
    first, second = texts[:, 0], texts[:, 1]
    q = np.stack(
        [head[first, second, place, texts[:, 1 + place]] for place in range(count)], axis=1
    )
    drawn = np.take_along_axis(q, texts[:, 2:, None], axis=-1)[..., 0]
    p = np.stack([TARGET[texts[:, i], texts[:, i + 1]] for i in range(count + 1)], axis=1)
    return Proposals(texts, drawn.prod(axis=1), p, q)


def committed(rule: Rule, made: Proposals, limit: Limit) -> Committed:
    """As in `test_exact.py`, but each proposal ends where its limit says."""
    count = made.text.shape[1] - 2
    limits = np.minimum([limit(text) for text in made.text], count)
    draft = Draft(*made.draft[:2], limit=mx.array(limits, mx.int32))
    acceptance = rule.accept(made.log_p, draft)
    within = np.arange(count) < limits[:, None]
    tests = mx.where(mx.array(within), acceptance.log_h, mx.array(-np.inf, mx.float64))
    chances = kept_chances(rule, acceptance._replace(log_h=tests))
    result = []
    for kept in range(count + 1):
        keeps = mx.full((len(limits),), kept, mx.int32)
        weights = np.array(mx.exp(rule.follow(made.log_p, draft, acceptance, keeps)))
        there = chances[:, kept] > 0
        following = np.zeros_like(weights)
        following[there] = weights[there] / weights[there].sum(axis=-1, keepdims=True)
        mass = np.zeros((V**2, V**kept, V))
        begun = made.text[:, 2 : 2 + kept] @ V ** np.arange(kept)[::-1].astype(int)
        of_rows = (made.chance * chances[:, kept])[:, None] * following
        np.add.at(mass, (made.context, begun), of_rows)
        result.append(mass.reshape(V**2, *[V] * (kept + 1)))
    return result


def worst(rule: str, head: Head, limit: Limit, count: int) -> float:
    rounds = cache(lambda k: committed(RULES[rule], proposals(head, k), limit))
    return deviation(rounds, Pair(TARGET, TARGET), lambda text, kept: count, count=3)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("limit", LIMITS, ids=lambda one: one.__name__)
def test_what_is_written_is_distributed_as_the_target_has_it(
    limit: Limit, head: str, rule: str
) -> None:
    for count in (1, 2, 3):
        assert worst(rule, HEADS[head], limit, count) < TOLERANCE


@pytest.mark.parametrize("rule", RULES)
def test_a_limit_that_looks_at_what_it_leaves_out_shows(rule: str) -> None:
    assert worst(rule, MARKOV, before_a_zero, 3) > 1e-3
