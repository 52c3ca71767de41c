"""mlx-lm's own caches, for a past of which only one thing is known: it can be copied.

A pass runs on a copy, and the caches before it are kept. Committing only part of its rows runs
those again from there. The host must know how many rows are kept, so a round waits.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.models.cache import CacheList, KVCache, QuantizedKVCache

from mlxspec.models.caches.positional import UNBOUNDED


class Pass(NamedTuple):
    """Rows that were run, int32 [1, N], and the caches before them."""

    caches: list[Any]
    tokens: mx.array


class HostedLayers(NamedTuple):
    """The caches of a whole model after its last pass, and the passes since the last commit."""

    caches: list[Any]
    passes: tuple[Pass, ...] = ()

    def grown(self, capacity: int) -> HostedLayers:
        return self

    @property
    def capacity(self) -> int:
        return UNBOUNDED

    def copied(self) -> list[Any]:
        """Copies of the caches, to be changed while these stay as they are."""
        return [_copied(cache) for cache in self.caches]


def _copied(cache: Any) -> Any:
    # These write only past their end, which a copy with an older end does not see. So a shallow
    # copy is enough, and no array is copied.
    if type(cache) in (KVCache, QuantizedKVCache):
        return copy.copy(cache)
    if type(cache) is CacheList:
        return CacheList(*(_copied(part) for part in cache.caches))
    return copy.deepcopy(cache)  # arrays are shared until one of the two is written
