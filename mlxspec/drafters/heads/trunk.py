"""What a head needs of its target, found in its modules, whatever the target calls them."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxspec.errors import LoadError
from mlxspec.models.caches.original import Model, fresh_cache
from mlxspec.models.taps import INPUT, Taps

_OUTPUT_LAYERS = ("lm_head", "output", "embed_out")
_NORMS = ("norm", "ln_f", "final_layernorm")
_SAME = 1e-2  # how far a scaled embedding may be from the first layer's input


class Trunk:
    """A target's layers, embedding, final norm and output layer.

    hidden_size, layers: D and the number of layers.

    Raises:
        LoadError: it has no such modules.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._path, inner = _innermost(model)
        children = dict(inner.items())
        self._layers = max(_lists(children), key=lambda name: len(children[name]))
        embeddings = {name: one for name, one in children.items() if _is_embedding(one)}
        self._embedding_name = max(embeddings, key=lambda name: embeddings[name].weight.shape[0])
        self._embedding = embeddings[self._embedding_name]
        self.layers = len(children[self._layers])
        self.hidden_size = int(self._embedding(mx.zeros((1,), mx.int32)).shape[-1])
        self._norms = [name for name in children if name in _NORMS or name.endswith("norm")]
        self._output = _output_layer(model) or self._embedding.as_linear

    def tap(self, layer: int) -> str:
        """The name of a layer's output; of the input of the first where `layer` is -1."""
        if layer == -1:
            return self._named(f"{self._layers}.0{INPUT}")
        return self._named(f"{self._layers}.{layer}")

    @property
    def norm_tap(self) -> str:
        """The name of the final norm's output.

        Raises:
            LoadError: it has none that is known.
        """
        if not self._norms:
            raise LoadError(
                f"{type(self._model).__module__} has no final norm that a head could read.",
                hint="Use a target that the head was made for.",
            )
        return self._named(self._norms[-1])

    @cached_property
    def vocabulary(self) -> int:
        """V, the number of logits in a row."""
        return int(self._output(mx.zeros((1, self.hidden_size), self.dtype)).shape[-1])

    @property
    def dtype(self) -> mx.Dtype:
        """The type of its hidden states."""
        return self._embedding(mx.zeros((1,), mx.int32)).dtype  # type: ignore[no-any-return]

    def raw(self, tokens: mx.array) -> mx.array:
        """Rows of the embedding, [..., D]."""
        return self._embedding(tokens)  # type: ignore[no-any-return]

    def embedded(self, tokens: mx.array) -> mx.array:
        """What the first layer reads, [..., D]: some targets scale their embedding."""
        rows = self.raw(tokens)
        return rows if self.scale == 1 else rows * mx.array(self.scale, rows.dtype)

    def logits(self, hidden: mx.array) -> mx.array:
        """The output layer's logits, [..., V], without what the target does to them after it."""
        return self._output(hidden)  # type: ignore[no-any-return]

    @cached_property
    def scale(self) -> float:
        """What the embedding is multiplied with before the first layer; seen in a pass."""
        tokens = mx.array([[0, 1]], mx.int32)
        tap = self.tap(-1)
        with Taps(self._model, [tap]).watching() as seen:
            self._model(tokens, cache=fresh_cache(self._model, None))
        read = seen[tap].astype(mx.float32)
        rows = self.raw(tokens).astype(mx.float32)
        scale = float(mx.sum(read * rows) / mx.maximum(mx.sum(rows * rows), 1e-30))
        error = float(mx.linalg.norm(read - scale * rows) / mx.maximum(mx.linalg.norm(read), 1e-30))
        return scale if error < _SAME and abs(scale - 1) > _SAME else 1.0

    def _named(self, name: str) -> str:
        return f"{self._path}.{name}" if self._path else name


def _innermost(model: Model) -> tuple[str, nn.Module]:
    """The module with the most layers beside an embedding, and its name."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if _lists(module) and any(_is_embedding(one) for one in module.values())
    ]
    if not found:
        raise LoadError(
            f"{type(model).__module__} has no layers beside an embedding that a head could read.",
            hint="Use a target that the head was made for.",
        )
    return max(found, key=lambda one: max(len(one[1][name]) for name in _lists(one[1])))


def _lists(module: Any) -> list[str]:
    """The names of a module's lists of modules."""
    return [
        name
        for name, one in module.items()
        if isinstance(one, list) and one and all(isinstance(part, nn.Module) for part in one)
    ]


def _is_embedding(module: Any) -> bool:
    return isinstance(module, nn.Embedding | nn.QuantizedEmbedding)


def _output_layer(model: Model) -> Any:
    """The output layer of a target that has one of its own."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in _OUTPUT_LAYERS and not any(
            part.isdigit() for part in name.split(".")
        ):
            return module
    return None
