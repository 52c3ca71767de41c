"""How many tokens a model can read: its configuration, scaling of positions, learned tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxspec.models.caches.original import Model

# Keys of the length, the commonest first; two of one configuration mean the same.
_LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "max_seq_length",
    "seq_length",
    "n_ctx",
    "model_max_length",
)
_TEXT_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")
_SCALINGS = ("rope_scaling", "rope_parameters")
# Scalings by whose factor the length grows. Of the others the configuration gives the whole length.
_GROWING = {"linear", "dynamic", "yarn", "deepseek_yarn", "telechat3-yarn", "llama3"}
_TABLES = {"wpe", "embed_positions", "position_embeddings", "position_embedding"}
_MOST = 2**31 - 1
_DEPTH = 4  # of models and configurations inside one another


def context_of(model: Model, config: Mapping[str, Any] | None = None) -> int | None:
    """Tokens that a model can read, or None where nothing says.

    Args:
        config: what config.json says, which has keys that mlx-lm's arguments lack.
    """
    said = next((length for one in _sources(model, config) if (length := _length(one))), None)
    tables = [table.weight.shape[0] for _, table in position_tables(model)]
    return min([*tables, said or _MOST]) if said or tables else None


def position_tables(model: Model) -> list[tuple[str, Any]]:
    """Learned embeddings of positions, by the names of their modules."""
    if not isinstance(model, nn.Module):
        return []
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.QuantizedEmbedding)
        and name.rpartition(".")[2] in _TABLES
        and "vision" not in name
    ]


def guard_tables(model: Model) -> None:
    """Let positions behind the end of a learned table read its last row.

    A round reads a few rows beyond the limit of a text, and keeps none of them; but what lies
    behind a table may be no numbers at all.
    """
    for _, table in position_tables(model):
        if not isinstance(table, _Guarded):
            table.__class__ = _guarded(type(table))


class _Guarded:
    """A table of positions that is never read behind its end."""

    def __call__(self, positions: mx.array) -> mx.array:
        rows: int = self.weight.shape[0]  # type: ignore[attr-defined]
        found: mx.array = super().__call__(mx.minimum(positions, rows - 1))  # type: ignore[misc]
        return found


class _GuardedEmbedding(_Guarded, nn.Embedding):
    pass


class _GuardedQuantizedEmbedding(_Guarded, nn.QuantizedEmbedding):
    pass


def _guarded(kind: type) -> type:
    quantized = issubclass(kind, nn.QuantizedEmbedding)
    return _GuardedQuantizedEmbedding if quantized else _GuardedEmbedding


def _sources(model: Model, config: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """Configurations of a model: a file's before arguments, a text part's before the rest."""
    if config is not None:
        yield from _inside_out(config)
    arguments: list[Any] = []
    inner: Any = model
    for _ in range(_DEPTH):
        arguments.insert(0, getattr(inner, "args", None))
        names = ("inner", "language_model", "model")
        inner = next((x for name in names if (x := getattr(inner, name, None)) is not None), None)
    for one in arguments:
        if one is not None:
            yield from _inside_out(vars(one) if hasattr(one, "__dict__") else {})


def _inside_out(config: Mapping[str, Any], depth: int = _DEPTH) -> Iterator[Mapping[str, Any]]:
    for name in _TEXT_PARTS:
        part = config.get(name)
        part = vars(part) if hasattr(part, "__dict__") else part
        if isinstance(part, Mapping) and depth:
            yield from _inside_out(part, depth - 1)
    yield config


def _length(config: Mapping[str, Any]) -> int | None:
    found = next((length for key in _LENGTHS if (length := _whole(config.get(key)))), None)
    if found is None:
        return None
    grown = [_grown(found, scaling, config) for scaling in _scalings(config)]
    return min(max([found, *grown]), _MOST)


def _scalings(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """How positions are scaled, for all layers or for kinds of layers."""
    for name in _SCALINGS:
        scaling = config.get(name)
        if isinstance(scaling, Mapping):
            yield scaling
            yield from (one for one in scaling.values() if isinstance(one, Mapping))


def _grown(length: int, scaling: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    """The length with a scaling, whether `length` has it already or not."""
    kind = scaling.get("rope_type") or scaling.get("type")
    factor = scaling.get("factor")
    if kind not in _GROWING or isinstance(factor, bool) or not isinstance(factor, int | float):
        return length
    if str(config.get("model_type", "")).startswith("gemma3"):
        return length  # its configurations give the whole length
    original = _whole(scaling.get("original_max_position_embeddings"))
    if original is None and kind == "llama3":
        return length
    return int((original or length) * factor) if 1 <= factor < _MOST else length


def _whole(value: Any) -> int | None:
    """A length; None for what is none, such as the 10³⁰ of a tokenizer without a limit."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and 0 < value <= _MOST else None
