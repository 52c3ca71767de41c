"""Models that propose. A drafter proposes inside the round's graph and never waits for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from mlxspec.caches.layers import Layers
from mlxspec.network import Network
from mlxspec.sampling import Knobs, Sampler, uniform_if_broken
from mlxspec.verify import Draft

MODEL = "model"  # the name of a draft model, among drafters
ROWS = 64  # that are read in a pass: a ring has room for no more beside its window


class Past(NamedTuple):
    """What a draft has read of the text.

    layers: its caches' storage. start: int32 [B], the position of the first token in them; a draft
        that reads the end of a long text alone counts its positions from there.
    """

    layers: Layers
    start: mx.array


class ModelDrafter:
    """A smaller model over the same tokens.

    Args:
        network: the model. It proposes from the part of its vocabulary that it shares with the
            target, and is shown its last token in place of one that it does not have.
        sampler: how it picks its tokens, the same way as the target.
    """

    def __init__(self, network: Network, sampler: Sampler) -> None:
        self.network = network
        self._own = network.vocabulary
        self._common = min(self._own, sampler.vocabulary)
        self._clamps = self._own < sampler.vocabulary
        self._sampler = sampler

    def propose(
        self,
        past: Past,
        last_two: mx.array,
        recent: mx.array,
        position: mx.array,
        count: int,
        length: int,
        knobs: Knobs,
        noise: mx.array | None,
    ) -> tuple[Draft, Past]:
        """Propose `count` ≥ 1 tokens after `last_two`, whose last stands at `position`.

        The cache ends before both: whether the former was fed depends on the last verdict, and
        feeding it always keeps shapes constant. Of the `count` + 1 rows that are fed, as many are
        to be kept as the target keeps of its own.

        Args:
            last_two: int32 [B, 2]. position: int32 [B].
            recent: int32 [B, W], the last tokens of the text, that at `position` included.
            length: how far its own caches are attended, at least position - start + K of every row.
            noise: float32 [B, count, V], Gumbel; None for a greedy method.
        """
        layers = past.layers
        position = position - past.start
        start = mx.maximum(position - 1, 0)
        # Positions as data: a constant for each step would be a kernel for each step.
        steps = position[:, None] + mx.arange(count)
        tokens: list[mx.array] = []
        log_qs: list[mx.array] = []
        fed, offset = last_two, start
        if not self.network.fused:
            # Such a network goes back to the end of any pass at no cost, but not into one.
            _, layers = self.network.forward(self._known(fed[:, :1]), layers, start, length)
            fed, offset = fed[:, 1:], position
        for i in range(count):
            logits, layers = self.network.forward(self._known(fed), layers, offset, length)
            scores = self._sampler.scores(logits[:, -1:, : self._common], recent, knobs)
            if noise is not None:
                log_qs.append(self._sampler.log_probs(uniform_if_broken(scores), knobs))
                scores = log_qs[-1] + noise[:, i : i + 1, : self._common]
            token = mx.argmax(scores, axis=-1).astype(mx.int32)
            tokens.append(token)
            recent = mx.concatenate([recent, token], axis=1)
            fed, offset = token, steps[:, min(i + 1, count - 1)]
        log_q = mx.concatenate(log_qs, axis=1) if log_qs else None
        return Draft(mx.concatenate(tokens, axis=1), log_q), past._replace(layers=layers)

    def commit(self, past: Past, kept: mx.array) -> Past:
        """Take back all but the first `kept` rows since the last commit: int32 [B]."""
        return past._replace(layers=self.network.commit(past.layers, kept))

    def read(self, past: Past, tokens: Sequence[int], at: int, length: int) -> Past:
        """The past of one sequence after `tokens` too, the first of which is the `at`-th in it."""
        layers = past.layers
        for i in range(0, len(tokens), ROWS):
            rows = self._known(mx.array([tokens[i : i + ROWS]], mx.int32))
            _, layers = self.network.forward(rows, layers, mx.array([at + i], mx.int32), length)
            layers = self.network.commit(layers, None)
        return past._replace(layers=layers)

    def _known(self, tokens: mx.array) -> mx.array:
        return mx.minimum(tokens, self._own - 1) if self._clamps else tokens
