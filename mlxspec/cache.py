"""Key-value caches whose length is a number on the device.

A round writes its rows at a position that only the device knows yet, and takes none of them back:
every mask is computed from that position, so an entry past it is invisible until a later round
overwrites it. Rolling back a rejected proposal therefore costs nothing.

Prefill runs on mlx-lm's own caches (`make_prompt_cache`), whose lengths the host knows; `adopt`
then moves their content here. What `adopt` does not know, it refuses by name.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from mlxspec.errors import UnsupportedModel

Model = Any  # mlx-lm's models share no base class of their own: a callable (tokens, cache=…)


class Layer(NamedTuple):
    """Storage of one attention layer: keys and values, [B, heads, capacity, dimension]."""

    keys: mx.array
    values: mx.array


Layers = list[Layer]


class FullCache:
    """What an mlx-lm attention layer sees of a `Layer` during one forward pass.

    Args:
        layer: the storage; this object never changes it, `layer` is the updated one afterwards.
        offset: int32 [B], the position at which the pass writes its first row.
        length: the pass attends over this many entries, at least offset + rows. It shapes the
            graph, so it should change rarely.
    """

    def __init__(self, layer: Layer, offset: mx.array, length: int) -> None:
        self.layer = layer
        self.offset = offset
        self._length = length

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write rows [B, heads, N, dimension] at `offset`; return all that may be attended."""
        self.layer = Layer(
            _write(self.layer.keys, keys, self.offset),
            _write(self.layer.values, values, self.offset),
        )
        return self.layer.keys[:, :, : self._length], self.layer.values[:, :, : self._length]

    def make_mask(
        self, rows: int, return_array: bool = True, window_size: int | None = None
    ) -> mx.array:
        """Boolean [B, 1, rows, length]: row i sees entries up to offset + i, itself included."""
        entries = mx.arange(self._length)
        reach = (self.offset[:, None] + mx.arange(rows))[:, None, :, None]
        mask = entries <= reach
        if window_size is not None:
            mask = mask & (entries > reach - window_size)
        return mask


def _write(buffer: mx.array, rows: mx.array, offset: mx.array) -> mx.array:
    if buffer.shape[0] == 1:
        return mx.slice_update(buffer, rows, offset, axes=(2,))
    for row in range(buffer.shape[0]):
        start = mx.concatenate([mx.array([row], offset.dtype), offset[row : row + 1]])
        buffer = mx.slice_update(buffer, rows[row : row + 1], start, axes=(0, 2))
    return buffer


def forward(
    model: Model, tokens: mx.array, layers: Layers, offset: mx.array, length: int
) -> tuple[mx.array, Layers]:
    """Run `model` over int32 [B, N] `tokens` at positions offset … offset + N - 1.

    Returns:
        Logits [B, N, V] and the layers with these rows written.
    """
    caches = [FullCache(layer, offset, length) for layer in layers]
    logits = model(tokens, cache=caches)
    return logits, [cache.layer for cache in caches]


def vocabulary_of(model: Model) -> int:
    """Rows of a model's output."""
    # The shape of a graph that is never evaluated: configurations do not all name it alike.
    return int(model(mx.zeros((1, 1), mx.int32)).shape[-1])


def adopt(caches: list[KVCache], capacity: int) -> Layers:
    """Copy prefilled mlx-lm caches into layers with room for `capacity` entries."""
    return [
        Layer(*(_widened(array[:, :, : cache.offset], capacity) for array in cache.state[:2]))
        for cache in caches
    ]


def grow(layers: Layers, capacity: int) -> Layers:
    return [Layer(*(_widened(array, capacity) for array in layer)) for layer in layers]


def stack(rows: list[Layers]) -> Layers:
    """Put sequences of equal capacity side by side along the batch axis."""
    return [
        Layer(
            mx.concatenate([layer.keys for layer in same]),
            mx.concatenate([layer.values for layer in same]),
        )
        for same in zip(*rows, strict=True)
    ]


def capacity_of(layers: Layers) -> int:
    return int(layers[0].keys.shape[2])


def _widened(array: mx.array, capacity: int) -> mx.array:
    missing = max(capacity - array.shape[2], 0)
    return mx.pad(array, [(0, 0), (0, 0), (0, missing), (0, 0)])


def require_known(caches: list[Any], name: str) -> None:
    """Raise UnsupportedModel unless every cache is of a kind that a round can run on."""
    unknown = sorted({type(cache).__name__ for cache in caches if type(cache) is not KVCache})
    if unknown:
        raise UnsupportedModel(
            f"{name} keeps its past in {', '.join(unknown)}, which a round cannot take back yet.",
            hint="Use a model with full attention in every layer, such as Llama, Qwen 3 or "
            "Mixtral; mlx_lm.generate runs this one.",
        )
