"""The acceptance rate from which on speculation pays, given what its rounds cost. No MLX.

A round that proposes K tokens, of which each is accepted at the rate α where those before it were,
commits N(α, K) = 1 + α + … + αᴷ tokens on average (Leviathan, Kalman and Matias, "Fast Inference
from Transformers via Speculative Decoding", arXiv 2211.17192, equation 1). Their theorem 3.8 gives
the speed-up N(α, K)/(Kc + 1), where c is a draft step over a pass of the target, and where a pass
over K + 1 rows takes no longer than one over a single row. Here the measured C(K)/C(0), the time of
such a round over that of a plain one, stands in place of Kc + 1; so K pays where
N(α, K) > C(K)/C(0).
"""

from __future__ import annotations

from collections.abc import Mapping

_STEPS = 50  # of the bisection: far finer than any measurement


def tokens_per_round(rate: float, draft_tokens: int) -> float:
    """N(α, K), from 1 to K + 1."""
    return sum(rate**count for count in range(draft_tokens + 1))


def pays_above(cost: float, draft_tokens: int) -> float | None:
    """The acceptance rate above which K pays.

    Args:
        cost: C(K)/C(0).

    Returns:
        0 where it pays at any rate, and None where it never does.
    """
    if cost <= 1:
        return 0.0
    if cost >= draft_tokens + 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if tokens_per_round(middle, draft_tokens) < cost:
            low = middle
        else:
            high = middle
    return high


def best(costs: Mapping[int, float], rate: float) -> tuple[int, float]:
    """The K with the largest speed-up at an acceptance rate, and that speed-up; (0, 1) for none.

    Args:
        costs: C(K)/C(0) by K.
    """
    gains = {count: tokens_per_round(rate, count) / cost for count, cost in costs.items()}
    return max([(0, 1.0), *gains.items()], key=lambda one: one[1])
