"""Quantised weights that MLX multiplies slowly: those with 16-bit scales, on a Linux CPU.

MLX has vector code for float32 there, and goes through 16-bit numbers one by one.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable

import mlx.core as mx

from mlxspec.device.kernels import on_cpu
from mlxspec.models.caches.original import Model

# How many times as long a token takes as with float32: of a small model, and of its largest layers
# alone (docs/measured.md). The slowest type comes first.
SLOWER = {mx.float16: "20 to 60", mx.bfloat16: "5 to 10"}


def why_slow(models: Iterable[Model]) -> str | None:
    """One line for people on models that are slow here for their scales, and on what helps.

    None where no model is, as on any GPU and on a Mac.
    """
    if not on_cpu() or platform.system() != "Linux":
        return None
    found = {scales.dtype: bits for model in models for scales, bits in _quantised(model)}
    dtype = next((one for one in SLOWER if one in found), None)
    if dtype is None:
        return None
    name = str(dtype).rpartition(".")[2]
    return (
        f"a token takes this CPU {SLOWER[dtype]} times as long with {found[dtype]}-bit weights "
        f"whose scales are {name} as with float32 scales: convert the original with "
        "mlx_lm.convert --quantize --dtype float32"
    )


def _quantised(model: Model) -> Iterable[tuple[mx.array, int]]:
    """The scales of each quantised layer, and the bits of its weights."""
    for module in model.modules():
        scales, bits = getattr(module, "scales", None), getattr(module, "bits", None)
        if isinstance(scales, mx.array) and isinstance(bits, int):
            yield scales, bits
