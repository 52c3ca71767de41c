"""A past that outlasts its text, in the form in which another text can begin from it.

Full attention leaves an entry for each position, and that depends on the tokens up to it alone. So
texts that begin alike have entries in common, and may take any number of the first ones. What other
caches hold, such as a window or a state, is the past at one place as a whole: the *rest*.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import count
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import ChunkedKVCache, KVCache, QuantizedKVCache, RotatingKVCache

from mlxspec.models.cached_model import CachedModel, is_exact
from mlxspec.models.caches.layers import Layers, flat
from mlxspec.models.caches.original import fresh_cache
from mlxspec.models.caches.positional import FullLayer, QuantizedLayer
from mlxspec.models.followers import Follower, Leaf, changed, goes_back, leaves
from mlxspec.models.prefill import CHUNK, Begun, Reading

POSITION = 2  # the axis of positions in every array of entries


class Entries:
    """What some positions in a row have left: nothing in it is written to.

    Args:
        arrays: [1, heads, length, D] each: those of a layer by its place among all caches, and of a
            follower's by its name too.
        length: the number of positions.
    """

    def __init__(self, arrays: dict[str, list[mx.array]], length: int) -> None:
        self.arrays = arrays
        self.length = length

    @cached_property
    def nbytes(self) -> int:
        return sum(array.nbytes for some in self.arrays.values() for array in some)

    def size(self, start: int, stop: int) -> int:
        """The bytes of some of the positions."""
        return self.nbytes // self.length * (stop - start) if self.length else 0

    def part(self, start: int, stop: int) -> Entries:
        """Some of the positions, in memory of their own."""
        return Entries(tree_map(lambda one: _part(one, start, stop), self.arrays), stop - start)

    def divided(self, at: int) -> tuple[Entries, Entries]:
        """Both parts, in memory of their own; these entries are empty then."""
        first: dict[str, list[mx.array]] = {name: [] for name in self.arrays}
        second: dict[str, list[mx.array]] = {name: [] for name in self.arrays}
        for name, some in self.arrays.items():
            while some:  # one by one, so that no more than one array is there twice
                one = some.pop(0)
                first[name].append(_part(one, 0, at))
                second[name].append(_part(one, at, self.length))
        return Entries(first, at), Entries(second, self.length - at)


def joined(parts: Sequence[Entries], length: int) -> Entries:
    """The first `length` positions of several parts in a row, as new arrays."""
    starts = [sum(part.length for part in parts[:index]) for index in range(len(parts))]
    needed = [part for part, start in zip(parts, starts, strict=True) if start < length]
    last = length - starts[len(needed) - 1]

    def one(*arrays: mx.array) -> mx.array:
        cut = [*arrays[:-1], _between(arrays[-1], 0, last)]
        return mx.concatenate(cut, axis=POSITION) if len(cut) > 1 else cut[0]

    return Entries(tree_map(one, *[part.arrays for part in needed]), length)


class Rest(NamedTuple):
    """What a past holds at one place beside its entries.

    states: of each cache that is not made of entries, and behind them those of a follower's past.
    cuts: whether it can go back to any earlier place.
    """

    states: list[Any]
    cuts: bool

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in _arrays_in(self.states))


class Kept(NamedTuple):
    """The past of a model after the first `read` tokens of a text."""

    read: int
    entries: Entries
    rest: Rest

    def size(self, start: int = 0) -> int:
        """The bytes of it from a position on, the rest included."""
        return self.entries.size(start, self.read) + self.rest.nbytes


NO_REST = Rest([], cuts=True)


def needs_rest(reading: Reading) -> bool:
    """Whether a past is more than entries, so that a text can go on from some places alone."""
    cached = reading.cached
    caches = flat(fresh_cache(cached.model, cached.kv))
    others = any(not _has_entries(cached, cache) for cache in caches)
    return others or any(not isinstance(one, FullLayer) for one in leaves(reading.follower.begin()))


def rest_of(cached: CachedModel, caches: list[Any], past: Any, read: int) -> Rest:
    """The rest of a past at this place, in memory of its own.

    Args:
        past: the follower's. read: how many tokens both have read.
    """
    others = [cache for cache in flat(caches) if not _has_entries(cached, cache)]
    states = tree_map(_owned, [_state_of(cache) for cache in others] + _states_in(past))
    mx.eval(_arrays_in(states))
    # Only of a fused model is it known that entries past a position leave no trace.
    cuts = cached.fused and all(cache.is_trimmable() for cache in others)
    return Rest(states, cuts and goes_back(past, read))


def kept_of(reading: Reading, caches: list[Any], past: Any) -> Kept:
    """The past of all tokens of a reading. Its entries are those of the caches, not copied yet.

    Args:
        past: the follower's.
    """
    cached, read = reading.cached, len(reading.tokens)
    arrays = {
        str(place): [] if cache.empty() else _arrays_in(cache.keys_and_values())
        for place, cache in enumerate(flat(caches))
        if _has_entries(cached, cache)
    }
    arrays |= _entries_in(reading.follower, past, 0, read)
    return Kept(read, Entries(arrays, read), rest_of(cached, caches, past, read))


def kept_of_row(reading: Reading, layers: Layers, past: Any, row: int) -> Kept | None:
    """The past of one row of a round's storage; None where it is more than entries.

    Args:
        reading: the tokens whose positions are certain. Rounds that are under way write behind
            them.
        past: the follower's.
    """
    read = len(reading.tokens)
    if not all(isinstance(leaf, FullLayer) for leaf in leaves(past)):
        return None
    arrays = _entries_in(reading.follower, past, row, read)
    for place, layer in enumerate(flat(layers)):
        if not isinstance(layer, FullLayer | QuantizedLayer):
            return None
        whole = _arrays_in(layer)
        used = whole[0].size > 0  # a layer that never writes has no width
        arrays[str(place)] = [one[row : row + 1, :, :read] for one in whole if used]
    return Kept(read, Entries(arrays, read), NO_REST)


def resumed(reading: Reading, kept: Kept, common: int) -> Begun | None:
    """The caches of a model that has read the first `common` tokens; None where they cannot be had.

    Args:
        common: how many tokens both texts have in common before they part, at most `kept.read`.
    """
    cached, arrays = reading.cached, kept.entries.arrays
    goes_on = common == len(reading.tokens) or _can_go_on(cached, common)
    reaches = common == kept.read or kept.rest.cuts
    follows = all(name in arrays for name in reading.follower.names)
    if not (common and goes_on and reaches and follows):
        return None
    caches, states = fresh_cache(cached.model, cached.kv), iter(kept.rest.states)
    for place, cache in enumerate(flat(caches)):
        if _has_entries(cached, cache):
            _fill(cache, [_between(one, 0, common) for one in arrays[str(place)]], common)
        else:
            _set_state(cache, tree_map(_handle, next(states)))
            if common < kept.read:
                cache.trim(kept.read - common)
    return Begun(caches, common, _past_from(reading.follower, arrays, states, common))


def without_form(caches: list[Any]) -> str:
    """The kinds of caches that hold something else than arrays and numbers, in words."""
    plain = (mx.array, int, float, str, type(None))
    kinds = {
        type(cache).__name__
        for cache in flat(caches)
        if not all(isinstance(one, plain) for one in _leaves(_state_of(cache)))
    }
    return ", ".join(sorted(kinds))


def _name_of(follower: Follower, place: int) -> str:
    return f"{' '.join(follower.names)}.{place}"


def _entries_in(follower: Follower, past: Any, row: int, read: int) -> dict[str, list[mx.array]]:
    """The entries of a row of a follower's past, and its names, so that its pasts are known."""
    arrays: dict[str, list[mx.array]] = {name: [] for name in follower.names}
    for place, leaf in enumerate(leaves(past)):
        if isinstance(leaf, FullLayer):
            arrays[_name_of(follower, place)] = [one[row : row + 1, :, :read] for one in leaf]
    return arrays


def _states_in(past: Any) -> list[Any]:
    """What a follower's past holds beside its entries."""
    others = [leaf for leaf in leaves(past) if not isinstance(leaf, FullLayer)]
    return [leaf if isinstance(leaf, mx.array) else list(leaf) for leaf in others]


def _past_from(
    follower: Follower, arrays: dict[str, list[mx.array]], states: Iterator[Any], read: int
) -> Any:
    """A follower's past after `read` tokens, from its entries and its states."""
    places = count()

    def taken(leaf: Leaf) -> Leaf:
        place = next(places)
        if isinstance(leaf, FullLayer):
            held = arrays[_name_of(follower, place)]
            parts = [_between(one, 0, read) for one in held]
            return FullLayer(*(_written(*both) for both in zip(leaf, parts, strict=True)))
        state = tree_map(_handle, next(states))
        return state if isinstance(leaf, mx.array) else type(leaf)(*state)

    return changed(follower.begin(), taken)


def _written(array: mx.array, first: mx.array) -> mx.array:
    """Entries with other ones in the first places."""
    return mx.slice_update(array, first, mx.array([0]), axes=(POSITION,))


def _has_entries(cached: CachedModel, cache: Any) -> bool:
    # What a model that is not fused does with its caches is not known.
    return cached.fused and type(cache) in (KVCache, QuantizedKVCache)


def _can_go_on(cached: CachedModel, read: int) -> bool:
    """Whether reading on after `read` tokens gives the same as reading from the beginning."""
    # The first chunk attends to keys and values that are not quantised yet.
    if cached.kv is not None and read < CHUNK:
        return False
    return is_exact(cached)


def _fill(cache: Any, arrays: list[mx.array], length: int) -> None:
    """Give a new cache its entries."""
    if not arrays:
        return
    if type(cache) is KVCache:
        cache.state = (*arrays, length)
    else:
        cache.state = (tuple(arrays[:3]), tuple(arrays[3:]), length, cache.group_size, cache.bits)


def _state_of(cache: Any) -> Any:
    if not _is_settable(cache):
        return dict(vars(cache))
    keys = getattr(cache, "keys", None)
    if keys is None:
        return cache.state
    if type(cache) in (KVCache, QuantizedKVCache, ChunkedKVCache):
        return (*cache.keys_and_values(), *cache.state[2:])  # without the room behind them
    if type(cache) is RotatingKVCache and not cache.keep:
        size = keys.shape[POSITION]
        if size == cache._idx > cache.max_size:  # more than any later row will see
            last = [_between(one, size - cache.max_size, size) for one in cache.state[:2]]
            return (*last, cache.offset, cache.keep, cache.max_size, cache.max_size)
    return cache.state


def _set_state(cache: Any, state: Any) -> None:
    if _is_settable(cache):
        cache.state = state
    else:
        vars(cache).update(state)


def _is_settable(cache: Any) -> bool:
    settable: bool = type(cache).state.fset is not None
    return settable


def _arrays_in(tree: Any) -> list[mx.array]:
    return [one for one in _leaves(tree) if isinstance(one, mx.array)]


def _leaves(tree: Any) -> list[Any]:
    leaves: dict[str, Any] = dict(tree_flatten([tree]))
    return list(leaves.values())


def _part(array: mx.array, start: int, stop: int) -> mx.array:
    part: mx.array = _owned(_between(array, start, stop))
    mx.eval(part)
    return part


def _between(array: mx.array, start: int, stop: int) -> mx.array:
    return array[:, :, start:stop]


def _owned(value: Any) -> Any:
    """An array in memory of its own: one that is part of a larger one would keep all of it."""
    if not isinstance(value, mx.array) or value.ndim == 0 or value.size == 0:
        return value
    return mx.slice_update(mx.zeros_like(value), value, mx.array([0]), axes=(0,))


def _handle(value: Any) -> Any:
    """A new array with the same contents, so that the one held is not written to."""
    return mx.array(value) if isinstance(value, mx.array) else value
