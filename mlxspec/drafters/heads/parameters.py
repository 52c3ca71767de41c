"""Giving a head's modules their weights, quantised or not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxspec.errors import LoadError

GROUP = 64  # values that share a scale, where a head is quantised while it is loaded


def give(
    module: nn.Module,
    weights: Mapping[str, mx.array],
    config: Mapping[str, Any],
    place: str,
    bits: int | None = None,
) -> None:
    """Give a module its weights: all of them and no others.

    Args:
        config: of the head; its `quantization` is read as mlx-lm reads a model's.
        place: where the weights are from, for errors.
        bits: quantise what is not quantised, to that many.

    Raises:
        LoadError: they are not those of its configuration.
    """
    told = config.get("quantization")
    if isinstance(told, Mapping):
        _quantize_as(module, weights, told)
    expected: dict[str, mx.array] = dict(tree_flatten(module.parameters()))
    missing, others = sorted(expected.keys() - weights), sorted(weights.keys() - expected)
    for names, what in ((missing, "lack"), (others, "have too")):
        if names:
            raise LoadError(
                f"The weights of the head in {place} {what} {names[0]}"
                f"{f' and {len(names) - 1} more' if len(names) > 1 else ''}.",
                hint="Check config.json and the weights.",
            )
    for name, array in expected.items():
        if weights[name].shape != array.shape:
            raise LoadError(
                f"{name} of the head in {place} is {weights[name].shape}; by its configuration it "
                f"is {array.shape}.",
                hint="Check config.json and the weights.",
            )
    module.load_weights(list(weights.items()), strict=True)
    if bits is not None:
        nn.quantize(module, GROUP, bits, class_predicate=_can_be)
    module.eval()
    mx.eval(module.parameters())


def _quantize_as(
    module: nn.Module, weights: Mapping[str, mx.array], told: Mapping[str, Any]
) -> None:
    def chosen(path: str, one: nn.Module) -> bool | dict[str, Any]:
        if f"{path}.scales" not in weights:
            return False
        own = told.get(path)
        return dict(own) if isinstance(own, Mapping) else hasattr(one, "to_quantized")

    nn.quantize(
        module,
        group_size=told.get("group_size", GROUP),
        bits=told.get("bits", 4),
        mode=told.get("mode", "affine"),
        class_predicate=chosen,
    )


def _can_be(path: str, module: nn.Module) -> bool:
    """Whether a module's weights can be quantised in such groups, and may be.

    A router of experts stays as it is: it chooses by small differences.
    """
    weight = getattr(module, "weight", None)
    if not hasattr(module, "to_quantized") or weight is None or path.endswith("gate"):
        return False
    return bool(weight.shape[-1] % GROUP == 0)
