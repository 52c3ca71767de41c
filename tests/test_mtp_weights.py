"""The weights of MTP layers, as published checkpoints and converters store them."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architectures import TABLE, build
from mlx.utils import tree_flatten
from mtp_makers import head_for, raw_weights, target_of

from mlxspec.drafters.heads.mtp_weights import head_of, is_of_layer, layer_weights
from mlxspec.errors import LoadError

NORMS = (
    "layers.0.self_attn.q_norm",
    "layers.0.self_attn.k_norm",
    "layers.0.input_layernorm",
    "layers.0.post_attention_layernorm",
    "norm",
    "pre_fc_norm_embedding",
    "pre_fc_norm_hidden",
)
# The means that published heads store, each less one: of Qwen3.5-4B, 3.6-27B, 3.6-35B-A3B.
PUBLISHED = {
    "4B": (0.746, 0.734, 0.303, 0.387, 2.58, -0.46, -0.16),
    "27B": (0.79, 0.78, 0.04, 0.21, 1.25, -0.46, -0.16),
    "35B": (0.75, 0.74, 0.30, 0.39, 1.25, -0.7266, -0.5063),
}


def norms(means: tuple[float, ...], whole: tuple[str, ...] = ()) -> dict[str, mx.array]:
    """Norm weights of these means: stored minus one, but for the `whole` ones."""
    rng = np.random.default_rng(3)
    return {
        f"{name}.weight": mx.array(mean + (name in whole) + 0.1 * rng.normal(size=64), mx.float32)
        for name, mean in zip(NORMS, means, strict=True)
    }


# What converters have been seen to do: all, none, those that a list of mlx-lm's names, the layer's
# alone, those of heads and the last.
STORED = {
    "none": (),
    "all": NORMS,
    "by mlx-lm's list": NORMS[:4],
    "of heads and the last": ("norm", *NORMS[:2]),
    "all but those before fc": NORMS[:5],
}


@pytest.mark.parametrize("model", PUBLISHED)
@pytest.mark.parametrize("stored", STORED)
def test_norms_are_shifted_once_whatever_was_done_before(model: str, stored: str) -> None:
    acting = norms(PUBLISHED[model], NORMS)
    found = norms(PUBLISHED[model], STORED[stored])
    for less_one in (False, True):
        weights = layer_weights(found, less_one=less_one)
        for name, array in acting.items():
            if stored == "by mlx-lm's list" and name == "norm.weight":
                continue  # nothing tells
            np.testing.assert_allclose(weights[name], array, atol=1e-6, err_msg=name)


def test_numbers_that_tell_nothing_are_taken_as_the_file_says() -> None:
    found = norms((1.2, 1.2, 0.6, 0.6, 2.0, 0.4, 0.4))
    for less_one in (False, True):
        weights = layer_weights(found, less_one=less_one)
        for name, array in found.items():
            np.testing.assert_allclose(weights[name], array + less_one, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mtp.fc.weight", True),
        ("language_model.mtp.fc.weight", True),
        ("model.language_model.mtp.norm.weight", True),
        ("model.layers.3.mlp.gate.weight", False),
        ("lm_head.weight", False),
    ],
)
def test_a_layer_is_known_by_its_names(name: str, expected: bool) -> None:
    assert is_of_layer(name) is expected


def test_experts_in_one_array_are_those_one_by_one() -> None:
    target = target_of("qwen3_5_moe")
    apart = raw_weights(target, "qwen3_next")
    weights = [
        dict(tree_flatten(head_for(target, one)._layer.parameters()))
        for one in (apart, raw_weights(target, "qwen3_5_moe"))
    ]
    assert weights[0].keys() == weights[1].keys()
    for name, array in weights[0].items():
        assert mx.array_equal(array, weights[1][name]), name


def wide(kind: str = "qwen3_5") -> Any:
    """A target whose widths are multiples of 64."""
    config = TABLE[kind]["config"]
    wide = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    wide |= {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
    return build(kind, text_config={**config["text_config"], **wide})


@pytest.mark.parametrize("kind", ["qwen3_5", "qwen3_5_moe"])
@pytest.mark.parametrize(
    "packing",
    [{"bits": 4}, {"bits": 8}, {"bits": 4, "group_size": 32}, {"mode": "mxfp4", "group_size": 32}],
    ids=str,
)
def test_packed_weights_are_read(kind: str, packing: dict[str, Any]) -> None:
    target = wide(kind)
    whole = head_for(target, raw_weights(target, kind))._layer
    nn.quantize(whole, **packing)
    stored = dict(tree_flatten(whole.parameters()))
    read = head_of(layer_weights(stored, less_one=False), target, "memory")._layer
    for name, array in tree_flatten(read.parameters()):
        assert mx.array_equal(array, stored[name]), name
    assert type(read.fc).__name__ == "QuantizedLinear"
    assert read.fc.bits == packing.get("bits", 4)


@pytest.mark.parametrize("kind", ["qwen3_5", "qwen3_5_moe"])
def test_a_layer_is_quantised_while_it_is_loaded(kind: str) -> None:
    target = wide(kind)
    arrays = {name: mx.array(one) for name, one in raw_weights(target, kind).items()}
    layer: Any = head_of(layer_weights(arrays, less_one=True), target, "memory", 8).module
    assert layer.fc.bits == layer.layers[0].self_attn.q_proj.bits == 8
    if kind == "qwen3_5_moe":
        assert layer.layers[0].mlp.switch_mlp.up_proj.bits == 8
        assert type(layer.layers[0].mlp.gate) is nn.Linear


def without(weights: dict[str, mx.array], name: str) -> dict[str, mx.array]:
    return {other: array for other, array in weights.items() if other != name}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: without(w, "fc.weight"), "has no MTP layer"),
        (
            lambda w: w | {"fc.weight": mx.zeros((48, 96))},
            "its hidden size is 48, and this target.s 32",
        ),
        (lambda w: without(w, "norm.weight"), "lack norm.weight"),
        (lambda w: w | {"layers.1.mlp.up_proj.weight": mx.zeros((1, 1))}, "have too layers.1.mlp"),
        (lambda w: w | {"fc.weight_scale_inv": mx.zeros((1, 1))}, "blocks of FP8"),
        (
            lambda w: w | {"layers.0.self_attn.k_proj.weight": mx.zeros((8, 32))},
            r"k_proj.weight .* is \(8, 32\); .* it is \(16, 32\)",
        ),
        (lambda w: w | {"fc.scales": mx.zeros((32, 1), mx.uint8)}, "packed in a way"),
    ],
)
def test_a_layer_of_another_model_is_refused(change: Any, words: str) -> None:
    target = target_of("qwen3_5")
    arrays = {name: mx.array(one) for name, one in raw_weights(target, "qwen3_5").items()}
    with pytest.raises(LoadError, match=words) as error:
        head_of(layer_weights(change(arrays), less_one=True), target, "here")
    assert error.value.hint


@pytest.mark.parametrize("kind", ["qwen3_5_moe", "qwen3_next"])
def test_a_layer_of_experts_is_refused_by_a_target_without(kind: str) -> None:
    target = target_of("qwen3_5")
    with pytest.raises(LoadError, match="lack"):
        head_for(target, raw_weights(target_of(kind), kind))
