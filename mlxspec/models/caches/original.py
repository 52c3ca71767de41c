"""mlx-lm's own caches, which prefill fills."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, KVCache, make_prompt_cache

from mlxspec.errors import UsageError
from mlxspec.params import KVQuantization

Model = Any  # mlx-lm's models share no base class of their own: a callable (tokens, cache=…)


def fresh_cache(model: Model, kv: KVQuantization | None) -> list[Any]:
    """The caches of a model that has read nothing."""
    return quantized(make_prompt_cache(model), kv)


def quantized(caches: list[Any], kv: KVQuantization | None) -> list[Any]:
    """The caches with keys and values quantised from here on; None leaves them as they are.

    Raises:
        UsageError: a head's dimension is no multiple of the group size.
    """
    if kv is None:
        return caches
    try:
        return [
            cache.to_quantized(group_size=kv.group_size, bits=kv.bits)
            if type(cache) is KVCache
            else cache
            for cache in caches
        ]
    except ValueError as error:
        raise UsageError(
            f"Keys and values cannot be quantised in groups of {kv.group_size}: a head's dimension "
            "is no multiple of it.",
            hint="Choose another --kv-group-size: 32, 64 or 128.",
        ) from error


def require_quantizable(model: Model, kv: KVQuantization) -> None:
    """Raise UsageError unless the model has keys and values, and all can be quantised."""
    caches = make_prompt_cache(model)
    kinds = {type(cache) for cache in caches} - {KVCache, ArraysCache}
    if kinds or all(type(cache) is ArraysCache for cache in caches):
        names = ", ".join(sorted(kind.__name__ for kind in kinds)) or "a model without attention"
        raise UsageError(
            f"Keys and values in {names} cannot be quantised.",
            hint="Leave out --kv-bits, or use a model with full attention.",
        )
    model(mx.zeros((1, 1), mx.int32), cache=caches)  # before, the heads' dimension is unknown
    quantized(caches, kv)
