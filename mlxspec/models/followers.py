"""What reads a text along with a model, from the outputs of its modules: heads, and their pasts.

A past is a tree of arrays. A `FullLayer` in it has an entry for each position that depends on the
tokens up to it alone, so it grows, and texts that begin alike share it. All else is the past at one
place as a whole: its states, of which a `RingLayer` can go back as long as it holds all positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import mlx.core as mx

from mlxspec.models.caches.positional import UNBOUNDED, FullLayer, RingLayer
from mlxspec.models.taps import Features

Leaf = FullLayer | RingLayer | mx.array


class Follower(Protocol):
    """Reads a text along with a model, piece by piece.

    taps: names of the model's modules whose outputs it reads. names: tell its pasts from those of
        others.
    """

    taps: Sequence[str]
    names: Sequence[str]

    def begin(self) -> Any:
        """The past of one text of which nothing was read."""

    def read(self, past: Any, tokens: mx.array, features: Features, at: int) -> Any:
        """The past after int32 [1, N] `tokens` from position `at` on; [1, N, D] by tap."""


class Nobody:
    """Reads nothing along."""

    taps: Sequence[str] = ()
    names: Sequence[str] = ()

    def begin(self) -> Any:
        return {}

    def read(self, past: Any, tokens: mx.array, features: Features, at: int) -> Any:
        return past


NOBODY = Nobody()


def changed(past: Any, change: Callable[[Leaf], Leaf]) -> Any:
    """A past of the same form, with each layer and each array outside of layers changed."""
    if isinstance(past, FullLayer | RingLayer | mx.array):
        return change(past)
    if isinstance(past, dict):
        return {name: changed(one, change) for name, one in past.items()}
    if isinstance(past, tuple | list):
        return _of_kind(past, [changed(one, change) for one in past])
    return past


def leaves(past: Any) -> list[Leaf]:
    """The layers and arrays of a past, in an order that its form decides."""
    found: list[Leaf] = []

    def add(leaf: Leaf) -> Leaf:
        found.append(leaf)
        return leaf

    changed(past, add)
    return found


def grown(past: Any, capacity: int) -> Any:
    """A past with room for `capacity` positions in each of its layers."""
    return changed(past, lambda leaf: leaf if isinstance(leaf, mx.array) else leaf.grown(capacity))


def room_of(past: Any) -> int:
    """The number of positions that all layers of a past have room for."""
    layers = (leaf for leaf in leaves(past) if not isinstance(leaf, mx.array))
    return min((layer.capacity for layer in layers), default=UNBOUNDED)


def typed(like: Any, past: Any) -> Any:
    """A past with the types of another of the same form, which `mx.compile` turns into tuples."""
    if isinstance(like, dict):
        return {name: typed(like[name], one) for name, one in past.items()}
    if isinstance(like, tuple | list):
        return _of_kind(like, [typed(*both) for both in zip(like, past, strict=True)])
    return past


def goes_back(past: Any, read: int) -> bool:
    """Whether a past of `read` positions is also that of any fewer."""
    return all(
        isinstance(leaf, FullLayer) or (isinstance(leaf, RingLayer) and read <= leaf.keys.shape[2])
        for leaf in leaves(past)
    )


def _of_kind(like: tuple[Any, ...] | list[Any], values: list[Any]) -> Any:
    return type(like)(*values) if hasattr(like, "_fields") else type(like)(values)
