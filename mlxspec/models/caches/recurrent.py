"""States of recurrent layers: one after each row of a round, of which committing picks one.

A state has no positions, so a row that went in cannot be hidden. The pass that verifies therefore
keeps the state after each of its rows. A model writes only the last state; `recurrences` records
the others without changing the model.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache

from mlxspec.models.caches.positional import UNBOUNDED, Places


class States(NamedTuple):
    """A state after each row of a pass: N arrays, each with the batch as its first axis."""

    after: tuple[mx.array, ...]

    @property
    def last(self) -> mx.array:
        return self.after[-1]

    def then(self, later: Trail) -> States:
        """The trail of both passes, one after the other."""
        return States(self.after + later.after)

    def at(self, kept: mx.array) -> mx.array:
        """The state after the first `kept` rows, int32 [B], each at least 1."""
        states = mx.stack(list(self.after), axis=1)
        return mx.take_along_axis(states, _shaped(kept - 1, states.ndim), axis=1).squeeze(1)


class Tail(NamedTuple):
    """A state that is the last rows of what a layer was fed, such as a convolution's.

    rows: the state before a pass, then the pass's rows, along `axis`. width: the number of rows
    in a state; it follows from shapes, so it may stand among a graph's inputs.
    """

    rows: mx.array
    width: int
    axis: int

    @property
    def last(self) -> mx.array:
        return _part(self.rows, self.axis, self.rows.shape[self.axis] - self.width)

    @property
    def after(self) -> tuple[mx.array, ...]:
        """The state after each row, as in `States`."""
        fed = self.rows.shape[self.axis] - self.width
        return tuple(
            mx.split(self.rows, [i, i + self.width], axis=self.axis)[1] for i in range(1, fed + 1)
        )

    def then(self, later: Trail) -> Trail:
        """The trail of both passes, one after the other."""
        if isinstance(later, States):
            return States(self.after + later.after)
        new = _part(later.rows, self.axis, self.width)
        return self._replace(rows=mx.concatenate([self.rows, new], axis=self.axis))

    def at(self, kept: mx.array) -> mx.array:
        """The state after the first `kept` rows, int32 [B], each at least 1."""
        places = mx.arange(self.width)
        shape = [1] * self.rows.ndim
        shape[self.axis] = self.width
        index = _shaped(kept, self.rows.ndim) + places.reshape(shape)
        return mx.take_along_axis(self.rows, index, axis=self.axis)


Trail = States | Tail


class RecurrentLayer(NamedTuple):
    """The states of a layer, each with the batch as its first axis.

    states: after the last row that was fed; None before the first one, as in mlx-lm, whose layer
        may treat None differently from zeros.
    trails: between a pass and its commit, the way back: one trail for each state.
    """

    states: tuple[mx.array | None, ...]
    trails: tuple[Trail, ...] = ()

    @classmethod
    def adopted(cls, cache: ArraysCache, capacity: int) -> RecurrentLayer:
        return cls(tuple(_states_of(cache)))

    def unread(self) -> RecurrentLayer:
        """The layer as before its first row; call it between a pass and its commit."""
        both = zip(self.states, self.trails, strict=True)
        return RecurrentLayer(
            tuple(
                None if isinstance(trail, States) or state is None else mx.zeros_like(state)
                for state, trail in both
            )
        )

    def grown(self, capacity: int) -> RecurrentLayer:
        return self

    @property
    def capacity(self) -> int:
        return UNBOUNDED

    def opened(self, places: Places, length: int) -> RecurrentCache:
        return RecurrentCache(self)

    def committed(self, kept: mx.array | None) -> RecurrentLayer:
        """The layer after the first `kept` rows since the last commit: int32 [B]; None is all."""
        if kept is None:
            return RecurrentLayer(self.states)
        return RecurrentLayer(tuple(trail.at(kept) for trail in self.trails))


class RecurrentCache(ArraysCache):
    """The view of a `RecurrentLayer` that an mlx-lm layer gets during one forward pass."""

    def __init__(self, layer: RecurrentLayer) -> None:
        super().__init__(len(layer.states))
        for i, state in enumerate(layer.states):
            self[i] = state
        self._earlier = layer.trails
        self.trails: tuple[Trail, ...] = ()  # of this pass; `Recording.settle` sets them

    @property
    def states(self) -> list[mx.array]:
        return _states_of(self)

    @property
    def layer(self) -> RecurrentLayer:
        trails = self.trails
        if self._earlier:
            both = zip(self._earlier, self.trails, strict=True)
            trails = tuple(earlier.then(later) for earlier, later in both)
        return RecurrentLayer(tuple(self.states), trails)


def _states_of(cache: ArraysCache) -> list[mx.array]:
    states: list[Any] = cache.cache
    return states


def _shaped(numbers: mx.array, dimensions: int) -> mx.array:
    """[B] as an index along any other axis: [B, 1, …]."""
    return numbers.reshape(-1, *[1] * (dimensions - 1))


def _part(array: mx.array, axis: int, start: int) -> mx.array:
    """`array` from `start` on along `axis`."""
    return mx.split(array, [start], axis=axis)[1] if start else array
