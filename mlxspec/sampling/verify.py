"""Which proposed tokens are kept, and what follows them: arrays in, a verdict out.

This module knows no model and draws no random numbers. There are B sequences, K proposed tokens
x₁ … x_K, and V tokens in the target's vocabulary. Row i (from 0) of the target's K + 1 rows is its
distribution after i proposed tokens, p_{i+1}; row i of the draft's K rows is q_{i+1}, the
distribution that x_{i+1} was drawn from.

A sampling rule has two parts, so that both can be enumerated and composed:

    accept   log h, [B, K]: how likely each proposed token is to pass its test, and how the tests'
             outcomes become the number of tokens kept
    follow   log w, [B, V], not normalised: the distribution of the token after those kept

Everything is computed in the dtype of log p, float32 in a round.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx


class Draft(NamedTuple):
    """A proposal: tokens int32 [B, K], and log q [B, K, V'], or None for a point mass.

    V' ≤ V: tokens past the draft's vocabulary count as q = 0.

    limit: int32 [B], the number of tokens that each row proposes, 0 … K, fixed before any was
        drawn; None is K for all. Tokens past it are there to fill the rectangle.
    certain: boolean [B], rows whose q is a point mass although log q has others; None is no row.
    """

    tokens: mx.array
    log_q: mx.array | None
    limit: mx.array | None = None
    certain: mx.array | None = None

    def within(self, outcomes: mx.array) -> mx.array:
        """Outcomes of tests, boolean [B, K], which fail past the limit."""
        if self.limit is None:
            return outcomes
        return outcomes & (mx.arange(outcomes.shape[1]) < self.limit[:, None])


class Verdict(NamedTuple):
    """`accepted` int32 [B], 0 … K tokens kept; `next_token` int32 [B], the target's own."""

    accepted: mx.array
    next_token: mx.array


class AcceptanceTests(NamedTuple):
    """The tests of a proposal: log h [B, K], and an array that `follow` needs, [B, K + 1].

    log_weight: log W after each number of kept tokens, which scales p in the residual.
    """

    log_h: mx.array
    log_weight: mx.array


class Rule(NamedTuple):
    """A sampling rule; see the module.

    accept: (log_p [B, K + 1, V], draft) to its tests.
    kept: outcomes of the tests, boolean [B, K], to the number of tokens kept, int32 [B].
    follow: (log_p, draft, acceptance, kept) to log w.
    """

    accept: Callable[[mx.array, Draft], AcceptanceTests]
    kept: Callable[[mx.array], mx.array]
    follow: Callable[[mx.array, Draft, AcceptanceTests, mx.array], mx.array]


def greedy(scores: mx.array, draft: Draft) -> Verdict:
    """Keep the leading tokens that equal the target's argmax; continue with its own argmax.

    With log p + Gumbel noise as scores, and a draft that chose by log q + the same noise, this is
    the coupled rule: every token is a draw from p (the Gumbel-max trick) and depends on the noise
    alone, whatever was proposed (Daliri et al., arXiv 2408.07978).

    Args:
        scores: [B, K + 1, V].
    """
    best = mx.argmax(scores, axis=-1).astype(mx.int32)
    if draft.tokens.shape[1] == 0:
        # Nothing is compared: a fused kernel without elements ends the process on CUDA.
        return Verdict(mx.zeros(best.shape[:1], mx.int32), best[:, 0])
    accepted = leading(draft.within(best[:, :-1] == draft.tokens))
    return Verdict(accepted, _pick(best, accepted))


def leading(kept: mx.array) -> mx.array:
    """How many of each row's first entries are true: int32 [B] from boolean [B, K]."""
    return mx.sum(mx.cumprod(kept.astype(mx.int32), axis=-1), axis=-1)


def last(kept: mx.array) -> mx.array:
    """The position of each row's last true entry, counted from 1, or 0 without one: int32 [B]."""
    return mx.max(kept * mx.arange(1, kept.shape[1] + 1), axis=-1).astype(mx.int32)


# --- token ------------------------------------------------------------------------------


def accept_token(log_p: mx.array, draft: Draft) -> AcceptanceTests:
    """Keep x while u < p(x) / q(x)."""
    log_h = mx.minimum(log_ratio(log_p, draft), 0)
    return AcceptanceTests(log_h, mx.zeros(log_p.shape[:2], log_p.dtype))


def follow_residual(
    log_p: mx.array, draft: Draft, acceptance: AcceptanceTests, kept: mx.array
) -> mx.array:
    """Log w: the residual max(W·p − q, 0) after a rejection, p itself without one."""
    log_p_row = _row(log_p, kept)
    if draft.tokens.shape[1] == 0:
        return log_p_row
    at = mx.minimum(kept, draft.tokens.shape[1] - 1)
    count = draft.tokens.shape[1] if draft.limit is None else draft.limit
    rejected = (kept < count)[:, None]
    is_token = mx.arange(log_p.shape[-1]) == _pick(draft.tokens, at)[:, None]
    without_token = mx.where(rejected & is_token, -mx.inf, log_p_row)
    if draft.log_q is None:
        return without_token
    log_weight = _pick(acceptance.log_weight, kept)[:, None]
    log_q_row = _padded(_row(draft.log_q, at), log_p.shape[-1])
    residual = mx.maximum(mx.exp(log_weight + log_p_row) - mx.exp(log_q_row), 0)
    # Where p and q are nearly equal, rounding may leave an empty residual.
    some = mx.max(residual, axis=-1, keepdims=True) > 0
    log_w = mx.where(rejected & some, mx.log(residual), log_p_row)
    return (
        log_w if draft.certain is None else mx.where(draft.certain[:, None], without_token, log_w)
    )


# Leviathan et al., arXiv 2211.17192, theorem 3.5; Chen et al., arXiv 2302.01318.
TOKEN = Rule(accept_token, leading, follow_residual)


# --- block ------------------------------------------------------------------------------


def accept_block(log_p: mx.array, draft: Draft) -> AcceptanceTests:
    """Test the whole block: keep up to the last i that passes (Sun et al., arXiv 2403.10444).

    W₀ = 1, Wᵢ = min(1, Wᵢ₋₁·pᵢ(xᵢ)/qᵢ(xᵢ)). For i < K, with S = Σ max(Wᵢ·pᵢ₊₁ − qᵢ₊₁, 0),
    hᵢ = S / (S + 1 − Wᵢ), where 0/0 counts as 1; and h_K = W_K.
    """
    # log W is a running sum capped at 0 at every step: subtract what its maximum exceeds 0 by.
    walk = mx.cumsum(log_ratio(log_p, draft), axis=-1)
    log_weight = walk - mx.maximum(mx.cummax(walk, axis=-1), 0)
    log_weight = mx.pad(log_weight, [(0, 0), (1, 0)])
    inner = log_weight[:, 1:-1]
    surplus = _surplus(log_p, draft, inner)
    whole = surplus - mx.expm1(inner)
    log_h = mx.where(whole > 0, mx.log(surplus) - mx.log(whole), 0)
    log_h = mx.concatenate([log_h, log_weight[:, -1:]], axis=1)
    if draft.limit is not None:
        is_end = mx.arange(1, log_h.shape[1] + 1) == draft.limit[:, None]
        log_h = mx.where(is_end, log_weight[:, 1:], log_h)
    return AcceptanceTests(log_h, log_weight)


def _surplus(log_p: mx.array, draft: Draft, log_weight: mx.array) -> mx.array:
    """S = Σ max(Wᵢ·pᵢ₊₁ − qᵢ₊₁, 0) for i = 1 … K − 1, from log Wᵢ: [B, K − 1] each."""
    drawn, is_certain = None, draft.certain
    if draft.log_q is not None:
        log_q = _padded(draft.log_q[:, 1:], log_p.shape[-1])
        over = mx.exp(log_weight[..., None] + log_p[:, 1:-1]) - mx.exp(log_q)
        drawn = mx.sum(mx.maximum(over, 0), axis=-1)
        if is_certain is None:
            return drawn
    chosen = mx.take_along_axis(log_p[:, 1:-1], draft.tokens[:, 1:, None], -1)[..., 0]
    certain = mx.exp(log_weight) * -mx.expm1(chosen)  # W·(1 − p(x))
    if drawn is None or is_certain is None:
        return certain
    return mx.where(is_certain[:, None], certain, drawn)


BLOCK = Rule(accept_block, last, follow_residual)


# --- relaxed ----------------------------------------------------------------------------


def relaxed(threshold: mx.array) -> Rule:
    """Keep x while p(x) ≥ threshold · max p. Not exact: the text is no longer the target's own.

    Typical acceptance (Cai et al., arXiv 2401.10774) with its simplest criterion.

    Args:
        threshold: [B].
    """

    def accept(log_p: mx.array, draft: Draft) -> AcceptanceTests:
        rows = log_p[:, :-1]
        chosen = mx.take_along_axis(rows, draft.tokens[..., None], -1)[..., 0]
        likely = chosen >= mx.max(rows, axis=-1) + mx.log(threshold)[:, None]
        log_h = mx.where(likely, mx.array(0, log_p.dtype), mx.array(-mx.inf, log_p.dtype))
        return AcceptanceTests(log_h, mx.zeros(log_p.shape[:2], log_p.dtype))

    def follow(log_p: mx.array, _d: Draft, _a: AcceptanceTests, kept: mx.array) -> mx.array:
        return _row(log_p, kept)

    return Rule(accept, leading, follow)


# --- shared -----------------------------------------------------------------------------


def log_ratio(log_p: mx.array, draft: Draft) -> mx.array:
    """log p(x)/q(x) of the proposed tokens, [B, K], below +inf so that it can be summed.

    It is -inf where p(x) = 0, and so is every sum that includes it.
    """
    chosen = draft.tokens[..., None]
    ratio = mx.take_along_axis(log_p[:, :-1], chosen, -1)[..., 0]
    if draft.log_q is not None:
        # A drafter with fewer tokens proposes none past them; what a text proposes is certain.
        known = mx.minimum(chosen, draft.log_q.shape[-1] - 1)
        log_q = mx.take_along_axis(draft.log_q, known, -1)[..., 0]
        ratio = ratio - (
            log_q if draft.certain is None else mx.where(draft.certain[:, None], 0, log_q)
        )
    return mx.minimum(ratio, 80)


def _padded(log_q: mx.array, vocabulary: int) -> mx.array:
    missing = vocabulary - log_q.shape[-1]
    if missing == 0:
        return log_q
    widths = [(0, 0)] * (log_q.ndim - 1) + [(0, missing)]
    return mx.pad(log_q, widths, constant_values=mx.array(-mx.inf, log_q.dtype))


def _pick(values: mx.array, index: mx.array) -> mx.array:
    return mx.take_along_axis(values, index[:, None], axis=1)[:, 0]


def _row(values: mx.array, index: mx.array) -> mx.array:
    return mx.take_along_axis(values, index[:, None, None], axis=1)[:, 0]
