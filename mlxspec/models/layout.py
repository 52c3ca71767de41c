"""Weights laid out in memory as the BLAS library of MLX's wheel for Linux multiplies them fastest.

That is the reference library. Where a layer multiplies by transposed weights, as linear layers do,
it adds up one output after the other, and each addition waits for the one before. Where the weights
themselves lie transposed in memory, it adds to all outputs by turns, which is faster. Every
output is the same sum in the same order: the same bits. That is not so where a bias is added, and
16-bit numbers gain nothing.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxspec.device.kernels import on_cpu


def lay_out(model: nn.Module) -> None:
    """Let float32 weights of linear layers of a model or head lie transposed, but beside a bias.

    Neither shapes nor values change. A table of embeddings may be the last layer too, and is taken
    for one. Does nothing where it would gain nothing, as on a GPU and on a Mac.
    """
    for module in _gaining(model):
        module.weight = mx.contiguous(module.weight.T).T
        mx.eval(module.weight)


@contextmanager
def as_stored(*models: nn.Module) -> Iterator[None]:
    """While the block runs, the weights lie as they are stored: as other programs have them."""
    laid_out = [(module, module.weight) for model in models for module in _gaining(model)]
    for module, weight in laid_out:
        module.weight = mx.contiguous(weight)
        mx.eval(module.weight)
    try:
        yield
    finally:
        for module, weight in laid_out:
            module.weight = weight


def _gaining(model: nn.Module) -> list[Any]:
    """The layers whose weights gain by lying transposed."""
    if not on_cpu() or platform.system() != "Linux":
        return []
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Embedding)
        and "bias" not in module
        and module.weight.dtype == mx.float32
    ]
