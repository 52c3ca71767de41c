"""Drafters inside the round's graph: what a round knows of each, and draft models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import mlx.core as mx

from mlxspec.defaults import MAX_AUTO_TOKENS
from mlxspec.drafters.picks import Picks
from mlxspec.models.cached_model import CachedModel
from mlxspec.models.caches.layers import Layers, grow
from mlxspec.models.context import context_of
from mlxspec.models.taps import Features

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


class Proposer(Protocol):
    """What drafts in a round's graph. Its past is a tree of arrays, [B, …] each.

    taps: names of the target's modules whose outputs are its features. most: the largest K.
    """

    taps: Sequence[str]
    most: int

    def propose(
        self,
        past: Any,
        last_two: mx.array,
        position: mx.array,
        picks: Picks,
        count: int,
        length: int,
    ) -> Any:
        """Pick `count` ≥ 1 tokens with `picks`, and return the past.

        Args:
            last_two: int32 [B, 2], the last tokens of the text, of which the target has not read
                the last. position: int32 [B], of the last: as many tokens were committed.
            length: entries to attend over in its own caches, if it has any: more than
                `position` + `count` in every row. It shapes the graph.
        """

    def commit(
        self,
        past: Any,
        tokens: mx.array,
        features: Features,
        position: mx.array,
        kept: mx.array | None,
    ) -> Any:
        """The past after the target has read more: a round, or a piece of a prompt.

        Args:
            tokens: int32 [B, R] that the target read from `position`, int32 [B], on; their
                features are [B, R, D] by tap. R is as large as a piece of a prompt.
            kept: int32 [B], how many of them stay, at least 1; None is all, of a prompt.
        """


class GraphDrafter(Proposer, Protocol):
    """A draft model or a head, as a round sees it.

    follows: whether it is told of every round, whichever drafter proposed. One that does not
        follow is told only of its own rounds, and reads what it missed before the next one.
    at_once: whether one pass drafts all tokens, whatever K is.
    fused: whether its passes can be part of a graph that never waits for the host.
    beside: whether its passes over several texts give each what it would get alone.
    """

    follows: bool

    @property
    def at_once(self) -> bool: ...

    @property
    def fused(self) -> bool: ...

    @property
    def beside(self) -> bool: ...

    def typed(self, past: Any) -> Any:
        """The past with its types, which `mx.compile` turns into plain tuples."""

    def grown(self, past: Any, capacity: int) -> Any:
        """The past with room for a text of `capacity` tokens."""


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
    at_once = False

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
        self,
        past: Past,
        tokens: mx.array,
        features: Features,
        position: mx.array,
        kept: mx.array | None,
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
