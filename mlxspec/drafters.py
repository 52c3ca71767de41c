"""Where proposals come from. A drafter proposes inside the round's graph and never waits for it."""

from __future__ import annotations

import mlx.core as mx

from mlxspec.cache import Layers, Model, forward
from mlxspec.params import Method
from mlxspec.sampling import Knobs, log_probs
from mlxspec.verify import Draft


class ModelDrafter:
    """A smaller model over the same tokens.

    Args:
        model: an mlx-lm model.
        own_vocabulary: rows of its output.
        target_vocabulary: rows of the target's. It proposes from the common part only, and is
            shown its last token in place of one that it does not have.
        method: how it picks its tokens, the same way as the target.
    """

    def __init__(
        self, model: Model, own_vocabulary: int, target_vocabulary: int, method: Method
    ) -> None:
        self.model = model
        self._own = own_vocabulary
        self._common = min(own_vocabulary, target_vocabulary)
        self._clamps = own_vocabulary < target_vocabulary
        self._method = method

    def propose(
        self,
        layers: Layers,
        last_two: mx.array,
        position: mx.array,
        count: int,
        length: int,
        knobs: Knobs,
        key: mx.array,
    ) -> tuple[Draft, Layers]:
        """Propose `count` ≥ 1 tokens after `last_two`, whose last stands at `position`.

        Whether the cache holds the former of the two depends on the last verdict, so both are
        fed again: rewriting an entry with itself costs nothing, and shapes stay constant.

        Args:
            last_two: int32 [B, 2]. position: int32 [B].
        """
        start = mx.maximum(position - 1, 0)
        # Positions as data: a constant for each step would be a kernel for each step.
        steps = position[:, None] + mx.arange(count)
        tokens: list[mx.array] = []
        log_qs: list[mx.array] = []
        fed, offset = last_two, start
        for i, step_key in enumerate(mx.random.split(key, count)):
            logits, layers = forward(self.model, self._known(fed), layers, offset, length)
            token, log_q = self._choose(logits[:, -1:, : self._common], knobs, step_key)
            tokens.append(token)
            if log_q is not None:
                log_qs.append(log_q)
            fed, offset = token, steps[:, min(i + 1, count - 1)]
        log_q = mx.concatenate(log_qs, axis=1) if log_qs else None
        return Draft(mx.concatenate(tokens, axis=1), log_q), layers

    def _choose(
        self, logits: mx.array, knobs: Knobs, key: mx.array
    ) -> tuple[mx.array, mx.array | None]:
        if self._method.greedy:
            return mx.argmax(logits, axis=-1).astype(mx.int32), None
        log_q = log_probs(logits, self._method, knobs)
        return mx.random.categorical(log_q, key=key).astype(mx.int32), log_q

    def _known(self, tokens: mx.array) -> mx.array:
        return mx.minimum(tokens, self._own - 1) if self._clamps else tokens
