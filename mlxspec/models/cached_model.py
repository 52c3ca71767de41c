"""A model together with its caches.

Two kinds serve a round alike: `FusedModel` keeps the past in arrays that are part of the round's
graph; `HostedModel` keeps it in mlx-lm's own caches, for models that the first would not run
exactly. `cached_model_of` tries a model and chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol, cast

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxspec.errors import UnsupportedModel
from mlxspec.models.caches.hosted import HostedLayers, Pass
from mlxspec.models.caches.layers import (
    Layers,
    adopt,
    commit,
    each,
    flat,
    grow,
    stack,
    unknown,
    unread,
)
from mlxspec.models.caches.original import Model, fresh_cache
from mlxspec.models.caches.peculiarities import RECURRENCES, obstacle_of
from mlxspec.models.caches.positional import Places
from mlxspec.models.caches.recurrences import Unrecognised, hooks_of, recording
from mlxspec.models.caches.recurrent import RecurrentCache
from mlxspec.models.context import guard_tables
from mlxspec.models.pace import Pace
from mlxspec.models.rotary import shared_angles
from mlxspec.params import KVQuantization

# Cache entries in trial passes: more than any layer's indexer selects, so that it must select.
_TRIAL_ENTRIES = 2304


class CachedModel(Protocol):
    """The interface of a model for a round.

    model: the mlx-lm model. kv: the quantisation of its keys and values, or None.
    vocabulary: V, the number of logits in a row.
    fused: whether its passes can be part of a graph that never waits for the host.
    beside: whether a pass over several texts gives each what it would get alone; tried once.
    obstacle: the reason why they cannot, in words; empty where they can.
    pace: the speed at which it was seen to read.
    exact: whether it was seen to take rows back exactly; None before that was tried.
    """

    model: Model
    kv: KVQuantization | None
    vocabulary: int
    fused: bool
    obstacle: str
    pace: Pace
    exact: bool | None

    @property
    def beside(self) -> bool: ...

    def adopt(self, caches: list[Any], read: int, capacity: int) -> Layers:
        """Layers from mlx-lm caches that have read `read` tokens, with room for `capacity`."""

    def forward(
        self, tokens: mx.array, layers: Layers, offset: mx.array, length: int
    ) -> tuple[mx.array, Layers]:
        """Run int32 [B, N] `tokens` at the positions from `offset`, int32 [B], on.

        Args:
            length: the number of entries to attend over, at least offset + N of every row. It
                shapes the graph, so it should change rarely.

        Returns:
            Logits [B, N, V], and the layers with these rows, to be committed.
        """

    def commit(self, layers: Layers, kept: mx.array | None) -> Layers:
        """Take back all but the first `kept` rows since the last commit: int32 [B], at least 1.

        None keeps all of them.
        """


class FusedModel:
    """Keeps a model's past in arrays: each of its caches must be of a known kind."""

    fused = True
    obstacle = ""

    def __init__(self, model: Model, kv: KVQuantization | None = None) -> None:
        self.model = model
        self.kv = kv
        self.pace = Pace()
        self.exact: bool | None = None
        self._hooks = hooks_of(model, RECURRENCES)
        # A cache has no shape before its first row, and a state's kind shows in the second.
        row = mx.zeros((1, 1), mx.int32)
        caches = fresh_cache(model, kv)
        self.vocabulary = int(model(row, cache=caches).shape[-1])
        _, layers = self.forward(row, adopt(caches, 2), mx.array([1], mx.int32), 2)
        self._unread = unread(layers)

    def adopt(self, caches: list[Any], read: int, capacity: int) -> Layers:
        return adopt(caches, capacity) if read else grow(self._unread, capacity)

    def forward(
        self, tokens: mx.array, layers: Layers, offset: mx.array, length: int
    ) -> tuple[mx.array, Layers]:
        places = Places(offset)
        caches = each(lambda layer: layer.opened(places, length), layers)
        recurrent = [cache for cache in flat(caches) if isinstance(cache, RecurrentCache)]
        with shared_angles():
            if recurrent:
                with recording(self._hooks) as record:
                    logits = self.model(tokens, cache=caches)
                record.settle(recurrent, rows=tokens.shape[1])
            else:
                logits = self.model(tokens, cache=caches)
        return logits, each(lambda cache: cache.layer, caches)

    def commit(self, layers: Layers, kept: mx.array | None) -> Layers:
        return commit(layers, kept)

    @cached_property
    def beside(self) -> bool:
        try:
            return _is_the_same_beside(self)
        except ValueError:  # MLX's, for shapes that do not fit
            return False

    def trace(self) -> None:
        """Trace a pass as a compiled round does; raises where a model needs a value on the host."""

        def build(tokens: mx.array, layers: Layers, offset: mx.array) -> mx.array:
            return self.forward(tokens, layers, offset, _TRIAL_ENTRIES)[0]

        layers = grow(self._unread, _TRIAL_ENTRIES)
        mx.compile(build)(mx.zeros((1, 2), mx.int32), layers, mx.zeros((1,), mx.int32))


class HostedModel:
    """Keeps a model's past in mlx-lm's own caches, for one sequence."""

    fused = False
    beside = False

    def __init__(
        self, model: Model, kv: KVQuantization | None = None, obstacle: str = "it was asked for"
    ) -> None:
        self.model = model
        self.kv = kv
        self.pace = Pace()
        self.exact: bool | None = None
        self.obstacle = obstacle
        rows = mx.zeros((1, 1), mx.int32)
        self.vocabulary = int(model(rows, cache=fresh_cache(model, kv)).shape[-1])

    def adopt(self, caches: list[Any], read: int, capacity: int) -> Layers:
        return [HostedLayers(caches)]

    def forward(
        self, tokens: mx.array, layers: Layers, offset: mx.array, length: int
    ) -> tuple[mx.array, Layers]:
        (held,) = layers
        caches = held.copied()
        logits = self.model(tokens, cache=caches)
        return logits, [HostedLayers(caches, (*held.passes, Pass(held.caches, tokens)))]

    def commit(self, layers: Layers, kept: mx.array | None) -> Layers:
        (held,) = layers
        fed = sum(one.tokens.shape[1] for one in held.passes)
        # One row at least is kept, so there is nothing to wait for where only one was fed.
        left = cast(int, kept.item()) if kept is not None and fed > 1 else fed
        if left == fed:
            return [HostedLayers(held.caches)]
        for one in held.passes:
            rows = one.tokens.shape[1]
            if left < rows:
                return self._again(one, left)
            left -= rows
        raise AssertionError("more rows are kept than were fed")

    def _again(self, back: Pass, rows: int) -> Layers:
        """The layers after the first `rows` of a pass."""
        before = HostedLayers(back.caches)
        if rows == 0:
            return [before]
        _, (after,) = self.forward(back.tokens[:, :rows], [before], mx.array([0]), 0)
        return [HostedLayers(after.caches)]


def cached_model_of(
    model: Model, kv: KVQuantization | None = None, *, speculates: bool = True
) -> CachedModel:
    """The cached model that runs `model` exactly, fused if it can be.

    A model with known caches is tried: passes whose rows are partly taken back must give the
    logits of plain decoding. So neither an unknown use of a cache nor a wrongly recorded
    recurrence can go unnoticed.

    Args:
        speculates: False leaves out what plain decoding never does: several rows in a pass, and
            taking rows back. `is_exact` tries it when it is asked for.
    """
    guard_tables(model)
    oracle = Oracle(model, kv)
    strangers = unknown(fresh_cache(model, kv))
    if strangers:
        why = f"its past is kept in {', '.join(strangers)}"
    elif not (why := obstacle_of(model)):
        try:
            fused = FusedModel(model, kv)
            fused.trace()
            if agrees(fused, oracle, SPECULATING if speculates else PLAIN):
                fused.exact = True if speculates else None
                return fused
            why = "rounds of it would differ from plain decoding"
        except Unrecognised:
            why = "its recurrence is not one that can be recorded"
        except (TypeError, ValueError, AttributeError) as error:
            # Where a model computes with a cache's numbers instead of arrays, anything is raised.
            why = f"it asks for numbers while a round is built ({type(error).__name__})"
    hosted = HostedModel(model, kv, why)
    if speculates:
        hosted.exact = agrees(hosted, oracle, SPECULATING)
    return hosted


class Step(NamedTuple):
    """Passes of so many rows each from the position `start` on, of which `kept` rows stay."""

    start: int
    passes: tuple[int, ...]
    kept: int


# The steps of a trial, in parts that are judged one by one. Three rows: in one pass, as a target
# runs them; in two, as a draft does; in one again.
SPECULATING = ((Step(0, (3,), 1),), (Step(1, (2, 1), 2),), (Step(3, (3,), 1),))
PLAIN = (tuple(Step(at, (1,), 1) for at in range(3)),)


class Oracle:
    """The logits of plain decoding, on mlx-lm's own caches: a row is computed once, when asked."""

    def __init__(self, model: Model, kv: KVQuantization | None) -> None:
        self._model = model
        self._caches = fresh_cache(model, kv)
        self._rows: list[mx.array] = []

    def rows(self, tokens: mx.array, start: int, stop: int) -> mx.array:
        """Logits [1, stop - start, V] at these places of a text that begins with `tokens`."""
        for at in range(len(self._rows), stop):
            self._rows.append(self._model(tokens[:, at : at + 1], cache=self._caches))
        return mx.concatenate(self._rows[start:stop], axis=1)


def agrees(cached: CachedModel, oracle: Oracle, parts: Sequence[Sequence[Step]]) -> bool:
    """Whether passes of these steps, and taking rows back, give the logits of plain decoding."""
    count = max(step.start + sum(step.passes) for part in parts for step in part)
    tokens = mx.array([[(7 * i + 1) % cached.vocabulary for i in range(count)]], mx.int32)
    layers = cached.adopt(fresh_cache(cached.model, cached.kv), 0, _TRIAL_ENTRIES)
    for part in parts:
        found: list[mx.array] = []
        expected: list[mx.array] = []
        for step in part:
            at = step.start
            for rows in step.passes:
                fed, offset = tokens[:, at : at + rows], mx.array([at], mx.int32)
                logits, layers = cached.forward(fed, layers, offset, _TRIAL_ENTRIES)
                found.append(logits)
                at += rows
            expected.append(oracle.rows(tokens, step.start, at))
            layers = cached.commit(layers, mx.array([step.kept], mx.int32))
        if not _close(mx.concatenate(found, axis=1), mx.concatenate(expected, axis=1)):
            return False
    return True


def is_exact(cached: CachedModel) -> bool:
    """Whether the model takes rows back exactly. It is tried once."""
    if cached.exact is None:
        cached.exact = agrees(cached, Oracle(cached.model, cached.kv), SPECULATING)
    return cached.exact


def _is_the_same_beside(cached: CachedModel) -> bool:
    """Whether a pass over two texts at different places gives the logits of each alone."""
    texts = [[(5 * i + 1) % cached.vocabulary for i in range(count)] for count in (5, 3)]
    alone, pasts = [], []
    for text in texts:
        layers = cached.adopt(fresh_cache(cached.model, cached.kv), 0, _TRIAL_ENTRIES)
        rows, at = mx.array([text], mx.int32), len(text) - 2
        _, layers = cached.forward(rows[:, :at], layers, mx.array([0]), _TRIAL_ENTRIES)
        pasts.append(cached.commit(layers, None))
        logits, _ = cached.forward(rows[:, at:], pasts[-1], mx.array([at]), _TRIAL_ENTRIES)
        alone.append(logits)
    last = mx.array([text[-2:] for text in texts], mx.int32)
    offsets = mx.array([len(text) - 2 for text in texts], mx.int32)
    beside, _ = cached.forward(last, stack(pasts), offsets, _TRIAL_ENTRIES)
    return all(_close(beside[row : row + 1], one) for row, one in enumerate(alone))


def _close(found: mx.array, expected: mx.array) -> bool:
    """Whether most rows differ by rounding only: [1, N, V] each.

    Rounding may send a row to another expert. An error in a past or a mask shows in more than one
    row.
    """
    tolerance = 1e-2 if expected.dtype == mx.float32 else 0.1
    found, expected = (mx.nan_to_num(x.astype(mx.float32), 0, 0, 0) for x in (found, expected))
    spread = mx.linalg.norm(expected - expected.mean(axis=-1, keepdims=True), axis=-1)
    error = mx.linalg.norm(found - expected, axis=-1)
    return 2 * int(mx.sum(error <= tolerance * spread + 1e-6)) > found.shape[1]


def require_exact(cached: CachedModel) -> None:
    """Raise UnsupportedModel unless the model can take proposals back exactly."""
    if not is_exact(cached):
        raise UnsupportedModel(
            f"{_type_of(cached.model)} says something else when it is fed several tokens at once, "
            "so that it cannot speculate exactly.",
            hint="Use --no-speculation, or another model.",
        )


def why_it_waits(cached: CachedModel) -> str:
    """A note for the user on why a model is not fused."""
    return (
        f"{_type_of(cached.model)} runs on mlx-lm's own caches, and rounds wait for it: "
        f"{cached.obstacle}"
    )


def kind_of(model: Model) -> str:
    """The types of a model, its weights and its caches, which decide a round's operations."""
    arrays: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    numbers = sorted({str(array.dtype) for array in arrays.values()})
    caches = sorted({type(cache).__name__ for cache in fresh_cache(model, None)})
    return f"{_type_of(model)} {numbers} {caches}"


def _type_of(model: Model) -> str:
    return str(getattr(model, "model_type", type(model).__module__.rpartition(".")[2]))
