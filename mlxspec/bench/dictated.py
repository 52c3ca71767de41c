"""A target that writes a given text at its own pace: one that a small model cannot write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from mlxspec.models.caches.original import Model

CERTAIN = 1e4  # added to the logit of the dictated token


class Dictated(nn.Module):
    """A model whose every next token is that of a given text, at the cost of its own passes.

    Args:
        model: a model whose caches know their offset, as attention's do.
        text: token ids from the prompt's first on; after its end the model decides by itself.
    """

    def __init__(self, model: Model, text: Sequence[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inner = model
        self._following = mx.array([*text[1:], -1], mx.int32)

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        """Logits [B, N, V] of int32 [B, N] tokens."""
        offset = mx.array(cache[0].offset if cache else 0).reshape(-1, 1)
        places = mx.minimum(offset + mx.arange(tokens.shape[1]), len(self._following) - 1)
        logits = self.inner(tokens, cache=cache)
        said = mx.take(self._following, places)[..., None]
        return mx.where(mx.arange(logits.shape[-1]) == said, logits + CERTAIN, logits)

    def make_cache(self) -> list[Any]:
        return make_prompt_cache(self.inner)
