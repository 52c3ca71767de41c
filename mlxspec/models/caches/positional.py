"""Attention's past, addressed by a position on the device, where a rejection leaves no trace.

A round writes its rows at a position that only the device knows yet, and takes none of them back:
every mask is computed from that position, so an entry past it is invisible until a later round
overwrites it. Rolling back a rejected proposal therefore costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import mlx.core as mx
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache

from mlxspec.device.machine import backend

# Slots of a ring beyond its window, at least the rows of one round. It is constant, so that the
# window follows from the ring's size, and no number has to accompany the arrays.
SPARE = 65
UNBOUNDED = 2**31 - 1
# Rows of a batch that one scatter writes sooner than a write for each; both write in place. On CUDA
# a scatter into a large buffer takes far longer.
SCATTERED = 4


class Places:
    """The positions at which one pass writes, computed once for all layers.

    Args:
        offset: int32 [B], the position of its first row.
    """

    def __init__(self, offset: mx.array) -> None:
        self.offset = offset
        self._found: dict[tuple[int, int], mx.array] = {}
        self._starts: list[mx.array] = []

    def of(self, rows: int, size: int = UNBOUNDED) -> mx.array:
        """The position of each row, [B, 1, rows, 1]; its slot in a ring of some size."""
        if (rows, size) not in self._found:
            reach = (self.offset[:, None] + mx.arange(rows))[:, None, :, None]
            self._found[rows, size] = reach if size == UNBOUNDED else self.of(rows) % size
        return self._found[rows, size]

    @property
    def starts(self) -> list[mx.array]:
        """Of each text, its place in the batch and the position of its first row."""
        if not self._starts:
            one_by_one = enumerate(mx.split(self.offset, self.offset.shape[0]))
            self._starts = [
                mx.concatenate([mx.array([row], self.offset.dtype), start])
                for row, start in one_by_one
            ]
        return self._starts


class FullLayer(NamedTuple):
    """Keys and values of every position, [B, heads, capacity, dimension]."""

    keys: mx.array
    values: mx.array

    @classmethod
    def adopted(cls, cache: KVCache, capacity: int) -> FullLayer:
        if cache.keys is None:  # of a layer that never writes to it
            return cls(*[mx.zeros((1, 1, capacity, 0))] * 2)
        keys, values = cache.keys_and_values()
        return cls(keys, values).grown(capacity)

    def grown(self, capacity: int) -> FullLayer:
        return FullLayer(*(_widened(array, capacity) for array in self))

    @property
    def capacity(self) -> int:
        return int(self.keys.shape[2])

    def opened(self, places: Places, length: int) -> FullCache:
        return FullCache(self, places, length)


Quantized = tuple[mx.array, mx.array, mx.array]  # values packed in uint32, scales, biases


class QuantizedLayer(NamedTuple):
    """Keys and values of every position, quantised: each part [B, heads, capacity, width].

    Bits and group size follow from the parts' widths and the heads' dimension.
    """

    keys: Quantized
    values: Quantized

    @classmethod
    def adopted(cls, cache: QuantizedKVCache, capacity: int) -> QuantizedLayer:
        return cls(*cache.keys_and_values()).grown(capacity)

    def grown(self, capacity: int) -> QuantizedLayer:
        return QuantizedLayer(*(_of_parts(_widened, parts, capacity) for parts in self))

    @property
    def capacity(self) -> int:
        return int(self.keys[0].shape[2])

    def opened(self, places: Places, length: int) -> QuantizedCache:
        return QuantizedCache(self, places, length)


class RingLayer(NamedTuple):
    """Keys and values of the last positions, [B, heads, window + SPARE, dimension].

    Position p is in slot p modulo the size. A rejected proposal only overwrites entries that no
    later row's window reaches, because a round has at most SPARE rows.
    """

    keys: mx.array
    values: mx.array

    @classmethod
    def adopted(cls, cache: RotatingKVCache, capacity: int) -> RingLayer:
        size = cache.max_size + SPARE
        kept = min(cache.offset, cache.max_size)
        slots = (mx.arange(cache.offset - kept, cache.offset) % size).reshape(1, 1, -1, 1)
        arrays = []
        for array in (cache.keys, cache.values):
            last = cache._temporal_order(array)[:, :, -kept:]
            ring = mx.zeros((*last.shape[:2], size, last.shape[3]), last.dtype)
            arrays.append(mx.put_along_axis(ring, slots, last, axis=2))
        return cls(*arrays)

    def grown(self, capacity: int) -> RingLayer:
        return self

    @property
    def capacity(self) -> int:
        return UNBOUNDED

    def opened(self, places: Places, length: int) -> RingCache:
        return RingCache(self, places, length)


L = TypeVar("L", FullLayer, QuantizedLayer, RingLayer)


class _Opened(Generic[L]):
    """The view of a `Layer` that an mlx-lm attention layer gets during one forward pass.

    Args:
        layer: the storage, which is never changed; the attribute `layer` becomes the updated one.
        places: where the pass writes its rows.
        length: the pass attends over this many positions, at least offset + rows. It shapes the
            graph, so it should change rarely.
    """

    def __init__(self, layer: L, places: Places, length: int) -> None:
        self.layer: L = layer
        self.offset = places.offset  # mlx-lm's models ask for it
        self._places = places
        self._length = length


class _Lasting(_Opened[L]):
    """A view in which entry i holds position i."""

    def make_mask(
        self, rows: int, return_array: bool = True, window_size: int | None = None
    ) -> mx.array:
        """Boolean [B, 1, rows, length]: row i sees entries up to offset + i, itself included."""
        entries = mx.arange(self._length)
        reach = self._places.of(rows)
        mask = entries <= reach
        if window_size is not None:
            mask = mask & (entries > reach - window_size)
        return mask


class FullCache(_Lasting[FullLayer]):
    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write rows [B, heads, N, dimension] at `offset`; return all that may be attended."""
        self.layer = FullLayer(
            written(self.layer.keys, keys, self._places),
            written(self.layer.values, values, self._places),
        )
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """All that may be attended, this pass's rows included once they are written."""
        return self.layer.keys[:, :, : self._length], self.layer.values[:, :, : self._length]

    # mlx-lm assigns these where a layer's indexer has its own cache, to tie both caches together.

    @property
    def keys(self) -> mx.array:
        return self.layer.keys

    @keys.setter
    def keys(self, keys: mx.array) -> None:
        self.layer = self.layer._replace(keys=keys)

    @property
    def values(self) -> mx.array:
        return self.layer.values

    @values.setter
    def values(self, values: mx.array) -> None:
        self.layer = self.layer._replace(values=values)


class QuantizedCache(_Lasting[QuantizedLayer]):
    """A quantised cache, which mlx-lm's attention recognises by `bits` and `group_size`."""

    def __init__(self, layer: QuantizedLayer, places: Places, length: int) -> None:
        super().__init__(layer, places, length)
        self.bits = self.group_size = 0  # known with the first keys

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Quantized, Quantized]:
        """Write rows [B, heads, N, dimension] at `offset`; return all that may be attended."""
        packed, scales, _ = self.layer.keys
        self.bits = 32 * packed.shape[-1] // keys.shape[-1]
        self.group_size = keys.shape[-1] // scales.shape[-1]
        self.layer = QuantizedLayer(
            *(self._written(*both) for both in zip(self.layer, (keys, values), strict=True))
        )
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[Quantized, Quantized]:
        """All that may be attended, this pass's rows included once they are written."""
        keys, values = (
            _of_parts(lambda part: part[:, :, : self._length], parts) for parts in self.layer
        )
        return keys, values

    def _written(self, parts: Quantized, rows: mx.array) -> Quantized:
        new = mx.quantize(rows, group_size=self.group_size, bits=self.bits)
        packed, scales, biases = (
            written(part, row, self._places) for part, row in zip(parts, new, strict=True)
        )
        return packed, scales, biases


class RingCache(_Opened[RingLayer]):
    def __init__(self, layer: RingLayer, places: Places, length: int) -> None:
        super().__init__(layer, places, min(length, int(layer.keys.shape[2])))

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """All that may be attended, this pass's rows included once they are written."""
        return self.layer.keys[:, :, : self._length], self.layer.values[:, :, : self._length]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write rows [B, heads, N, dimension] at `offset`; return all that may be attended."""
        slots = self._places.of(keys.shape[2], self._size)
        self.layer = RingLayer(
            mx.put_along_axis(self.layer.keys, slots, keys, axis=2),
            mx.put_along_axis(self.layer.values, slots, values, axis=2),
        )
        return self.keys_and_values()

    def make_mask(
        self, rows: int, return_array: bool = True, window_size: int | None = None
    ) -> mx.array:
        """Boolean [B, 1, rows, length]: row i sees the window that ends at offset + i."""
        reach = self._places.of(rows)
        age = (reach - mx.arange(self._length)) % self._size
        return (age < min(window_size or self._window, self._window)) & (age <= reach)

    @property
    def _size(self) -> int:
        return int(self.layer.keys.shape[2])

    @property
    def _window(self) -> int:
        return self._size - SPARE


def written(buffer: mx.array, rows: mx.array, places: Places) -> mx.array:
    """The buffer with rows [B, heads, N, dimension] written at their places."""
    batch = buffer.shape[0]
    if batch == 1:
        return mx.slice_update(buffer, rows, places.offset, axes=(2,))
    if batch >= SCATTERED and backend() != "cuda":
        return mx.put_along_axis(buffer, places.of(rows.shape[2]), rows, axis=2)
    for row, start in enumerate(places.starts):
        buffer = mx.slice_update(buffer, rows[row : row + 1], start, axes=(0, 2))
    return buffer


def _widened(array: mx.array, capacity: int) -> mx.array:
    missing = max(capacity - array.shape[2], 0)
    if missing == 0:
        return array  # padding copies, even by nothing
    return mx.pad(array, [(0, 0), (0, 0), (0, missing), (0, 0)])


def _of_parts(change: Callable[..., mx.array], parts: Quantized, *arguments: int) -> Quantized:
    packed, scales, biases = (change(part, *arguments) for part in parts)
    return packed, scales, biases
