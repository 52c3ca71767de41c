"""Identifying models, tokenizers and versions as loaded, without reading all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlxspec.models.cached_model import CachedModel
from mlxspec.models.caches.original import Model
from mlxspec.tokens import Tokenizer

SAMPLES = 64  # values of each array of weights: fine-tuning changes nearly all of them


@dataclass(frozen=True)
class Identity:
    """All that decides the past of a text: where two are equal, one past may serve for the other.

    Args:
        versions: of MLX and mlx-lm.
        tokenizer: a digest of its vocabulary, or empty.
        kv: how keys and values are quantised, in words.
        models: a digest of each model, by name.
    """

    versions: str
    tokenizer: str
    kv: str
    models: Mapping[str, str]


def identity_of(cached_models: Mapping[str, CachedModel], tokenizer: Tokenizer | None) -> Identity:
    return Identity(
        versions=f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}",
        tokenizer=_digest_of_vocabulary(tokenizer) if tokenizer is not None else "",
        kv=str(next(iter(cached_models.values())).kv),
        models={name: digest_of(cached.model) for name, cached in cached_models.items()},
    )


def digest_of(model: Model) -> str:
    """A digest of a model's configuration, its modules' settings, and its weights.

    Of each array of weights it covers the name, shape, dtype and SAMPLES values, so its time
    depends on the number of arrays, not on their sizes.
    """
    digest = blake2b(repr(getattr(model, "args", None)).encode(), digest_size=16)
    for name, module in model.named_modules():
        digest.update(f"{name} {type(module)} {_settings_of(module)}\n".encode())
    weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    samples = [_sample_of(array) for array in weights.values()]
    mx.eval(samples)
    for (name, array), sample in zip(weights.items(), samples, strict=True):
        digest.update(f"{name} {array.shape} {array.dtype}\n".encode())
        digest.update(np.asarray(sample.view(mx.uint8)).data)
    return digest.hexdigest()


def _settings_of(module: Any) -> list[tuple[str, Any]]:
    """A module's plain values, such as bits, scales and widths."""
    return sorted(
        (name, value)
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float | str) and not name.startswith("_")
    )


def _sample_of(array: mx.array) -> mx.array:
    """Up to SAMPLES values from all over an array, in one dimension."""
    if array.ndim == 0:
        return array.reshape(1)
    # By coordinates, because flattening may copy the array.
    places = np.linspace(0, array.size - 1, min(SAMPLES, array.size)).astype(np.int64)
    coordinates = np.unravel_index(places, array.shape)
    return array[tuple(mx.array(axis.astype(np.int32)) for axis in coordinates)]


def _digest_of_vocabulary(tokenizer: Tokenizer) -> str:
    digest = blake2b(digest_size=16)
    for token, index in sorted(tokenizer.get_vocab().items()):
        digest.update(f"{index} {token}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
