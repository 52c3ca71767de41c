"""MTP layers with random weights for tiny targets, under the names of published checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from architectures import TABLE, build
from mlx.utils import tree_flatten
from mtp_reference import Array, Reference

from mlxspec.drafters.heads.mtp import Mtp
from mlxspec.drafters.heads.mtp_weights import head_of, layer_weights

# A target for each: dense, experts in one array, experts one by one.
KINDS = ("qwen3_5", "qwen3_5_moe", "qwen3_next")


def text_of(target: Any) -> Any:
    return getattr(target, "language_model", target)


def raw_weights(target: Any, kind: str, seed: int = 0) -> dict[str, Array]:
    """Weights as an original checkpoint has them, without `mtp.`: norms are stored minus one."""
    args = text_of(target).args
    rng = np.random.default_rng(seed)
    width, size = args.hidden_size, args.head_dim

    def linear(rows: int, columns: int) -> Array:
        return (rng.normal(size=(rows, columns)) * 2 * columns**-0.5).astype(np.float32)

    def norm(count: int, mean: float) -> Array:
        return (mean + 0.2 * rng.normal(size=count)).astype(np.float32)

    found = {
        "fc": linear(width, 2 * width),
        "pre_fc_norm_embedding": norm(width, -0.4),
        "pre_fc_norm_hidden": norm(width, -0.2),
        "norm": norm(width, 1.3),
        "layers.0.input_layernorm": norm(width, 0.1),
        "layers.0.post_attention_layernorm": norm(width, 0.2),
        "layers.0.self_attn.q_proj": linear(2 * args.num_attention_heads * size, width),
        "layers.0.self_attn.k_proj": linear(args.num_key_value_heads * size, width),
        "layers.0.self_attn.v_proj": linear(args.num_key_value_heads * size, width),
        "layers.0.self_attn.o_proj": linear(width, args.num_attention_heads * size),
        "layers.0.self_attn.q_norm": norm(size, 0.7),
        "layers.0.self_attn.k_norm": norm(size, 0.7),
    }
    weights = {f"{name}.weight": array for name, array in found.items()}

    def network(name: str, between: int) -> None:
        for part, shape in {
            "gate_proj": (between, width),
            "up_proj": (between, width),
            "down_proj": (width, between),
        }.items():
            weights[f"layers.0.mlp{name}.{part}.weight"] = linear(*shape)

    if kind == "qwen3_5":
        network("", args.intermediate_size)
        return weights
    weights["layers.0.mlp.gate.weight"] = linear(args.num_experts, width)
    weights["layers.0.mlp.shared_expert_gate.weight"] = linear(1, width)
    network(".shared_expert", args.shared_expert_intermediate_size)
    for number in range(args.num_experts):
        network(f".experts.{number}", args.moe_intermediate_size)
    return fused(weights, args.num_experts) if kind == "qwen3_5_moe" else weights


def fused(weights: dict[str, Array], experts: int) -> dict[str, Array]:
    """The experts in two arrays, as Qwen3.5 has them."""
    inner = "layers.0.mlp.experts"
    apart = [
        {part: weights.pop(f"{inner}.{i}.{part}_proj.weight") for part in ("gate", "up", "down")}
        for i in range(experts)
    ]
    both = [np.concatenate([one["gate"], one["up"]]) for one in apart]
    weights[f"{inner}.gate_up_proj"] = np.stack(both)
    weights[f"{inner}.down_proj"] = np.stack([one["down"] for one in apart])
    return weights


def target_of(kind: str, **changes: Any) -> Any:
    return build(kind, **changes)


def head_for(target: Any, weights: dict[str, Array]) -> Mtp:
    arrays = {f"mtp.{name}": mx.array(array) for name, array in weights.items()}
    return head_of(layer_weights(arrays, less_one=True), target, "memory")


def reference_for(target: Any, weights: dict[str, Array]) -> Reference:
    text = text_of(target)
    embedding = np.array(text.model.embed_tokens.weight)
    tied = text.args.tie_word_embeddings
    output = embedding if tied else np.array(text.lm_head.weight)
    return Reference(weights, vars(text.args), embedding, output)


def features_of(target: Any, tokens: list[int]) -> Array:
    """What the target's final norm gives for each token, [N, D], read by itself in one pass."""
    return np.array(text_of(target).model(mx.array([tokens], mx.int32))[0])


def save(folder: Path, config: dict[str, Any], *files: dict[str, mx.array], form: str) -> Path:
    """A folder with a configuration, and weights in so many files, with an index of several."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    count = len(files)
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    names = names if count > 1 else ["model.safetensors"]
    for name, weights in zip(names, files, strict=True):
        mx.save_safetensors(str(folder / name), weights, metadata={"format": form})
    places = {key: name for name, some in zip(names, files, strict=True) for key in some}
    if count > 1:
        index = {"metadata": {}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def original(folder: Path, target: Any, kind: str, layer: dict[str, Array]) -> Path:
    """An original checkpoint in two files: names of transformers, norms stored minus one."""
    config = config_of(target, kind)
    weights = {}
    for name, array in tree_flatten(text_of(target).parameters()):
        is_norm = name.endswith(("norm.weight", "layernorm.weight")) and "linear_attn" not in name
        array = array - 1 if is_norm else array
        if "conv1d" in name:
            array = array.moveaxis(1, 2)
        if "text_config" in config:
            name = name.replace("model.", "model.language_model.", 1)
        weights |= _apart(name, array, fused=kind == "qwen3_5_moe")
    gate_up = [name for name in weights if name.endswith("experts.gate_proj")]
    for name in gate_up:
        up = weights.pop(name.replace("gate_proj", "up_proj"))
        both = mx.concatenate([weights.pop(name), up], axis=1)
        weights[name.replace("gate_proj", "gate_up_proj")] = both
    last = {f"mtp.{name}": mx.array(array) for name, array in layer.items()}
    return save(folder, config, weights, last, form="pt")


def config_of(target: Any, kind: str) -> dict[str, Any]:
    """The configuration of a target, as an original checkpoint has it."""
    config: dict[str, Any] = json.loads(json.dumps(TABLE[kind]["config"]))
    text = config.get("text_config", config)
    text |= {"mtp_num_hidden_layers": 1, "vocab_size": text_of(target).args.vocab_size}
    return {"model_type": kind, **config}


def _apart(name: str, array: mx.array, *, fused: bool) -> dict[str, mx.array]:
    """An array of all experts as transformers names it: whole, or one by one."""
    if ".switch_mlp." not in name:
        return {name: array}
    name = name.replace("switch_mlp", "experts").removesuffix(".weight")
    if fused:
        return {name: array}
    before, _, part = name.rpartition(".")
    return {f"{before}.{i}.{part}.weight": one for i, one in enumerate(array)}


def alone(folder: Path, target: Any, kind: str, layer: Any) -> Path:
    """A folder of a layer alone, as mlx-vlm splits it off: names without `mtp.`, whole norms."""
    config = config_of(target, kind)
    about = {"model_type": "qwen3_5_mtp", "block_size": 3}
    about["text_config"] = config.get("text_config", config)
    about["tie_word_embeddings"] = False
    return save(folder, about, dict(tree_flatten(layer.parameters())), form="mlx")
