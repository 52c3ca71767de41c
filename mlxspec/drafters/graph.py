"""Drafters inside the round's graph: draft models, and heads on the target's own features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import mlx.core as mx

from mlxspec.defaults import MAX_AUTO_TOKENS
from mlxspec.models.cached_model import CachedModel
from mlxspec.models.caches.layers import Layers, grow
from mlxspec.models.context import context_of
from mlxspec.models.taps import Features
from mlxspec.sampling.sampler import Knobs, Sampler, uniform_if_broken
from mlxspec.sampling.verify import Draft

ROWS = 64  # read in a pass: a ring has room for no more beyond its window
UNREAD = 2**31 - 1  # in place of a start: of a row beside others, of which nothing was read


class Past(NamedTuple):
    """The caches of a draft model that has read the text, or the end of it.

    layers: the caches' storage. start: int32 [B], the position of the first token in them; a draft
        that reads only the end of a long text counts its positions from there. A row of which it
        has read nothing has UNREAD there.
    """

    layers: Layers
    start: mx.array


class Picks:
    """Picks the tokens of a proposal one after the other, the way the target's own are picked.

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

    def pick(self, logits: mx.array) -> mx.array:
        """The next token, int32 [B, 1].

        Args:
            logits: [B, 1, V'], of any floating dtype, over the first V' ≤ V tokens.
        """
        scores = self._sampler.scores(logits, self._recent, self._knobs)
        at = len(self._tokens)
        if self._noise is not None:
            log_q = self._sampler.log_probs(uniform_if_broken(scores), self._knobs)
            drawn = log_q + self._noise[:, at : at + 1, : scores.shape[-1]]
            scores = self._sampler.unless_greedy(drawn, scores, self._knobs)
            self._log_qs.append(log_q)
        token = mx.argmax(scores, axis=-1).astype(mx.int32)
        if self._given is not None and self._is_given is not None:
            token = mx.where(self._is_given[:, None], self._given[:, at : at + 1], token)
        self._tokens.append(token)
        self._recent = mx.concatenate([self._recent, token], axis=1)
        return token

    @property
    def draft(self) -> Draft:
        """The tokens picked so far, as a proposal."""
        log_q = mx.concatenate(self._log_qs, axis=1) if self._log_qs else None
        return Draft(mx.concatenate(self._tokens, axis=1), log_q, certain=self._is_given)


class Head(Protocol):
    """A drafter on the target's features, such as a trained head. See docs/drafters.md.

    taps: names of the target's modules whose outputs are its features. most: the largest K.
    A head keeps its state in a tree of arrays, a *past*, and changes none that it is given.
    """

    taps: Sequence[str]
    most: int

    def begin(self, tokens: mx.array, features: Features, capacity: int) -> Any:
        """The past after a prompt: int32 [1, N] `tokens`, and features [1, N, D] by tap.

        Args:
            capacity: tokens that a text may reach before `grown` is called.
        """

    def grown(self, past: Any, capacity: int) -> Any:
        """The past with room for a text of `capacity` tokens."""

    def propose(
        self, past: Any, last_two: mx.array, position: mx.array, picks: Picks, count: int
    ) -> Any:
        """Call `picks.pick` `count` times, and return the past.

        Args:
            last_two: int32 [B, 2], the last tokens of the text, of which the target has not read
                the last. position: int32 [B], of the last.
        """

    def commit(
        self, past: Any, tokens: mx.array, features: Features, position: mx.array, kept: mx.array
    ) -> Any:
        """The past after a round, whichever drafter proposed.

        Args:
            tokens: int32 [B, R] that the target read from `position`, int32 [B], on; their
                features are [B, R, D]. kept: int32 [B], how many of them stay, at least 1.
        """


class GraphDrafter(Protocol):
    """A draft model or a head, as a round sees it. Its past is a tree of arrays, [B, …] each.

    taps: names of the target's modules whose outputs are its features. most: the largest K.
    follows: whether it is told of every round, whichever drafter proposed. One that does not
        follow is told only of its own rounds, and reads what it missed before the next one.
    fused: whether its passes can be part of a graph that never waits for the host.
    beside: whether its passes over several texts give each what it would get alone.
    """

    taps: Sequence[str]
    most: int
    follows: bool

    @property
    def fused(self) -> bool: ...

    @property
    def beside(self) -> bool: ...

    def typed(self, past: Any) -> Any:
        """The past with its types, which `mx.compile` turns into plain tuples."""

    def grown(self, past: Any, capacity: int) -> Any:
        """The past with room for a text of `capacity` tokens."""

    def propose(
        self,
        past: Any,
        last_two: mx.array,
        position: mx.array,
        picks: Picks,
        count: int,
        length: int,
    ) -> Any:
        """Call `picks.pick` `count` ≥ 1 times, and return the past.

        Args:
            last_two: int32 [B, 2], the last tokens of the text, of which the target has not read
                the last. position: int32 [B], of the last.
            length: the number of entries to attend over in its own caches, if it has any.
        """

    def commit(
        self, past: Any, tokens: mx.array, features: Features, position: mx.array, kept: mx.array
    ) -> Any:
        """The past after a round that it is told of; see `Head.commit`."""


class HeadDrafter:
    """A head as a `GraphDrafter`: it follows every round, and its past grows with the target's."""

    follows = True
    fused = True
    beside = True

    def __init__(self, head: Head) -> None:
        self._head = head
        self.taps = head.taps
        self.most = head.most

    def typed(self, past: Any) -> Any:
        return past

    def begin(self, tokens: mx.array, features: Features, capacity: int) -> Any:
        return self._head.begin(tokens, features, capacity)

    def grown(self, past: Any, capacity: int) -> Any:
        return self._head.grown(past, capacity)

    def propose(
        self,
        past: Any,
        last_two: mx.array,
        position: mx.array,
        picks: Picks,
        count: int,
        length: int,
    ) -> Any:
        return self._head.propose(past, last_two, position, picks, count)

    def commit(
        self, past: Any, tokens: mx.array, features: Features, position: mx.array, kept: mx.array
    ) -> Any:
        return self._head.commit(past, tokens, features, position, kept)


class ModelDrafter:
    """A smaller model over the same tokens, as a `GraphDrafter`.

    Args:
        cached: the model. It proposes from the part of its vocabulary that it shares with the
            target, and reads its last id in place of an id that it lacks.
        vocabulary: V, of the target.
        context: tokens that it can read; None takes the length that its arguments give.
    """

    taps: Sequence[str] = ()
    most = MAX_AUTO_TOKENS
    follows = False

    def __init__(self, cached: CachedModel, vocabulary: int, context: int | None = None) -> None:
        self.cached = cached
        self.context = context or context_of(cached.model)
        self._own = cached.vocabulary
        self._common = min(self._own, vocabulary)
        self._clamps = self._own < vocabulary

    @property
    def fused(self) -> bool:
        return self.cached.fused

    @property
    def beside(self) -> bool:
        return self.cached.beside

    def typed(self, past: Any) -> Past:
        return Past(*past)

    def grown(self, past: Past, capacity: int) -> Past:
        return past._replace(layers=grow(past.layers, capacity))

    def propose(
        self,
        past: Past,
        last_two: mx.array,
        position: mx.array,
        picks: Picks,
        count: int,
        length: int,
    ) -> Past:
        """Pick `count` ≥ 1 tokens after `last_two`, whose last stands at `position`.

        The cache ends before both: whether the former was fed depends on the last verdict, and
        feeding it always keeps shapes constant. Of the `count` + 1 rows fed, as many are kept as
        the target keeps of its own.

        Args:
            last_two: int32 [B, 2]. position: int32 [B].
            length: entries to attend over, at least position - start + K of every row.
        """
        layers = past.layers
        position = mx.maximum(position - past.start, 0)
        start = mx.maximum(position - 1, 0)
        # Positions are data: a constant per step would need a kernel per step.
        steps = position[:, None] + mx.arange(count)
        fed, offset = last_two, start
        if not self.cached.fused:
            # A hosted model goes back to the end of a pass for free, but not to its middle.
            _, layers = self.cached.forward(self._known(fed[:, :1]), layers, start, length)
            fed, offset = fed[:, 1:], position
        for i in range(count):
            logits, layers = self.cached.forward(self._known(fed), layers, offset, length)
            fed = picks.pick(logits[:, -1:, : self._common])
            offset = steps[:, min(i + 1, count - 1)]
        return past._replace(layers=layers)

    def commit(
        self, past: Past, tokens: mx.array, features: Features, position: mx.array, kept: mx.array
    ) -> Past:
        """Take back all but the first `kept` rows since the last commit: int32 [B]."""
        return past._replace(layers=self.cached.commit(past.layers, kept))

    def read(self, past: Past, tokens: Sequence[int], at: int, length: int) -> Past:
        """The past of one sequence after it has read `tokens` too, from its position `at` on."""
        layers = past.layers
        for i in range(0, len(tokens), ROWS):
            rows = self._known(mx.array([tokens[i : i + ROWS]], mx.int32))
            _, layers = self.cached.forward(rows, layers, mx.array([at + i], mx.int32), length)
            layers = self.cached.commit(layers, None)
        return past._replace(layers=layers)

    def _known(self, tokens: mx.array) -> mx.array:
        return mx.minimum(tokens, self._own - 1) if self._clamps else tokens
