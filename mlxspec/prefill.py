"""Reading the prompt: mlx-lm's own caches, filled in chunks, before the first round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from mlxspec.caches.original import fresh_cache, quantized
from mlxspec.errors import OutOfMemory
from mlxspec.memory import watched
from mlxspec.network import Network

# Rows per pass: what mlx-lm uses under speculation, and often enough for a progress bar.
CHUNK = 512
SMALLEST_CHUNK = 16

Progress = Callable[[int, int], None]
Note = Callable[[str], None]


class Reading(NamedTuple):
    """What a network has to read. Tokens that it does not have it is shown its last one for."""

    network: Network
    tokens: Sequence[int]


def prefill(
    readings: Sequence[Reading],
    *,
    progress: Progress | None = None,
    note: Note | None = None,
) -> list[list[Any]]:
    """Let every network read its tokens.

    Where memory runs out, it begins again with chunks of half the size. Keys and values are
    quantised after every chunk, where a network's are.

    Args:
        progress: called with (tokens read, tokens in all) of the first, after every chunk.
        note: called with what a person should know.

    Returns:
        For each network, mlx-lm's caches, evaluated.

    Raises:
        OutOfMemory: not even the smallest chunk fits.
    """
    chunk = CHUNK
    while True:
        try:
            return _read(readings, chunk, progress or (lambda *_: None))
        except OutOfMemory:
            chunk //= 2
            if chunk < SMALLEST_CHUNK:
                raise
        if note is not None:
            note(f"memory ran out while reading the prompt: reading {chunk} tokens at a time")


def _read(readings: Sequence[Reading], chunk: int, progress: Progress) -> list[list[Any]]:
    caches = [fresh_cache(network.model, None) for network, _ in readings]
    length = len(readings[0].tokens)
    for start in range(0, length, chunk):
        with watched("reading the prompt"):
            for (network, tokens), cache in zip(readings, caches, strict=True):
                if start < len(tokens):
                    rows = mx.array([tokens[start : start + chunk]], mx.int32)
                    network.model(mx.minimum(rows, network.vocabulary - 1), cache=cache)
                    cache[:] = quantized(cache, network.kv)
            mx.eval([layer.state for cache in caches for layer in cache])
        mx.clear_cache()  # a chunk's activations are large and their sizes do not come again
        progress(min(start + chunk, length), length)
    return [quantized(cache, one.network.kv) for one, cache in zip(readings, caches, strict=True)]
