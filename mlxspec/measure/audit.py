"""Proof on demand: the text compared with plain decoding on mlx-lm's own caches.

The text is read again one token at a time, the way `mlx_lm.generate` writes it, and at every
place the token is chosen as plain decoding would: by the best score, or, when sampling, by the
coupled rule's noise, which depends on the seed and the place alone. Neither rounds nor their
caches take part. The same text is also read in passes of as many rows as a round verifies; the
difference between the two readings is the rounding error of this machine's arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any, Literal, NamedTuple

import mlx.core as mx

from mlxspec.decode.engine import Engine
from mlxspec.decode.run import Run
from mlxspec.models.prefill import Reading, finished, prefill
from mlxspec.params import SamplingParams
from mlxspec.sampling.noise import TARGET_NOISE, gumbel, keys_of, row_key
from mlxspec.sampling.sampler import Sampler, knobs_of

Outcome = Literal["identical", "rounding tie", "defect"]


@dataclass(frozen=True)
class Divergence:
    """A place where plain decoding, after the same text, would have gone on differently.

    Args:
        index: of the token, counted from 0 after the prompt.
        written, plain: the two token ids.
        gap: the lead of the plain token's score, in nats.
        noise: the difference of scores between one-row and many-row passes, there or at the
            worst place, in nats.
    """

    index: int
    written: int
    plain: int
    gap: float
    noise: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, which has no infinity: an infinite gap or noise is None."""
        return {key: None if value == inf else value for key, value in vars(self).items()}

    @property
    def is_tie(self) -> bool:
        """Whether rounding explains it: each of the two scores may be off by the noise."""
        return self.gap <= 2 * self.noise


@dataclass(frozen=True)
class Audit:
    """The result of an audit.

    Args:
        tokens: the number of tokens compared.
        rows: the number of rows of a many-row pass.
        noise: the largest difference of a logit, over the temperature, between one-row and
            many-row passes, in nats.
    """

    tokens: int
    rows: int
    noise: float
    divergences: tuple[Divergence, ...]

    @property
    def outcome(self) -> Outcome:
        if not self.divergences:
            return "identical"
        ties = all(divergence.is_tie for divergence in self.divergences)
        return "rounding tie" if ties else "defect"

    @property
    def decisive(self) -> Divergence | None:
        """The first divergence that rounding does not explain, or else the first of all."""
        ordered = sorted(self.divergences, key=lambda one: (one.is_tie, one.index))
        return ordered[0] if ordered else None

    def described(self, decode: Callable[[int], str]) -> str:
        """The outcome in one line.

        Args:
            decode: a token's text.
        """
        first = self.decisive
        if first is None:
            return (
                f"audit: identical: plain decoding writes the same {self.tokens} tokens "
                f"(passes of 1 and {self.rows} rows differ by up to {self.noise:.1e})"
            )
        plain, written = (f"{decode(token)!r} ({token})" for token in (first.plain, first.written))
        return (
            f"audit: {self.outcome} at token {first.index} of {self.tokens}: plain decoding "
            f"chooses {plain}, written is {written}; its score leads by {first.gap:.1e}, and "
            f"passes of 1 and {self.rows} rows differ by up to {first.noise:.1e} "
            f"({len(self.divergences)} such place{'s' * (len(self.divergences) > 1)})"
        )

    def as_dict(self) -> dict[str, Any]:
        first = self.decisive
        return {
            "outcome": self.outcome,
            "tokens": self.tokens,
            "divergences": len(self.divergences),
            "first": first.as_dict() if first is not None else None,
            "noise": self.noise,
            "rows": self.rows,
        }


def audit(engine: Engine, run: Run) -> Audit:
    """Compare the text of a finished run, to its last committed token, with plain decoding.

    Args:
        run: of the greedy or the coupled rule.
    """
    assert run.session is not None
    text, start = run.session.text, run.generation.prompt_tokens
    oracle = _Oracle(engine, run.session.rounds.sampler, run.request.sampling, text)
    rows = run.generation.speculation.draft_tokens + 1
    one, many = oracle.caches(start), oracle.caches(start)
    found: list[_PlainToken] = []
    for begin in range(start, len(text), rows):
        places = range(begin, min(begin + rows, len(text)))
        singly = [oracle.logits(one, range(place, place + 1)) for place in places]
        together = oracle.logits(many, places)
        found += oracle.choices(mx.concatenate(singly, axis=1), together, places)
    noise = max((choice.noise for choice in found), default=0.0)
    divergences = tuple(
        Divergence(index, text[start + index], choice.plain, choice.gap, max(noise, choice.flip))
        for index, choice in enumerate(found)
        if choice.plain != text[start + index]
    )
    return Audit(len(text) - start, rows, noise, divergences)


class _PlainToken(NamedTuple):
    """The choice of plain decoding at one place.

    gap: its lead over the written token. noise: the difference of the logits between the two
    passes, over the temperature. flip: that of the compared scores, which jump where rounding
    moves a token across a filter's threshold.
    """

    plain: int
    gap: float
    noise: float
    flip: float


class _Oracle:
    """Plain decoding, forced along a text."""

    def __init__(
        self, engine: Engine, sampler: Sampler, sampling: SamplingParams, text: list[int]
    ) -> None:
        self._target = engine.models[0]
        self._sampler = sampler
        self._text = text
        self._sampling = sampling
        self._knobs = knobs_of(sampling, 1, sampler.vocabulary)

    def caches(self, start: int) -> list[Any]:
        """mlx-lm's own caches, which have read the first `start` - 1 tokens."""
        return finished(prefill(Reading(self._target, self._text[: start - 1])))[0]

    def logits(self, cache: list[Any], places: range) -> mx.array:
        """Processed logits, float32 [1, N, V], for tokens at `places`: one pass over N tokens."""
        fed = mx.array([self._text[places.start - 1 : places.stop - 1]], mx.int32)
        before = mx.array([self._text[: places.stop - 1]], mx.int32)
        return self._sampler.scores(self._target.model(fed, cache=cache), before, self._knobs)

    def choices(self, singly: mx.array, together: mx.array, places: range) -> list[_PlainToken]:
        """Plain decoding's choices, from the logits of one-row passes and of a many-row pass."""
        written = mx.array([self._text[places.start : places.stop]])[..., None]
        compared = self._scores(singly, places)
        plain = mx.argmax(compared, axis=-1, keepdims=True)
        gap = mx.take_along_axis(compared, plain, -1) - mx.take_along_axis(compared, written, -1)
        noise = _largest_difference(singly, together) / (self._sampling.temperature or 1)
        flip = _largest_difference(compared, self._scores(together, places))
        columns = [plain[0, :, 0], gap[0, :, 0], noise[0], flip[0]]
        mx.eval(columns)
        return [_PlainToken(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]

    def _scores(self, logits: mx.array, places: range) -> mx.array:
        """The scores that choose a token: the logits, or log p + the coupled rule's noise."""
        if self._sampler.method.greedy:
            return logits
        assert self._sampling.seed is not None
        row = row_key(self._sampling.seed)[None]
        keys = keys_of(row, TARGET_NOISE, mx.arange(places.start, places.stop)[None])
        log_p = self._sampler.log_probs(logits, self._knobs)
        return log_p + gumbel(keys, self._sampler.vocabulary)


def _largest_difference(one: mx.array, other: mx.array) -> mx.array:
    """The largest difference over the last axis; where both are -inf it is 0."""
    return mx.max(mx.abs(mx.where(one == other, 0, one - other)), axis=-1)
