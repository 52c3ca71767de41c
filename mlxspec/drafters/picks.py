"""How a drafter in a round's graph picks its tokens."""

from __future__ import annotations

import mlx.core as mx

from mlxspec.sampling.sampler import Knobs, Sampler, uniform_if_broken
from mlxspec.sampling.verify import Draft


class Picks:
    """Picks the tokens of a proposal in order, the way the target's own are picked.

    Args:
        recent: int32 [B, W], the last tokens of the text, as many as a penalty looks back on.
        noise: float32 [B, K, V], Gumbel; None for a greedy method.
        given, is_given: int32 [B, K] and boolean [B], tokens that are picked in some rows whatever
            a model says; None is no row.
    """

    def __init__(
        self,
        sampler: Sampler,
        recent: mx.array,
        knobs: Knobs,
        noise: mx.array | None,
        given: mx.array | None = None,
        is_given: mx.array | None = None,
    ) -> None:
        self._sampler = sampler
        self._recent = recent
        self._knobs = knobs
        self._noise = noise
        self._given = given
        self._is_given = is_given
        self._tokens: list[mx.array] = []
        self._log_qs: list[mx.array] = []
        self._limit: mx.array | None = None

    def pick(self, logits: mx.array) -> mx.array:
        """The next token, int32 [B, 1].

        Args:
            logits: [B, 1, V'], of any floating dtype, over the first V' ≤ V tokens.
        """
        return self._picked(logits)

    def pick_all(self, logits: mx.array) -> mx.array:
        """The next N tokens, int32 [B, N], none of which decides the logits of another.

        They are picked at once, unless a penalty or a processor looks back on those before.

        Args:
            logits: [B, N, V'], as `pick` takes them.
        """
        if not self._sampler.looks_back:
            return self._picked(logits)
        return mx.concatenate(
            [self._picked(logits[:, i : i + 1]) for i in range(logits.shape[1])], axis=1
        )

    def limit(self, limit: mx.array) -> None:
        """Propose no more than the first `limit` picks of each row, int32 [B], 0 or more.

        Whether a pick is within must not depend on itself or on a later one.
        """
        self._limit = limit

    def draft_within(self, limit: mx.array | None) -> Draft:
        """The tokens picked so far, as a proposal.

        Args:
            limit: int32 [B], of the host; a row of -1 holds no text. None is no limit.
        """
        log_q = mx.concatenate(self._log_qs, axis=1) if self._log_qs else None
        tokens = mx.concatenate(self._tokens, axis=1)
        return Draft(tokens, log_q, self._least(limit), certain=self._is_given)

    def _least(self, limit: mx.array | None) -> mx.array | None:
        if self._limit is None:
            return limit
        own = self._limit
        if self._is_given is not None:
            own = mx.where(self._is_given, sum(one.shape[1] for one in self._tokens), own)
        return own if limit is None else mx.minimum(own, limit)

    def _picked(self, logits: mx.array) -> mx.array:
        scores = self._sampler.scores(logits, self._recent, self._knobs)
        at = sum(one.shape[1] for one in self._tokens)
        to = at + logits.shape[1]
        if self._noise is not None:
            log_q = self._sampler.log_probs(uniform_if_broken(scores), self._knobs)
            drawn = log_q + self._noise[:, at:to, : scores.shape[-1]]
            scores = self._sampler.unless_greedy(drawn, scores, self._knobs)
            self._log_qs.append(log_q)
        tokens = mx.argmax(scores, axis=-1).astype(mx.int32)
        if self._given is not None and self._is_given is not None:
            tokens = mx.where(self._is_given[:, None], self._given[:, at:to], tokens)
        self._tokens.append(tokens)
        self._recent = mx.concatenate([self._recent, tokens], axis=1)
        return tokens
