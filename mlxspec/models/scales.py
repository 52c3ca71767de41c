"""Quantised weights that MLX multiplies slowly: those with 16-bit scales, on a Linux CPU.

MLX has vector code for float32 there, and goes through 16-bit numbers one by one.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable

import mlx.core as mx

from mlxspec.device.kernels import on_cpu
from mlxspec.models.caches.original import Model

# How many times as long a pass over one row takes as with float32 (docs/measured.md).
SLOWER = {mx.bfloat16: 10, mx.float16: 60}


def why_slow(models: Iterable[Model]) -> str | None:
    """One line for people on models that are slow here for their scales, and on what helps.

    None where no model is, as on any GPU and on a Mac.
    """
    if not on_cpu() or platform.system() != "Linux":
        return None
    found = {(scales.dtype, bits) for model in models for scales, bits in _quantised(model)}
    slow = sorted((one for one in found if one[0] in SLOWER), key=lambda one: -SLOWER[one[0]])
    if not slow:
        return None
    dtype, bits = slow[0]
    name = str(dtype).rpartition(".")[2]
    return (
        f"this CPU takes about {SLOWER[dtype]} times as long for {bits}-bit weights with {name} "
        "scales as with float32 ones: convert the original with mlx_lm.convert --quantize --dtype "
        "float32"
    )


def _quantised(model: Model) -> Iterable[tuple[mx.array, int]]:
    """The scales of each quantised layer, and the bits of its weights."""
    for module in model.modules():
        scales, bits = getattr(module, "scales", None), getattr(module, "bits", None)
        if isinstance(scales, mx.array) and isinstance(bits, int):
            yield scales, bits
