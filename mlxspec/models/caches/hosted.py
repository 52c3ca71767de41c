"""mlx-lm's own caches, for a past of which nothing more is known than that it can be copied.

A pass is run on a copy; what it leads back to is kept, and committing less than all of it runs
the kept rows again from there. Such a pass needs its length on the host: a round waits.
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
        """The caches, to be changed while these stay as they are."""
        return [_copied(cache) for cache in self.caches]


def _copied(cache: Any) -> Any:
    # These write past their end only, which a copy with an older end does not see: a copy of
    # where they end is enough, and nothing is moved.
    if type(cache) in (KVCache, QuantizedKVCache):
        return copy.copy(cache)
    if type(cache) is CacheList:
        return CacheList(*(_copied(part) for part in cache.caches))
    return copy.deepcopy(cache)  # arrays are shared until one of both is written
