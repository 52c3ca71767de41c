"""The memory that a trained head takes, before it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlxspec.drafters.heads.block_config import BlockConfig
from mlxspec.drafters.heads.recognition import Kind
from mlxspec.errors import LoadError
from mlxspec.models.footprint import Footprint, LayerPast, dtype_of


def head_footprint(kind: Kind, config: Mapping[str, Any], weights: int) -> Footprint:
    """The footprint of the head that a configuration describes.

    Args:
        kind: of the head. config: of the head, or of the model whose MTP layer it is.
        weights: bytes of them.

    Raises:
        LoadError: it makes no sense.
    """
    return (_of_layer if kind == "mtp" else _of_block)(config, weights)


def _of_layer(config: Mapping[str, Any], weights: int) -> Footprint:
    inner, number = config.get("text_config"), dtype_of(config).size
    text = inner if isinstance(inner, dict) else config
    try:
        hidden, heads = int(text["hidden_size"]), int(text["num_attention_heads"])
        size = int(text.get("head_dim") or hidden // heads)
        entry = 2.0 * int(text["num_key_value_heads"]) * size * number
        chosen = int(text.get("moe_intermediate_size", 0)) * int(text.get("num_experts_per_tok", 1))
        between = max(int(text.get("intermediate_size", 0)), chosen)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise LoadError(
            f"The configuration of an MTP layer makes no sense: {error}.",
            hint="Download it again.",
        ) from error
    return Footprint(
        weights=weights,
        layers=(LayerPast("full", entry),),
        fused=True,
        context=None,
        hidden=hidden,
        between=between,
        heads=heads,
        vocabulary=int(text.get("vocab_size", 0)),
        number=number,
        follows=True,
    )


def _of_block(config: Mapping[str, Any], weights: int) -> Footprint:
    read, number = BlockConfig.read(config, "config.json"), dtype_of(config).size
    entry = 2.0 * read.kv_heads * read.head_dim * number
    return Footprint(
        weights=weights,
        layers=tuple(
            LayerPast("full" if window is None else "window", entry, window=window)
            for window in read.windows
        ),
        fused=True,
        context=None,
        hidden=read.hidden_size,
        between=read.intermediate_size,
        heads=read.heads,
        vocabulary=read.vocabulary,
        number=number,
        follows=True,
    )
