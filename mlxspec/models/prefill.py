"""Prefill: mlx-lm's own caches are filled piece by piece."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Sequence
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx

from mlxspec.device.kernels import on_cpu
from mlxspec.device.memory import watched
from mlxspec.errors import OutOfMemory
from mlxspec.metrics import PrefillProgress, Tell, silent
from mlxspec.models.cached_model import CachedModel
from mlxspec.models.caches.original import fresh_cache, quantized
from mlxspec.models.followers import NOBODY, Follower
from mlxspec.models.pace import SIZES
from mlxspec.models.rotary import shared_angles
from mlxspec.models.taps import Taps

# The most rows of a pass, as in mlx-lm's speculative decoding. No pass reaches across a multiple.
CHUNK = SIZES[-1]
SMALLEST_CHUNK = 16
# A person who waits sees something move, and is heard, within half a second.
PIECE_S = 0.4
FIRST = 32  # rows of the first piece of all
LARGE = 128  # rows whose activations are not worth keeping

T = TypeVar("T")


class Reading(NamedTuple):
    """A model and the tokens that it has to read; for an id that it lacks it reads its last id.

    follower: what reads along.
    """

    cached: CachedModel
    tokens: Sequence[int]
    follower: Follower = NOBODY


class Begun(NamedTuple):
    """mlx-lm's caches of a model that has read the first `read` of its tokens.

    past: what the follower has read of them.
    """

    caches: list[Any]
    read: int
    past: Any


class Marks(NamedTuple):
    """Places of a text at which a piece ends, and who is told of the caches and the past there."""

    places: Collection[int] = ()
    reached: Callable[[int, list[Any], Any], None] = lambda at, caches, past: None


Begin = Callable[[Reading], Begun]


def afresh(reading: Reading) -> Begun:
    """Begin with empty caches."""
    return Begun(fresh_cache(reading.cached.model, None), 0, reading.follower.begin())


def prefill(
    reading: Reading,
    *,
    begin: Begin = afresh,
    marks: Marks = Marks(),  # noqa: B008 (nobody writes to it)
    tell: Tell = silent,
    piece_s: float | None = None,
    first: int = FIRST,
    strict: bool = False,
) -> Generator[PrefillProgress, None, tuple[list[Any], Any]]:
    """Let a model read its tokens.

    Where memory runs out, it begins again with pieces of half the size. Where the model's keys
    and values are quantised, that happens after every CHUNK.

    Args:
        begin: returns what was read before, in caches that may be written to; called whenever
            reading begins.
        marks: places at which it stops on its way.
        tell: called with notes for the user.
        piece_s: seconds that a piece should take; None reads CHUNK rows at a time. first: rows of a
            piece before any was timed.
        strict: no piece may take longer, however much that slows down the whole.

    Yields:
        The progress after every piece but the last.

    Returns:
        mlx-lm's caches and the follower's past, evaluated.

    Raises:
        OutOfMemory: not even the smallest piece fits.
    """
    pace = reading.cached.pace
    pace.begin()

    def most() -> int:
        return CHUNK if piece_s is None else pace.rows(piece_s, first, strict=strict)

    chunk = CHUNK
    while True:
        try:
            return (yield from _read(reading, begin, marks, chunk, most))
        except OutOfMemory:
            chunk //= 2
            if chunk < SMALLEST_CHUNK:
                raise
        tell(f"memory ran out while reading the prompt: reading {chunk} tokens at a time")


def alone_s() -> float | None:
    """The seconds of a piece of a text that is read while nobody else waits.

    None on a GPU, where the number of rows may decide how a pass rounds: the same text is read in
    the same pieces every time, so that its seed writes it again. On a CPU it is the same in any.
    """
    return PIECE_S if on_cpu() else None


def finished(steps: Generator[Any, None, T]) -> T:
    """Run a generator to its end, and return what it returns."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


def _read(
    reading: Reading,
    begin: Begin,
    marks: Marks,
    chunk: int,
    most: Callable[[], int],
) -> Generator[PrefillProgress, None, tuple[list[Any], Any]]:
    cached, tokens, follower = reading
    taps = Taps(cached.model, follower.taps)
    with watched("reading the prompt"):
        caches, at, past = begin(reading)
    while at < len(tokens):
        size = min(most(), chunk)
        stops = [place for place in marks.places if at < place]
        end = min((at // size + 1) * size, len(tokens), *stops)
        with watched("reading the prompt"):
            rows = mx.minimum(mx.array([tokens[at:end]], mx.int32), cached.vocabulary - 1)
            with taps.watching() as features, shared_angles():
                cached.model(rows, cache=caches)
            # Piece by piece, so that no more than one piece's features are in memory.
            past = follower.read(past, rows, features, at)
            del features
            if end % chunk == 0:
                caches[:] = quantized(caches, cached.kv)
            started = time.perf_counter()
            mx.eval([layer.state for layer in caches], past)
        cached.pace.took(end - at, time.perf_counter() - started)
        if end - at >= LARGE:
            mx.clear_cache()  # its activations are large, and their sizes do not recur
        at = end
        if at in marks.places:
            marks.reached(at, caches, past)
        if at < len(tokens):
            yield PrefillProgress(at, len(tokens))
    return quantized(caches, cached.kv), past
