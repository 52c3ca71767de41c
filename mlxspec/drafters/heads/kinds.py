"""Every kind of trained head that can be made, by the name that `recognition` gives it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from mlxspec.drafters.heads.block import load_block
from mlxspec.drafters.heads.head import Head
from mlxspec.drafters.heads.recognition import Kind
from mlxspec.drafters.heads.trunk import Trunk


class TrainedHead(Head, Protocol):
    """A head with weights. module: all of them."""

    module: nn.Module


# Called with the head's config.json, its weights by name, its target, the place where it is from,
# and the bits to which it is quantised, or None.
Make = Callable[[Mapping[str, Any], Mapping[str, mx.array], Trunk, str, int | None], TrainedHead]

MAKERS: Mapping[Kind, Make] = {"dflash": load_block, "dspark": load_block}
