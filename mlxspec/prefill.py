"""Reading the prompt: mlx-lm's own caches, filled in chunks, before the first round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from mlxspec.cache import Model
from mlxspec.errors import OutOfMemory, UsageError
from mlxspec.memory import watched
from mlxspec.params import KVQuantization

# Rows per pass: what mlx-lm uses under speculation, and often enough for a progress bar.
CHUNK = 512
SMALLEST_CHUNK = 16

Progress = Callable[[int, int], None]
Note = Callable[[str], None]


def prefill(
    models: Sequence[tuple[Model, int]],
    tokens: Sequence[int],
    *,
    kv: KVQuantization | None = None,
    progress: Progress | None = None,
    note: Note | None = None,
) -> list[list[Any]]:
    """Run every model over all of `tokens` but the last, which the first round feeds.

    A cache has no shape before its first row, so a single token is read as well; the first round
    writes it again. Where memory runs out, it begins again with chunks of half the size.

    Args:
        models: each with the size of its vocabulary. A draft may lack tokens of the target's,
            whose embeddings would be read out of bounds; it is shown its last token instead.
        kv: keys and values are quantised after every chunk.
        progress: called with (tokens read, tokens in all) after every chunk.
        note: called with what a person should know.

    Returns:
        For each model, mlx-lm caches, evaluated.

    Raises:
        OutOfMemory: not even the smallest chunk fits.
    """
    read = tokens[: max(len(tokens) - 1, 1)]
    chunk = CHUNK
    while True:
        try:
            return _read(models, read, chunk, kv, progress or (lambda *_: None))
        except OutOfMemory:
            chunk //= 2
            if chunk < SMALLEST_CHUNK:
                raise
        if note is not None:
            note(f"memory ran out while reading the prompt: reading {chunk} tokens at a time")


def _read(
    models: Sequence[tuple[Model, int]],
    read: Sequence[int],
    chunk: int,
    kv: KVQuantization | None,
    progress: Progress,
) -> list[list[Any]]:
    caches = [fresh_cache(model, None) for model, _ in models]
    for start in range(0, len(read), chunk):
        rows = mx.array([read[start : start + chunk]], mx.int32)
        with watched("reading the prompt"):
            for (model, vocabulary), cache in zip(models, caches, strict=True):
                model(mx.minimum(rows, vocabulary - 1), cache=cache)
                cache[:] = _quantized(cache, kv)
            mx.eval([layer.state for cache in caches for layer in cache])
        mx.clear_cache()  # a chunk's activations are large and their sizes do not come again
        progress(min(start + chunk, len(read)), len(read))
    return caches


def fresh_cache(model: Model, kv: KVQuantization | None) -> list[Any]:
    """mlx-lm's caches of a model that has read nothing."""
    return _quantized(make_prompt_cache(model), kv)


def _quantized(cache: list[Any], kv: KVQuantization | None) -> list[Any]:
    if kv is None:
        return cache
    try:
        return [
            layer.to_quantized(group_size=kv.group_size, bits=kv.bits)
            if hasattr(layer, "to_quantized")
            else layer
            for layer in cache
        ]
    except ValueError as error:
        raise UsageError(
            f"Keys and values cannot be quantised in groups of {kv.group_size}: a head's dimension "
            "is no multiple of it.",
            hint="Choose another --kv-group-size: 32, 64 or 128.",
        ) from error
