"""Log-probabilities of the tokens that a round commits, and of the likeliest ones in their places.

They are the target's own: the log-softmax of its logits in float32, before processors, biases,
penalties, filters and temperature. They come to the host as bits behind the round's result, so that
it waits for one array. None of this is part of a round's graph: any number of alternatives goes
with one graph, and none needs a kernel of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlxspec.metrics import Logprob


def with_logprobs(result: mx.array, logits: mx.array, top: int) -> mx.array:
    """A round's result, with what `logprobs_in` reads behind it.

    Args:
        result: int32 [B, K + 2], as `FusedRound` returns it.
        logits: [B, K + 1, V], of any floating dtype.
        top: N, the number of alternatives.

    Returns:
        int32 [B, K + 2 + (K + 1)(1 + 2N)], with at most V in place of N: for each token the bits of
        its log-probability, the ids of the N likeliest ones in any order, and the bits of theirs.
    """
    total = mx.logsumexp(logits.astype(mx.float32), axis=-1, keepdims=True)

    def of(tokens: mx.array) -> mx.array:
        chosen = mx.take_along_axis(logits, tokens, axis=-1)
        return (chosen.astype(mx.float32) - total).view(mx.int32)

    parts = [of(result[:, :-1, None])]
    if count := min(top, logits.shape[-1]):
        best = mx.argpartition(logits, kth=-count, axis=-1)[..., -count:].astype(mx.int32)
        parts += [best, of(best)]
    told = mx.concatenate(parts, axis=-1)
    return mx.concatenate([result, told.reshape(len(result), -1)], axis=1)


def logprobs_in(result: Sequence[int], draft_tokens: int, top: int | None) -> tuple[Logprob, ...]:
    """The log-probabilities of a row's K + 1 tokens, of which those that are not committed mean
    nothing; none where nobody asks.

    Args:
        result: a row of what `with_logprobs` returns. draft_tokens: K of the round.
        top: the number of alternatives to tell, at most N; None asks for nothing.
    """
    if top is None:
        return ()
    bits = np.array(result[draft_tokens + 2 :], np.int32).reshape(draft_tokens + 1, -1)
    count = bits.shape[1] // 2
    values = bits.view(np.float32)
    return tuple(
        Logprob(token, own, tuple(sorted(zip(ids, theirs, strict=True), key=_likeliest)[:top]))
        for token, own, ids, theirs in zip(
            result,
            values[:, 0].tolist(),
            bits[:, 1 : 1 + count].tolist(),
            values[:, 1 + count :].tolist(),
            strict=False,
        )
    )


def _likeliest(alternative: tuple[int, float]) -> tuple[float, int]:
    """What alternatives are sorted by; of two that are equally likely argmax takes the first."""
    token, logprob = alternative
    return -logprob, token
