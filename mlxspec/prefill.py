"""Reading the prompt: mlx-lm's own caches, filled in chunks, before the first round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from mlxspec.cache import Model, vocabulary_of

CHUNK = (
    512  # rows per pass: what mlx-lm uses under speculation, and often enough for a progress bar
)

Progress = Callable[[int, int], None]


def prefill(
    models: Sequence[Model], tokens: Sequence[int], progress: Progress | None = None
) -> list[list[Any]]:
    """Run every model over all of `tokens` but the last, which the first round feeds.

    A cache has no shape before its first row, so a single token is read as well; the first round
    writes it again.

    Args:
        progress: called with (tokens read, tokens in all) after every chunk.

    Returns:
        For each model, mlx-lm caches, evaluated.
    """
    read = tokens[: max(len(tokens) - 1, 1)]
    caches = [make_prompt_cache(model) for model in models]
    # A draft may lack tokens of the target's; their embeddings would be read out of bounds.
    last_tokens = [vocabulary_of(model) - 1 for model in models]
    for start in range(0, len(read), CHUNK):
        chunk = mx.array([read[start : start + CHUNK]], mx.int32)
        for model, cache, last in zip(models, caches, last_tokens, strict=True):
            model(mx.minimum(chunk, last), cache=cache)
        mx.eval([layer.state for cache in caches for layer in cache])
        mx.clear_cache()  # a chunk's activations are large and their sizes do not come again
        if progress is not None:
            progress(min(start + CHUNK, len(read)), len(read))
    return caches
