"""The memory that a trained head takes, before it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlxspec.drafters.heads.block_config import BlockConfig
from mlxspec.models.footprint import Footprint, LayerPast, dtype_of


def head_footprint(config: Mapping[str, Any], weights: int) -> Footprint:
    """The footprint of the block-diffusion head that a configuration describes.

    Args:
        weights: bytes of them.

    Raises:
        LoadError: it makes no sense.
    """
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
