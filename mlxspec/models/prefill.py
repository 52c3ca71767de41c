"""Prefill: mlx-lm's own caches are filled in chunks before the first round."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx

from mlxspec.device.memory import watched
from mlxspec.errors import OutOfMemory
from mlxspec.metrics import PrefillProgress, Tell, silent
from mlxspec.models.cached_model import CachedModel
from mlxspec.models.caches.original import fresh_cache, quantized
from mlxspec.models.taps import Features, Taps

# Rows per pass: as in mlx-lm's speculative decoding, and few enough for a progress bar.
CHUNK = 512
SMALLEST_CHUNK = 16

T = TypeVar("T")


class Reading(NamedTuple):
    """A model and the tokens that it has to read; for an id that it lacks it reads its last id."""

    cached: CachedModel
    tokens: Sequence[int]


class Begun(NamedTuple):
    """mlx-lm's caches of a model that has read the first `read` of its tokens."""

    caches: list[Any]
    read: int


Begin = Callable[[Reading], Begun]


def afresh(reading: Reading) -> Begun:
    """Begin with empty caches."""
    return Begun(fresh_cache(reading.cached.model, None), 0)


def prefill(
    reading: Reading,
    *,
    begin: Begin = afresh,
    tell: Tell = silent,
    taps: Taps | None = None,
) -> Generator[PrefillProgress, None, tuple[list[Any], Features]]:
    """Let a model read its tokens.

    Where memory runs out, it begins again with chunks of half the size. Where the model's keys
    and values are quantised, that happens after every chunk.

    Args:
        begin: returns what was read before, in caches that may be written to; called whenever
            reading begins.
        tell: called with notes for the user.
        taps: modules that are watched while it reads.

    Yields:
        The progress after every chunk but the last.

    Returns:
        mlx-lm's caches, and the taps' features, [1, N, D] of all N tokens, evaluated.

    Raises:
        OutOfMemory: not even the smallest chunk fits.
    """
    chunk = CHUNK
    while True:
        try:
            return (yield from _read(reading, begin, chunk, taps))
        except OutOfMemory:
            chunk //= 2
            if chunk < SMALLEST_CHUNK:
                raise
        tell(f"memory ran out while reading the prompt: reading {chunk} tokens at a time")


def finished(steps: Generator[Any, None, T]) -> T:
    """Run a generator to its end, and return what it returns."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


def _read(
    reading: Reading, begin: Begin, chunk: int, taps: Taps | None
) -> Generator[PrefillProgress, None, tuple[list[Any], Features]]:
    cached, tokens = reading
    taps = taps or Taps(cached.model, ())
    seen: list[Features] = []
    with watched("reading the prompt"):
        caches, read = begin(reading)
    length = len(tokens)
    for start in range(read // chunk * chunk, length, chunk):
        with watched("reading the prompt"):
            if new := tokens[max(start, read) : start + chunk]:
                rows = mx.minimum(mx.array([new], mx.int32), cached.vocabulary - 1)
                with taps.watching() as features:
                    cached.model(rows, cache=caches)
                seen.append(features)
                caches[:] = quantized(caches, cached.kv)
            mx.eval([layer.state for layer in caches], seen)
        mx.clear_cache()  # a chunk's activations are large, and their sizes do not recur
        if start + chunk < length:
            yield PrefillProgress(start + chunk, length)
    names = seen[0] if seen else ()
    joined = {name: mx.concatenate([one[name] for one in seen], axis=1) for name in names}
    return quantized(caches, cached.kv), joined
