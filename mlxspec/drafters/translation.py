"""A draft of another tokenizer, driven by the target's token ids."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxspec.drafters.vocabulary import Shared
from mlxspec.models.caches.original import Model, fresh_cache


class Translated(nn.Module):
    """A model over a target's tokens, in place of one over its own.

    Token ids are translated to its own, and its logits to the target's ids, -inf for a token that
    only the target has. So its distribution is masked to the shared tokens (TLI: Timor et al.,
    arXiv 2502.05202), and all that reads, scores, filters or verifies uses the target's ids only.

    Args:
        model: an mlx-lm model. shared: which of its tokens the target has too.
        vocabulary: V, the size of the target's vocabulary.
    """

    def __init__(self, model: Model, shared: Shared, vocabulary: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inner = model
        self.model_type = f"{getattr(model, 'model_type', 'a model')} of another tokenizer"
        # A tokenizer may have more tokens than its model.
        own = int(model(mx.zeros((1, 1), mx.int32), cache=self.make_cache()).shape[-1])
        proposed = [shared.partners.get(token, own) for token in range(vocabulary)]
        shown = {**shared.stand_ins, **shared.partners}
        self._is_shared = mx.array([token < own for token in proposed])
        self._proposed = mx.array([min(token, own - 1) for token in proposed], mx.int32)
        self._shown = mx.array(
            [min(shown.get(token, shared.placeholder), own - 1) for token in range(vocabulary)],
            mx.int32,
        )

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        """Logits [B, N, V] of int32 [B, N] tokens, both of the target's ids."""
        logits = self.inner(mx.take(self._shown, tokens), cache=cache)
        return mx.where(self._is_shared, mx.take(logits, self._proposed, axis=-1), -mx.inf)

    def make_cache(self) -> list[Any]:
        return fresh_cache(self.inner, None)
