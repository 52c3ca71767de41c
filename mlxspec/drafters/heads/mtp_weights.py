"""The weights of an MTP layer, as checkpoints and converters have stored them, for its module.

Original checkpoints have them as `mtp.*` beside the model's own. Norms are stored minus one there,
and converters add it: to all of them, to none, or to some. What is stored shows in the numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import infer_quant_config

from mlxspec.drafters.heads.mtp import Mtp, layer_of
from mlxspec.drafters.heads.parameters import give
from mlxspec.drafters.heads.trunk import Trunk
from mlxspec.errors import LoadError
from mlxspec.models.caches.original import Model

_WITHIN = re.compile(r"(?:language_model\.|model\.)*mtp\.")
_EXPERT = re.compile(r"(.*)\.experts\.(\d+)\.(\w+_proj)\.(\w+)")
_FUSED = ".experts.gate_up_proj"
_LAYER = "layers.0."


class _Means(NamedTuple):
    """Of a norm's weights: the largest mean of stored minus one, the smallest of stored whole."""

    less_one: float
    whole: float


# Published heads have 0.73 … 0.79 and 1.73 … 1.79 in the norms of queries and keys, 0.04 … 0.39 and
# 0.87 … 1.21 in those before the sublayers.
_HEADS, _ROWS = _Means(0.9, 1.45), _Means(0.45, 0.75)
_TELLING = {
    _LAYER + "self_attn.q_norm.weight": _HEADS,
    _LAYER + "self_attn.k_norm.weight": _HEADS,
    _LAYER + "input_layernorm.weight": _ROWS,
    _LAYER + "post_attention_layernorm.weight": _ROWS,
}
# These tell little by themselves: 1.25 … 2.58 and 2.25 … 3.8 in the last norm. Those before `fc`
# damp what they are given: −0.73 … −0.16 and 0.27 … 0.84. They follow others.
_FOLLOWING = {
    "norm.weight": _LAYER + "self_attn.q_norm.weight",
    "pre_fc_norm_embedding.weight": _LAYER + "input_layernorm.weight",
    "pre_fc_norm_hidden.weight": _LAYER + "input_layernorm.weight",
}


def is_of_layer(name: str) -> bool:
    """Whether a tensor of a checkpoint is one of its MTP layer."""
    return _WITHIN.match(name) is not None


def layer_weights(found: Mapping[str, mx.array], *, less_one: bool) -> dict[str, mx.array]:
    """The weights by the names of the module's parameters, as they act.

    Args:
        found: by their names in the files.
        less_one: whether norms are stored minus one, by all that is known beside their numbers.
    """
    named = {_WITHIN.sub("", name, count=1): array for name, array in found.items()}
    return _with_experts(_with_norms(named, less_one))


def head_of(
    weights: Mapping[str, mx.array], target: Model, place: str, bits: int | None = None
) -> Mtp:
    """The head with these weights; see `layer_weights`.

    Args:
        place: where they are from, for errors. bits: see `parameters.give`.

    Raises:
        LoadError: they are not those of a layer of this target.
    """
    trunk = Trunk(target)
    _require_fit(weights, trunk, place)
    layer = layer_of(target, sparse=any(".switch_mlp." in name for name in weights))
    _quantise_as(weights, layer, place)
    packed = (mx.uint8, mx.uint32)
    typed = {
        name: array if array.dtype in packed else array.astype(trunk.dtype)
        for name, array in weights.items()
    }
    give(layer, typed, {}, place, bits)
    return Mtp(layer, trunk)


def _with_norms(named: dict[str, mx.array], less_one: bool) -> dict[str, mx.array]:
    stored = {
        name: _is_less_one(named[name], means, less_one)
        for name, means in _TELLING.items()
        if name in named
    }
    for name, other in _FOLLOWING.items():
        if name in named:
            damped = name != "norm.weight" and _mean(named[name]) < 0
            stored[name] = damped or stored.get(other, less_one)
    return named | {name: named[name] + 1 for name, is_less in stored.items() if is_less}


def _is_less_one(weight: mx.array, means: _Means, otherwise: bool) -> bool:
    mean = _mean(weight)
    return True if mean <= means.less_one else False if mean >= means.whole else otherwise


def _mean(weight: mx.array) -> float:
    return float(mx.mean(weight.astype(mx.float32)))


def _with_experts(named: dict[str, mx.array]) -> dict[str, mx.array]:
    """Experts as mlx-lm has them: one array of all, for each of three projections."""
    weights: dict[str, mx.array] = {}
    apart: dict[str, dict[int, mx.array]] = {}
    for name, array in named.items():
        if name.endswith(_FUSED):
            gate, up = mx.split(array, 2, axis=-2)
            inner = name.removesuffix(_FUSED)
            weights[f"{inner}.switch_mlp.gate_proj.weight"] = gate
            weights[f"{inner}.switch_mlp.up_proj.weight"] = up
        elif name.endswith(".experts.down_proj"):
            weights[name.replace(".experts.", ".switch_mlp.") + ".weight"] = array
        elif match := _EXPERT.fullmatch(name):
            inner, number, projection, part = match.groups()
            whole = f"{inner}.switch_mlp.{projection}.{part}"
            apart.setdefault(whole, {})[int(number)] = array
        else:
            weights[name] = array
    for whole, some in apart.items():
        weights[whole] = mx.stack([some[number] for number in sorted(some)])
    return weights


def _quantise_as(weights: Mapping[str, mx.array], layer: nn.Module, place: str) -> None:
    """Give the layer quantised modules where the weights are quantised."""

    def packing(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if f"{path}.scales" not in weights:
            return False
        return infer_quant_config(path, module, dict(weights))

    try:
        nn.quantize(layer, class_predicate=packing)
    except (ValueError, ArithmeticError) as error:
        raise LoadError(
            f"The MTP layer in {place} is packed in a way that MLX does not read: {error}.",
            hint="Take one in BF16, or in MLX's own quantisation.",
        ) from error


def _require_fit(weights: Mapping[str, mx.array], trunk: Trunk, place: str) -> None:
    if "fc.weight" not in weights:
        raise LoadError(
            f"{place} has no MTP layer: its weights lack fc.weight.",
            hint="Give the original checkpoint, or a folder that was split from it.",
        )
    if any(name.endswith("_scale_inv") for name in weights):
        raise LoadError(
            f"The MTP layer in {place} is packed in blocks of FP8, which MLX does not read.",
            hint="Take one in BF16, or in MLX's own quantisation.",
        )
    own = weights["fc.weight"].shape[0]
    if own != trunk.hidden_size:
        raise LoadError(
            f"The MTP layer in {place} is for another target: its hidden size is {own}, and this "
            f"target's {trunk.hidden_size}.",
            hint="Give the layer of the same model, in any quantisation.",
        )
