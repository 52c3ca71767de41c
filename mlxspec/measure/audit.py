"""Proof on demand: the text compared with plain decoding on mlx-lm's own caches.

The text is read again one token at a time, the way `mlx_lm.generate` writes it, and at every
place the token is chosen as plain decoding would: by the best score, or, when sampling, by the
coupled rule's noise, which depends on the seed and the place alone. Neither rounds nor their
caches take part. The same text is also read in passes of several rows: of as many as a round
verifies, and of more. The differences between these readings are the rounding errors of this
machine's arithmetic, which depend on the shapes that are computed. A round has shapes of its own
even where it feeds one row, because its caches have room for more.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import inf
from typing import Any, Literal, NamedTuple, cast

import mlx.core as mx

from mlxspec.decode.engine import Engine
from mlxspec.decode.run import Run
from mlxspec.metrics import Progress, counted
from mlxspec.models.prefill import Reading, prefill
from mlxspec.params import SamplingParams
from mlxspec.sampling.noise import TARGET_NOISE, gumbel, keys_of, row_key
from mlxspec.sampling.sampler import Sampler, knobs_of

WIDE = 16  # rows of the widest passes, at least: other kernels run there
FINE, ROUGH = 1e-2, 0.1  # what rounding may change in float32, and in 16 bits
READING, COMPARING = "auditing: reading the prompt", "auditing: comparing tokens"

Outcome = Literal["identical", "rounding tie", "defect"]


@dataclass(frozen=True)
class Divergence:
    """A place where plain decoding, after the same text, would have gone on differently.

    Args:
        index: of the token, counted from 0 after the prompt.
        written, plain: the two token ids.
        gap: the lead of the plain token's score, in nats.
        noise: the difference of scores between passes of different numbers of rows, there or at
            the worst place, in nats.
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
        tokens: the number of tokens compared. of: those of the whole text.
        rows: the numbers of rows of the many-row passes; none where the model says something else
            when it is fed several tokens at once, so that nothing is known of its rounding.
        noise: the largest difference of a logit, over the temperature, between one-row and
            many-row passes, in nats.
    """

    tokens: int
    of: int
    rows: tuple[int, ...]
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
        cut = f", ended after {self.tokens} of {self.of} tokens" if self.tokens < self.of else ""
        if first is None:
            same = f"plain decoding writes the same {self.tokens} tokens"
            return f"audit: identical{cut}: {same} ({self._rounding(self.noise)})"
        plain, written = (f"{decode(token)!r} ({token})" for token in (first.plain, first.written))
        return (
            f"audit: {self.outcome} at token {first.index} of {self.of}{cut}: plain decoding "
            f"chooses {plain}, written is {written}; its score leads by {first.gap:.1e} nats, and "
            f"{self._rounding(first.noise)} "
            f"({counted(len(self.divergences), 'such place')})"
        )

    def _rounding(self, noise: float) -> str:
        if not self.rows:
            return "of rounding nothing is known: the model cannot be fed several tokens at once"
        *some, most = (1, *self.rows)
        passes = f"passes of {', '.join(map(str, some))} and {most} rows"
        return f"{passes} differ by up to {noise:.1e} nats"

    def as_dict(self) -> dict[str, Any]:
        first = self.decisive
        return {
            "outcome": self.outcome,
            "tokens": self.tokens,
            "of": self.of,
            "divergences": len(self.divergences),
            "first": first.as_dict() if first is not None else None,
            "noise": self.noise,
            "rows": list(self.rows),
        }


class Auditing(Iterator[Progress]):
    """Compares the text of a run with plain decoding: an iterator of progress.

    A loop that ends early, because a person interrupts it, leaves a report on the tokens until
    then.

    Args:
        run: a finished one, of the greedy or the coupled rule, up to its last committed token.
    """

    def __init__(self, engine: Engine, run: Run) -> None:
        assert run.session is not None
        self._text, self._start = run.session.text, run.generation.prompt_tokens
        sampler = run.session.rounds.sampler
        self._oracle = _Oracle(engine, sampler, run.request.sampling, self._text)
        rows = max(run.generation.speculation.draft_tokens + 1, 2)
        self._chunk = max(-(-WIDE // rows), 2) * rows
        self._rows = rows, self._chunk
        self._found: list[_PlainToken] = []
        self._steps = self._compared()

    def __next__(self) -> Progress:
        return next(self._steps)

    @property
    def report(self) -> Audit:
        """The result for the tokens so far."""
        sound = [at for at in range(len(self._rows)) if self._is_rounding(at)]
        noise = max((one.noise[at] for one in self._found for at in sound), default=0.0)
        written = self._text[self._start :]
        divergences = tuple(
            Divergence(at, token, one.plain, one.gap, max([noise, *(one.flip[i] for i in sound)]))
            for at, (token, one) in enumerate(zip(written, self._found, strict=False))
            if one.plain != token
        )
        rows = tuple(self._rows[at] for at in sound)
        return Audit(len(self._found), len(written), rows, noise, divergences)

    def _is_rounding(self, at: int) -> bool:
        """Whether the passes of the `at`-th number of rows differ by rounding only.

        Rounding may send a row to another expert here and there. A model that is wrong for several
        rows is wrong in many of them.
        """
        tolerance = self._oracle.tolerance
        wrong = sum(one.noise[at] > tolerance * one.spread for one in self._found)
        return wrong <= len(self._found) / 8

    def _compared(self) -> Iterator[Progress]:
        total = len(self._text) - self._start
        yield Progress(READING, 0, self._start)
        one = yield from self._oracle.caches(self._start)
        readings = {rows: deepcopy(one) for rows in self._rows}
        chunk = self._chunk
        yield Progress(COMPARING, 0, total)
        for begin in range(self._start, len(self._text), chunk):
            places = range(begin, min(begin + chunk, len(self._text)))
            singly = []
            for place in places:
                singly.append(self._oracle.logits(one, range(place, place + 1)))
                mx.eval(singly[-1])
                yield Progress(COMPARING, place - self._start, total)
            together = [
                mx.concatenate(
                    [self._oracle.logits(caches, some) for some in _split(places, rows)], axis=1
                )
                for rows, caches in readings.items()
            ]
            self._found += self._oracle.choices(mx.concatenate(singly, axis=1), together, places)
            yield Progress(COMPARING, len(self._found), total)


def audit(engine: Engine, run: Run) -> Audit:
    """Compare the whole text of a run with plain decoding, with the arguments of `Auditing`."""
    auditing = Auditing(engine, run)
    for _ in auditing:
        pass
    return auditing.report


def _split(places: range, rows: int) -> list[range]:
    """Stretches of `rows` places, the last of which may be shorter."""
    starts = range(places.start, places.stop, rows)
    return [range(start, min(start + rows, places.stop)) for start in starts]


class _PlainToken(NamedTuple):
    """The choice of plain decoding at one place.

    gap: its lead over the written token. spread: the standard deviation of the logits. noise: for
    each number of rows, the largest difference of a logit to that of a one-row pass. Both are over
    the temperature. flip: the same difference of the compared scores, which jump where rounding
    moves a token across a filter's threshold.
    """

    plain: int
    gap: float
    spread: float
    noise: list[float]
    flip: list[float]


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
        self.tolerance = ROUGH  # of a difference that may be rounding, as a share of the spread

    def caches(self, start: int) -> Generator[Progress, None, list[Any]]:
        """Return mlx-lm's own caches, which have read the first `start` - 1 tokens."""
        reading = prefill(Reading(self._target, self._text[: start - 1]))
        while True:
            try:
                yield Progress(READING, *next(reading))
            except StopIteration as end:
                return cast(list[Any], end.value[0])

    def logits(self, cache: list[Any], places: range) -> mx.array:
        """Processed logits, float32 [1, N, V], for tokens at `places`: one pass over N tokens."""
        fed = mx.array([self._text[places.start - 1 : places.stop - 1]], mx.int32)
        before = mx.array([self._text[: places.stop - 1]], mx.int32)
        logits = self._target.model(fed, cache=cache)
        self.tolerance = FINE if logits.dtype == mx.float32 else ROUGH
        return self._sampler.scores(logits, before, self._knobs)

    def choices(
        self, singly: mx.array, together: Sequence[mx.array], places: range
    ) -> list[_PlainToken]:
        """Plain decoding's choices, from the logits of one-row passes and of many-row ones."""
        written = mx.array([self._text[places.start : places.stop]])[..., None]
        compared = self._scores(singly, places)
        plain = mx.argmax(compared, axis=-1, keepdims=True)
        gap = mx.take_along_axis(compared, plain, -1) - mx.take_along_axis(compared, written, -1)
        compared_too = [self._scores(one, places) for one in together]
        finite = mx.where(mx.isfinite(singly), singly, 0)
        over = self._sampling.temperature or 1
        columns = [
            plain[0, :, 0],
            gap[0, :, 0],
            mx.std(finite, axis=-1)[0] / over,
            _largest_differences(singly, together) / over,
            _largest_differences(compared, compared_too),
        ]
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


def _largest_differences(one: mx.array, others: Sequence[mx.array]) -> mx.array:
    """The largest difference to each other at every place, [N, len(others)].

    Where both are -inf it is 0.
    """
    some = [mx.max(mx.abs(mx.where(one == other, 0, one - other)), axis=-1)[0] for other in others]
    return mx.stack(some, axis=-1)
