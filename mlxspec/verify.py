"""Which proposed tokens are kept, and what follows them: arrays in, a verdict out.

Knows no model. B sequences, K proposed tokens, V tokens of the target's vocabulary; row i of the
target's N = K + 1 rows is its distribution after i proposed tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx


class Draft(NamedTuple):
    """A proposal: tokens int32 [B, K], and log q float32 [B, K, V'], or None for a point mass."""

    tokens: mx.array
    log_q: mx.array | None


class Verdict(NamedTuple):
    """`accepted` int32 [B], 0 … K tokens kept; `next_token` int32 [B], the target's own."""

    accepted: mx.array
    next_token: mx.array


def greedy(logits: mx.array, draft: Draft) -> Verdict:
    """Keep the tokens that are the target's most likely ones; continue with its own.

    Args:
        logits: [B, K + 1, V].
    """
    best = mx.argmax(logits, axis=-1).astype(mx.int32)
    accepted = _leading(best[:, :-1] == draft.tokens)
    return Verdict(accepted, _pick(best, accepted))


def token_rule(log_p: mx.array, draft: Draft, key: mx.array) -> Verdict:
    """Accept xᵢ with probability min(1, p/q), then draw from norm(max(p − q, 0)).

    The joint distribution of what is kept is the target's own (Leviathan et al., arXiv
    2211.17192, theorem 3.5; Chen et al., arXiv 2302.01318). After K kept tokens the next one is
    drawn from p itself.

    Args:
        log_p: float32 [B, K + 1, V], normalised.
        draft: with log_q over the first V' ≤ V tokens; the others count as q = 0.
        key: a random key.
    """
    batch, rows, vocabulary = log_p.shape
    count = rows - 1
    accept_key, next_key = mx.random.split(key)
    if count == 0:
        return Verdict(mx.zeros((batch,), mx.int32), _draw(log_p[:, 0], next_key))
    assert draft.log_q is not None
    log_q = mx.pad(
        draft.log_q,
        [(0, 0), (0, 1), (0, vocabulary - draft.log_q.shape[-1])],
        constant_values=mx.array(-mx.inf),
    )
    chosen = draft.tokens[..., None]
    ratio = mx.take_along_axis(log_p[:, :-1], chosen, -1) - mx.take_along_axis(
        log_q[:, :-1], chosen, -1
    )
    log_u = mx.log(mx.random.uniform(shape=(batch, count), key=accept_key))
    accepted = _leading(log_u < ratio[..., 0])
    log_residual = _log_residual(_row(log_p, accepted), _row(log_q, accepted))
    return Verdict(accepted, _draw(log_residual, next_key))


def _log_residual(log_p: mx.array, log_q: mx.array) -> mx.array:
    """log max(p − q, 0), not normalised, [B, V]; log p where rounding leaves nothing of it."""
    residual = mx.maximum(mx.exp(log_p) - mx.exp(log_q), 0)
    empty = mx.max(residual, axis=-1, keepdims=True) == 0
    return mx.where(empty, log_p, mx.log(residual))


def _draw(log_weights: mx.array, key: mx.array) -> mx.array:
    return mx.random.categorical(log_weights, key=key).astype(mx.int32)


def _leading(kept: mx.array) -> mx.array:
    """How many of each row's first entries are true: int32 [B] from boolean [B, K]."""
    return mx.sum(mx.cumprod(kept.astype(mx.int32), axis=-1), axis=-1)


def _pick(tokens: mx.array, index: mx.array) -> mx.array:
    return mx.take_along_axis(tokens, index[:, None], axis=1)[:, 0]


def _row(values: mx.array, index: mx.array) -> mx.array:
    return mx.take_along_axis(values, index[:, None, None], axis=1)[:, 0]
