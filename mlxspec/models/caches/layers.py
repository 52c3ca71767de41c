"""The layers of a whole model, whatever the kind of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)

from mlxspec.models.caches.positional import UNBOUNDED, FullLayer, QuantizedLayer, RingLayer
from mlxspec.models.caches.recurrent import RecurrentLayer

Layer = FullLayer | QuantizedLayer | RingLayer | RecurrentLayer
Layers = list[Any]  # of Layer, or of lists of them where a model's layer has several

_KINDS: dict[type, Any] = {
    KVCache: FullLayer,
    QuantizedKVCache: QuantizedLayer,
    RotatingKVCache: RingLayer,
    ArraysCache: RecurrentLayer,
}


def adopt(caches: list[Any], capacity: int) -> Layers:
    """Copy prefilled mlx-lm caches into layers with room for `capacity` positions."""
    return [
        adopt(list(cache.caches), capacity)
        if isinstance(cache, CacheList)
        else _KINDS[type(cache)].adopted(cache, capacity)
        for cache in caches
    ]


def unknown(caches: list[Any]) -> list[str]:
    """The names of the mlx-lm caches for which there is no layer."""
    return sorted({_name_of(cache) for cache in flat(caches) if not _is_known(cache)})


def flat(layers: list[Any]) -> list[Any]:
    """Layers or caches without nesting, mlx-lm's lists included."""
    nested = [
        flat(list(layer.caches))
        if isinstance(layer, CacheList)
        else flat(layer)
        if isinstance(layer, list)
        else [layer]
        for layer in layers
    ]
    return [layer for some in nested for layer in some]


def each(change: Callable[[Any], Any], layers: Layers) -> Layers:
    return [each(change, layer) if isinstance(layer, list) else change(layer) for layer in layers]


def grow(layers: Layers, capacity: int) -> Layers:
    return each(lambda layer: layer.grown(capacity), layers)


def commit(layers: Layers, kept: mx.array | None) -> Layers:
    """Take back all but the first `kept` rows since the last commit: int32 [B], at least 1.

    None keeps all. Entries with a position need no change: masks hide those past it.
    """
    return each(
        lambda layer: layer.committed(kept) if isinstance(layer, RecurrentLayer) else layer, layers
    )


def capacity_of(layers: Layers) -> int:
    """The number of positions that all layers have room for."""
    return min((layer.capacity for layer in flat(layers)), default=UNBOUNDED)


def stack(rows: list[Layers]) -> Layers:
    """Put sequences of equal capacity side by side along the batch axis."""
    return [
        stack(list(same))
        if isinstance(same[0], list)
        else tree_map(lambda *arrays: mx.concatenate(list(arrays)), *same)
        for same in zip(*rows, strict=True)
    ]


def unread(layers: Layers) -> Layers:
    """The layers as if nothing had been read, from layers after an uncommitted pass."""
    return each(
        lambda layer: (
            layer.unread() if isinstance(layer, RecurrentLayer) else tree_map(mx.zeros_like, layer)
        ),
        layers,
    )


def _is_known(cache: Any) -> bool:
    return type(cache) in _KINDS and not getattr(cache, "keep", 0)


def _name_of(cache: Any) -> str:
    kept = getattr(cache, "keep", 0)
    return type(cache).__name__ + (f" with {kept} entries kept" if kept else "")
