"""The memory that a model's past takes, before the model is loaded.

mlx-lm's model is built from its configuration alone, and one pass of it is traced. Neither computes
anything, so that a model of any size takes no memory; and the caches that the trace leaves show the
shape of a past, whatever the architecture.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache
from mlx_lm.utils import _get_classes

from mlxspec.device import lengths
from mlxspec.device.kernels import on_cpu
from mlxspec.errors import LoadError
from mlxspec.models.caches.layers import flat, unknown
from mlxspec.models.caches.original import Model, fresh_cache
from mlxspec.models.caches.peculiarities import obstacle_of
from mlxspec.models.caches.positional import SPARE
from mlxspec.models.context import context_of
from mlxspec.models.prefill import CHUNK
from mlxspec.params import KVQuantization

Kind = Literal["full", "window", "state", "other"]
_STEP = 256  # entries by which mlx-lm's caches grow
_FLOAT = 4  # bytes of a number in logits, which sampling takes as float32
# Arrays of a pass that are alive at a time: of a row of the hidden size, of the layer between, of
# scores before and after their softmax, and of logits and what sampling makes of them.
_HIDDEN, _BETWEEN, _SCORES, _LOGITS = 4, 2, 2, 6
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "mamba_num_heads")


@dataclass(frozen=True)
class LayerPast:
    """What one cache of a model takes.

    kind: how it grows. entry: bytes of a token. fixed: bytes however long the text is.
    window: tokens that it keeps at most; None keeps all.
    """

    kind: Kind
    entry: float = 0.0
    fixed: int = 0
    window: int | None = None

    def stored(self, capacity: int) -> float:
        """Bytes in the storage of a round with room for `capacity` tokens."""
        kept = capacity if self.window is None else self.window + SPARE
        return self.entry * kept + self.fixed

    def read(self, tokens: int) -> float:
        """Bytes in mlx-lm's own cache once it has read `tokens`."""
        kept = -(-tokens // _STEP) * _STEP
        if self.window is not None:
            kept = min(kept, self.window + CHUNK)
        return self.entry * kept + self.fixed


@dataclass(frozen=True)
class Footprint:
    """The memory of a model, as its configuration and the files of its weights tell.

    weights: bytes. layers: of its past. fused: whether rounds keep the past in their own storage;
    else every pass runs on a copy of mlx-lm's caches. context: tokens that it can read, if known.
    hidden, between, heads, vocabulary: the widths of its passes. follows: whether it reads every
    token along with the target, as a head does.
    """

    weights: int
    layers: tuple[LayerPast, ...]
    fused: bool
    context: int | None
    hidden: int
    between: int
    heads: int
    vocabulary: int
    number: int
    follows: bool = False

    def past(self, tokens: int) -> dict[Kind, int]:
        """Bytes of the past of a text, by the kind of cache."""
        capacity = lengths.reserved(tokens)
        copies = 1 if self.fused else 2
        found: dict[Kind, float] = {}
        for layer in self.layers:
            times = 1 if layer.kind == "full" else copies
            found[layer.kind] = found.get(layer.kind, 0) + times * layer.stored(capacity)
        return {kind: round(size) for kind, size in found.items()}

    def states(self, rows: int) -> int:
        """Bytes that a round of so many rows adds: the state after each row but the last."""
        if not self.fused:
            return 0
        return sum(layer.fixed for layer in self.layers) * max(rows - 1, 0)

    def read(self, tokens: int) -> int:
        """Bytes of the past in mlx-lm's own caches, where the text is read."""
        return round(sum(layer.read(tokens) for layer in self.layers))

    def passing(self, rows: int, length: int) -> int:
        """Bytes of the activations of a pass that attends over `length` entries."""
        of_row = _HIDDEN * self.hidden + _BETWEEN * self.between
        if on_cpu():  # where attention writes its scores
            of_row += _SCORES * self.heads * length
        return rows * of_row * self.number

    def sampling(self, rows: int) -> int:
        """Bytes of the logits of so many rows, and of what sampling makes of them."""
        return _LOGITS * _FLOAT * rows * self.vocabulary


def footprint(
    config: Mapping[str, Any], weights: int, *, kv: KVQuantization | None = None
) -> Footprint:
    """The footprint of the model that a configuration describes.

    Args:
        config: the content of config.json. weights: bytes of its weights.

    Raises:
        LoadError: mlx-lm has no such model, or its passes cannot be traced.
    """
    dtype = dtype_of(config)
    try:
        model = outlined(config)
        model.set_dtype(dtype)
        caches = fresh_cache(model, None)
        vocabulary = _traced(model, caches)
    except Exception as error:  # its models raise whatever they come across
        raise LoadError(
            f"The memory of a model of type {config.get('model_type')!r} is not known beforehand: "
            f"{type(error).__name__}.",
            hint="Use a model that mlx-lm can run; its weights alone are certain.",
        ) from error
    found = flat(caches)
    return Footprint(
        weights=weights,
        layers=tuple(layer for cache in found for layer in _layers_of(cache, kv)),
        fused=not unknown(caches) and not obstacle_of(model),
        context=context_of(model, config),
        hidden=_number(config, ("hidden_size", "n_embd", "d_model", "dim"), 1024),
        between=_between(config),
        heads=_number(config, _HEADS, 0),
        vocabulary=vocabulary,
        number=dtype.size,
    )


def outlined(config: Mapping[str, Any]) -> Model:
    """mlx-lm's model of a configuration, of which nothing is computed. It raises what it likes."""
    model_class, arguments = _get_classes(dict(config))
    model = model_class(arguments.from_dict(dict(config)))
    # Every weight draws on MLX's random state after the one before. Of many models that are built
    # and never computed, the chain would grow until what follows it runs out of stack.
    state: Any = mx.random.state
    mx.eval(state[0])
    return model


def _traced(model: Model, caches: list[Any]) -> int:
    """Trace a pass of one row, which gives the caches their shapes; the number of logits in a row.

    Within a trace nothing can be computed, not even by a model that asks for numbers.
    """

    def build(tokens: mx.array) -> mx.array:
        logits: mx.array = model(tokens, cache=caches)
        return logits

    return int(mx.compile(build)(mx.zeros((1, 1), mx.int32)).shape[-1])


def _layers_of(cache: Any, kv: KVQuantization | None) -> Iterable[LayerPast]:
    """What a cache that has seen one row takes."""
    arrays = [array for array in _arrays(cache) if array.size]
    if isinstance(cache, ArraysCache):
        yield LayerPast("state", fixed=sum(array.nbytes for array in arrays))
        return
    entry = 0.0
    for array in arrays:
        size = float(array.nbytes)
        if kv is not None and type(cache) is KVCache:
            numbers = array.size
            size = numbers * kv.bits / 8 + 2 * array.itemsize * numbers / kv.group_size
        entry += size / array.shape[-2]
    if isinstance(cache, RotatingKVCache):
        yield LayerPast("window", entry, window=cache.max_size)
    else:
        yield LayerPast("full" if type(cache) is KVCache else "other", entry)


def _arrays(cache: Any) -> list[mx.array]:
    """The arrays that a cache holds, at any depth of it."""
    values = [
        one
        for value in vars(cache).values()
        for one in (value if isinstance(value, list | tuple) else [value])
    ]
    return [one for one in values if isinstance(one, mx.array) and one.ndim > 1]


# --- configurations ---------------------------------------------------------------------


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A configuration, and those of its parts, the text's first."""
    inner = [value for key, value in sorted(config.items()) if isinstance(value, dict)]
    text = [one for key, one in config.items() if key.startswith("text") and isinstance(one, dict)]
    return [config, *text, *inner]


def _number(config: Mapping[str, Any], names: Iterable[str], otherwise: int) -> int:
    for part in _parts(config):
        for name in names:
            if isinstance(value := part.get(name), int) and value > 0:
                return value
    return otherwise


def _between(config: Mapping[str, Any]) -> int:
    """The width between the two products of a layer, of all experts that see a token."""
    dense = _number(config, ("intermediate_size", "n_inner", "ffn_dim"), 0)
    experts = _number(config, ("moe_intermediate_size",), 0) * _number(
        config, ("num_experts_per_tok", "num_experts_per_token", "moe_topk"), 1
    )
    hidden = _number(config, ("hidden_size", "n_embd", "d_model", "dim"), 1024)
    return max(dense, experts) or 4 * hidden


def dtype_of(config: Mapping[str, Any]) -> mx.Dtype:
    """The type of a model's numbers that are not quantised, by its configuration."""
    names = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
    for part in _parts(config):
        name = part.get("torch_dtype") or part.get("dtype")
        if isinstance(name, str) and name.removeprefix("torch.") in names:
            return names[name.removeprefix("torch.")]
    return mx.bfloat16
