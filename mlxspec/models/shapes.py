"""Models of a shape without their weights: mlx-lm's own classes, filled with random numbers.

The time of a pass and of a round, and the memory, follow from the shape of a model and from how its
weights are packed, not from their values. A mixture of experts is the exception: random routers
send each row to other experts, as if the text changed its subject with every token, so that passes
over several rows read more experts than those of a real text.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import RotatingKVCache

from mlxspec.errors import LoadError, UsageError, nearest
from mlxspec.models.caches.original import Model, fresh_cache
from mlxspec.models.footprint import dtype_of, outlined
from mlxspec.models.layout import lay_out

# How mlx_lm.convert packs weights, by the word behind a shape's name.
PACKINGS: Mapping[str, Mapping[str, Any]] = {
    **{f"{bits}bit": {"bits": bits, "group_size": 64} for bits in (2, 3, 4, 5, 6, 8)},
    "mxfp4": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
    "mxfp8": {"bits": 8, "group_size": 32, "mode": "mxfp8"},
    "nvfp4": {"bits": 4, "group_size": 16, "mode": "nvfp4"},
}
UNPACKED = {"bf16": mx.bfloat16, "fp16": mx.float16, "fp32": mx.float32}
_USUAL = "4bit"  # of a built-in shape where nothing is said
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_TABLE = Path(__file__).parent / "shapes.json"


@dataclass(frozen=True)
class Shape:
    """A model without weights.

    name: for people, as `built_in` and folders give it. config: the content of its config.json.
    packing: a key of PACKINGS or UNPACKED; "" packs as the configuration says.
    """

    name: str
    config: Mapping[str, Any]
    packing: str = ""

    def __str__(self) -> str:
        return f"{self.name}:{self.packing}" if self.packing else self.name

    @cached_property
    def layers(self) -> int:
        """How many layers it has.

        Raises:
            LoadError: the configuration does not say.
        """
        for part in self._parts():
            for key in _LAYERS:
                if isinstance(count := part.get(key), int) and count > 0:
                    return count
        raise LoadError(
            f"The configuration of {self.name} does not say how many layers it has.",
            hint=f"Give it one of the keys {', '.join(_LAYERS)}.",
        )

    @cached_property
    def parameters(self) -> int:
        """How many numbers its weights are, before they are packed."""
        return sum(array.size for array in _arrays(_outline(self.config)).values())

    @cached_property
    def size(self) -> int:
        """Bytes of its weights. Nothing is allocated."""
        return sum(array.nbytes for array in _arrays(self.outline()).values())

    def with_layers(self, count: int) -> Shape:
        """The same model with its first layers alone."""
        whole = self.layers
        return replace(self, config=_cut(self.config, whole, count))

    def outline(self) -> Model:
        """mlx-lm's model, packed; none of its weights is computed yet."""
        model = _outline(self.config)
        model.set_dtype(UNPACKED.get(self.packing, dtype_of(self.config)))
        told = PACKINGS.get(self.packing, self.config.get("quantization"))
        if self.packing not in UNPACKED and isinstance(told, Mapping):
            _pack(model, told)
        model.eval()
        return model

    def made(self, seed: int) -> Model:
        """The model with random weights, all of them computed, and laid out as if it were loaded.

        Args:
            seed: of the weights.

        Raises:
            LoadError: it cannot run here, as a mixture of experts in 16 bits cannot on a CPU.
        """
        model = self.outline()
        mx.random.seed(seed)
        _fill(model)
        lay_out(model)
        try:
            mx.eval(model(mx.zeros((1, 1), mx.int32), cache=fresh_cache(model, None)))
        except Exception as error:  # MLX's, or whatever a model comes across
            raise LoadError(
                f"{self} cannot run here: {str(error).partition(chr(10))[0].rstrip('.')}.",
                hint=f"Pack its weights in another way: {', '.join((*PACKINGS, *UNPACKED))}.",
            ) from error
        return model

    def period(self) -> tuple[int, int]:
        """How its layers repeat: (head, period). Behind the first `head` every layer is like the
        one `period` layers later, in its weights and in its cache."""
        kinds = _kinds(self.outline())
        count = len(kinds)
        for period in range(1, count):
            head = count - period
            while head > 0 and kinds[head - 1] == kinds[head - 1 + period]:
                head -= 1
            if head + period <= count // 2:
                return head, period
        return 0, count

    def _parts(self) -> Iterator[Mapping[str, Any]]:
        yield self.config
        yield from (one for one in self.config.values() if isinstance(one, Mapping))


@cache
def built_in() -> Mapping[str, Mapping[str, Any]]:
    """The configurations of models that people run, by short names."""
    found: dict[str, dict[str, Any]] = json.loads(_TABLE.read_text(encoding="utf-8"))
    return found


def named(name: str, packing: str) -> Shape:
    """A built-in shape, in 4 bits unless told otherwise.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in built_in():
        near = nearest(name, built_in())
        means = f"Did you mean `{near}`? " if near else ""
        raise UsageError(
            f"There is no shape named {name!r}.",
            hint=f"{means}There are {', '.join(built_in())}; a folder or repository is one too.",
        )
    return Shape(name, built_in()[name], packing or _USUAL)


def _outline(config: Mapping[str, Any]) -> Model:
    """mlx-lm's model of a configuration, whose weights are not computed yet."""
    try:
        model = outlined(config)
        for module in model.modules():
            # Gemma ties its embeddings where its files have no others; its configuration is silent.
            if getattr(module, "tie_word_embeddings", None) is False and "lm_head" in module:
                module.sanitize({})
    except Exception as error:  # its models raise whatever they come across
        kind = config.get("model_type")
        raise LoadError(
            f"mlx-lm cannot build a model of type {kind!r} from this configuration: "
            f"{type(error).__name__}: {error}.",
            hint="Use the config.json of a model that mlx-lm can run.",
        ) from error
    return model


def _pack(model: Model, told: Mapping[str, Any]) -> None:
    """Quantise the layers that `told` names as it says, and by its own values all that can be.

    Of a mixture of experts mlx-lm's converter keeps the routers in 8 bits; so the model says.
    """
    group = told.get("group_size", 64)
    usual = getattr(model, "quant_predicate", None)

    def packed(path: str, module: nn.Module) -> Any:
        if path in told:
            return told[path]
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % group:
            return False
        return usual(path, module) if usual is not None else True

    mode = told.get("mode", "affine")
    nn.quantize(model, group, told.get("bits", 4), mode=mode, class_predicate=packed)


def _fill(model: Model) -> None:
    """Compute all weights, the largest first: drawing one takes a few times its own size.

    Arrays of one shape and type have the numbers of the first of them, moved on by some rows, each
    in memory of its own. To draw and pack all of them would take minutes on a CPU.
    """
    found = _arrays(model)
    drawn: dict[Any, mx.array] = {}
    moved: Counter[Any] = Counter()
    for name in sorted(found, key=lambda one: -found[one].size):
        array = found.pop(name)
        kind = (name.rpartition(".")[2], array.shape, str(array.dtype))
        if array.ndim > 1 and kind in drawn:
            moved[kind] += 1
            array = mx.roll(drawn[kind], moved[kind], -2)
            model.update(tree_unflatten([(name, array)]))
        mx.eval(array)
        drawn.setdefault(kind, array)


def _arrays(model: Model) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


# --- layers -----------------------------------------------------------------------------


def _kinds(model: Model) -> list[Any]:
    """What distinguishes the layers of a model: their weights, and their caches."""
    layers, caches = model.layers, fresh_cache(model, None)
    if len(caches) != len(layers):  # not every layer has one, and nothing says which
        caches = [None] * len(layers)
    return [
        (
            type(layer).__name__,
            tuple(
                (path, one.shape, str(one.dtype)) for path, one in sorted(_arrays(layer).items())
            ),
            type(held).__name__,
            held.max_size if isinstance(held, RotatingKVCache) else None,
        )
        for layer, held in zip(layers, caches, strict=True)
    ]


def _cut(config: Mapping[str, Any], whole: int, count: int) -> dict[str, Any]:
    """A configuration with `count` layers: also of its parts, and of lists with a value a layer."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found[key] = _cut(value, whole, count)
        elif key in _LAYERS and value == whole:
            found[key] = count
        elif isinstance(value, list) and len(value) == whole:
            found[key] = value[:count]
        else:
            found[key] = value
    return found
